//! One `Produce` stream to one leader: carries requests out and answers back, knows no order.

use drumlin_proto::native::ProduceRequest;
use drumlin_proto::native::broker_client::BrokerClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::dispatch::Event;
use super::lane::LinkId;
use crate::connection::{Address, GRPC_BYTES_MAX, root_cause};

/// Requests that may wait for the stream; beyond them runs wait in their lanes.
const REQUESTS_MAX: usize = 256;

/// The dispatcher's end of a stream.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: LinkId,
    requests: mpsc::Sender<ProduceRequest>,
    next_sequence: u64,
    stop: CancellationToken,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What the stream's own task needs.
pub(super) struct LinkTask {
    id: LinkId,
    address: Address,
    channel: Channel,
    requests: mpsc::Receiver<ProduceRequest>,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
}

impl Link {
    pub(super) fn new(
        id: LinkId,
        address: Address,
        channel: Channel,
        events: mpsc::Sender<Event>,
    ) -> (Self, LinkTask) {
        let (sender, requests) = mpsc::channel(REQUESTS_MAX);
        let stop = CancellationToken::new();
        let task = LinkTask { id, address, channel, requests, events, stop: stop.clone() };
        (Self { id, requests: sender, next_sequence: 1, stop }, task)
    }

    pub(super) fn has_room(&self) -> bool {
        self.requests.capacity() > 0
    }

    /// Hands a request to the stream under the next sequence; `None` where it takes none.
    pub(super) fn send(&mut self, mut request: ProduceRequest) -> Option<u64> {
        let sequence = self.next_sequence;
        request.sequence = sequence;
        self.requests.try_send(request).ok()?;
        self.next_sequence += 1;
        Some(sequence)
    }
}

impl LinkTask {
    /// Runs the stream to its end and reports that, unless the dispatcher dropped it.
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.serve() => {}
        }
    }

    async fn serve(&mut self) {
        let (reached, reason) = match self.stream().await {
            Ok(()) => (true, "the broker ended the stream".to_owned()),
            Err(status) => (!is_connect_error(&status), root_cause(&status)),
        };
        let reason = format!("{}: {reason}", self.address);
        let address = self.address.clone();
        let down = Event::Down { address, link: self.id, reached, reason };
        // Without a dispatcher nobody asks.
        self.events.send(down).await.ok();
    }

    async fn stream(&mut self) -> Result<(), tonic::Status> {
        let (_, closed) = mpsc::channel(1);
        let requests = std::mem::replace(&mut self.requests, closed);
        let mut client = BrokerClient::new(self.channel.clone())
            .max_decoding_message_size(GRPC_BYTES_MAX)
            .max_encoding_message_size(GRPC_BYTES_MAX);
        let mut answers = client.produce(ReceiverStream::new(requests)).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            let event = Event::Answer { address: self.address.clone(), link: self.id, answer };
            if self.events.send(event).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Whether the connection was never made, so that nothing can have arrived.
fn is_connect_error(status: &tonic::Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}
