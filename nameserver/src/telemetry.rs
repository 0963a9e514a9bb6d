//! A client's Telemetry stream carried to a broker. When that broker goes, the stream moves to
//! another, with the client's last settings: clients such as Rust 5.0.0 never reopen theirs.

use std::error::Error;
use std::time::{Duration, Instant};

use drumlin_proto::native::Address;
use drumlin_proto::rocketmq::TelemetryCommand;
use drumlin_proto::rocketmq::telemetry_command::Command;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::clients::Presence;
use crate::forward::{Call, any_address, messaging};
use crate::shared::Shared;

const COMMANDS_MAX: usize = 16;
/// How long a client's stream waits for any broker.
const BROKER_WAIT: Duration = Duration::from_secs(30);
const RETRY_PAUSE: Duration = Duration::from_millis(500);

type Answers = mpsc::Sender<Result<TelemetryCommand, Status>>;

/// How one broker's part of a stream ended.
enum Ended {
    /// The client is gone, or this process stops.
    Done,
    /// The broker is gone.
    BrokerLost,
}

/// Carries a stream until the client ends it or a broker refuses it.
pub(crate) async fn relay(
    shared: &Shared,
    call: &Call,
    mut inbound: Streaming<TelemetryCommand>,
    answers: &Answers,
) -> Result<(), Status> {
    let first = tokio::select! {
        first = inbound.message() => first?,
        () = shared.stop.cancelled() => None,
    };
    // A broker's answer may begin only after its first command, so that one is needed now.
    let Some(mut opening) = first else { return Ok(()) };
    let presence = shared.clients.enter(call.client_id());
    presence.passes(&opening);
    loop {
        let wait = shared.directory.wait_for(Instant::now() + BROKER_WAIT, any_address);
        let address = tokio::select! {
            address = wait => address,
            () = answers.closed() => return Ok(()),
            () = shared.stop.cancelled() => return Ok(()),
        };
        let Some(address) = address else {
            return Err(Status::unavailable("no broker has registered yet"));
        };
        match at_broker(shared, call, &address, &mut opening, &mut inbound, answers, &presence)
            .await?
        {
            Ended::Done => return Ok(()),
            Ended::BrokerLost => tokio::time::sleep(RETRY_PAUSE).await,
        }
    }
}

/// An error that a broker sent, not one of the way to it.
fn is_refusal(error: &Status) -> bool {
    error.source().is_none() && error.code() != tonic::Code::Unavailable
}

/// Carries commands to and from one broker. `opening` becomes the last settings that passed.
async fn at_broker(
    shared: &Shared,
    call: &Call,
    address: &Address,
    opening: &mut TelemetryCommand,
    inbound: &mut Streaming<TelemetryCommand>,
    answers: &Answers,
    presence: &Presence<'_>,
) -> Result<Ended, Status> {
    let (commands, stream) = mpsc::channel(COMMANDS_MAX);
    if commands.send(opening.clone()).await.is_err() {
        return Ok(Ended::BrokerLost);
    }
    let mut client = messaging(shared.forwarder.channel(address)?);
    let opened = client.telemetry(call.endless_request(ReceiverStream::new(stream))).await;
    let mut from_broker = match opened {
        Ok(response) => response.into_inner(),
        Err(error) if is_refusal(&error) => return Err(error),
        Err(_) => return Ok(Ended::BrokerLost),
    };
    loop {
        // All arms are cancellation-safe: a message is taken only when it is whole.
        tokio::select! {
            command = inbound.message() => {
                let Ok(Some(command)) = command else { return Ok(Ended::Done) };
                presence.passes(&command);
                if matches!(command.command, Some(Command::Settings(_))) {
                    opening.clone_from(&command);
                }
                if commands.send(command).await.is_err() {
                    return Ok(Ended::BrokerLost);
                }
            }
            told = from_broker.message() => match told {
                Ok(Some(told)) => {
                    if answers.send(Ok(told)).await.is_err() {
                        return Ok(Ended::Done);
                    }
                }
                Ok(None) => return Ok(Ended::BrokerLost),
                Err(error) if is_refusal(&error) => return Err(error),
                Err(_) => return Ok(Ended::BrokerLost),
            },
            () = answers.closed() => return Ok(Ended::Done),
            () = shared.stop.cancelled() => return Ok(Ended::Done),
        }
    }
}
