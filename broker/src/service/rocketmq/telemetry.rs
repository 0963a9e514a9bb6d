//! The Telemetry stream: settings in, settings out, and the way to reach a client.

use std::sync::Arc;

use drumlin_proto::rocketmq::telemetry_command::Command;
use drumlin_proto::rocketmq::{Code, Settings, Status as RpcStatus, TelemetryCommand};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};

use super::caller::Caller;
use super::status::{Fault, ok};
use super::{Edge, settings};

/// Commands that wait for the client to read them.
const COMMANDS_WAITING_MAX: usize = 16;

type Sender = mpsc::Sender<Result<TelemetryCommand, Status>>;

/// Answers the client's commands until it, or the broker, stops. The registration outlives the
/// stream: it ends with NotifyClientTermination or with silence.
pub(super) fn open(
    edge: &Arc<Edge>,
    listener: &Arc<str>,
    request: Request<Streaming<TelemetryCommand>>,
) -> ReceiverStream<Result<TelemetryCommand, Status>> {
    let (sender, receiver) = mpsc::channel(COMMANDS_WAITING_MAX);
    let caller = Caller::from_metadata(request.metadata(), listener, Instant::now());
    let task = edge.clone();
    edge.tasks.spawn(async move {
        match caller {
            Ok(caller) => serve(&task, &caller, request.into_inner(), &sender).await,
            Err(fault) => refuse(&sender, fault.status(), &fault).await,
        }
    });
    ReceiverStream::new(receiver)
}

async fn serve(
    edge: &Edge,
    caller: &Caller,
    mut inbound: Streaming<TelemetryCommand>,
    sender: &Sender,
) {
    loop {
        let received = tokio::select! {
            () = edge.stop.cancelled() => return,
            () = sender.closed() => return,
            received = inbound.message() => received,
        };
        let command = match received {
            Ok(Some(command)) => command,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, client = caller.client_id, "telemetry stream broke");
                return;
            }
        };
        let started = Instant::now();
        edge.clients.touch(&caller.client_id, started);
        let Some(Command::Settings(sent)) = command.command else {
            let code = command.status.map(|status| status.code());
            tracing::debug!(client = caller.client_id, ?code, "telemetry answer to no question");
            continue;
        };
        match edge.settings(caller, sent) {
            Ok(answer) => {
                edge.note("Telemetry", Some(caller), Code::Ok, started);
                let sent = edge.stop.run_until_cancelled(sender.send(Ok(answer))).await;
                let Some(Ok(())) = sent else { return };
            }
            Err(fault) => {
                edge.note("Telemetry", Some(caller), fault.code, started);
                let mut status = fault.status();
                caller.bearable(&mut status);
                return refuse(sender, status, &fault).await;
            }
        }
    }
}

impl Edge {
    fn settings(&self, caller: &Caller, sent: Settings) -> Result<TelemetryCommand, Fault> {
        let accepted = settings::accept(sent, &caller.namespace)?;
        self.register(caller, accepted.sighting)?;
        let command = Some(Command::Settings(accepted.settings));
        Ok(TelemetryCommand { status: Some(ok()), command })
    }
}

/// Some clients wait for a status and others for the stream's end: send both.
async fn refuse(sender: &Sender, status: RpcStatus, fault: &Fault) {
    let command = TelemetryCommand { status: Some(status), command: None };
    let error = match i32::from(fault.code) {
        40_000..50_000 | 50_100 => Status::invalid_argument(fault.text.clone()),
        _ => Status::internal(fault.text.clone()),
    };
    if sender.send(Ok(command)).await.is_ok() && sender.send(Err(error)).await.is_err() {
        tracing::debug!("the client left before it was refused");
    }
}
