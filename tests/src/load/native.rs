//! Single calls of the native API.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::native::broker_client::BrokerClient;
use drumlin_proto::native::peer_client::PeerClient;
use drumlin_proto::native::{
    CommitOffsetRequest, CreateTopicRequest, DescribeBrokerRequest, DescribeBrokerResponse,
    FetchRequest, FetchResponse, GetCommittedOffsetRequest, Position, ProduceRequest,
    ProduceResponse, QueryOffsetsRequest, StateRequest, Status, TopicType, fetch_request, position,
    status,
};
use drumlin_proto::record::{RecordFields, Run, RunBuilder};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::{body_of, seen};
use crate::event::{Queue, Seen};

/// Of the third member of a group: ids are given to data nodes by name, then to the witness.
const WITNESS_ID: &str = "3";
/// For calls that answer at once where anybody is there.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a broker may hold a send before it drops it unstored.
const SEND_TIMEOUT_MS: u32 = 1_500;
/// After it the outcome of a send is unknown.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(2_500);

pub async fn connect(address: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint.connect_timeout(Duration::from_millis(500)).connect().await?)
}

fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn expect_ok(status: Option<Status>) -> Result<()> {
    let status = status.context("no status")?;
    ensure!(status.code() == status::Code::Ok, "{:?}: {}", status.code(), status.message);
    Ok(())
}

pub async fn create_topic(
    channel: &Channel,
    name: &str,
    queue_count: u32,
    min_copies: u32,
) -> Result<()> {
    let create = CreateTopicRequest {
        name: name.into(),
        queue_count,
        r#type: TopicType::Normal.into(),
        min_copies,
        ..CreateTopicRequest::default()
    };
    let answer = AdminClient::new(channel.clone()).create_topic(request(create)).await?;
    let status = answer.into_inner().status.context("no status")?;
    let there = [status::Code::Ok, status::Code::AlreadyExists];
    ensure!(there.contains(&status.code()), "{:?}: {}", status.code(), status.message);
    Ok(())
}

/// What became of a send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    Stored {
        queue: u32,
        offset: u64,
        degraded: bool,
    },
    /// By its contract the answer means that nothing was stored.
    Refused {
        code: status::Code,
        message: String,
    },
    Unknown {
        reason: String,
    },
}

/// A produce stream to one broker, one send at a time.
#[derive(Debug)]
pub struct Sender {
    requests: mpsc::Sender<ProduceRequest>,
    answers: Streaming<ProduceResponse>,
    sequence: u64,
}

impl Sender {
    pub async fn open(channel: Channel) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(1);
        let mut client = BrokerClient::new(channel);
        let opened = client.produce(ReceiverStream::new(receiver));
        let answers = tokio::time::timeout(CALL_TIMEOUT, opened).await??.into_inner();
        Ok(Self { requests, answers, sequence: 0 })
    }

    pub async fn send(&mut self, topic: &str, queue: u32, value: &str, bytes: usize) -> Sent {
        self.sequence += 1;
        let mut run = RunBuilder::new();
        let body = body_of(value, bytes);
        run.push(&RecordFields { message_id: value, body: &body, ..RecordFields::default() });
        let request = ProduceRequest {
            sequence: self.sequence,
            topic: topic.into(),
            queue_id: i32::try_from(queue).expect("a test has few queues"),
            run: run.finish(),
            resume: true,
            timeout_ms: SEND_TIMEOUT_MS,
        };
        let exchange = async {
            if self.requests.send(request).await.is_err() {
                bail!("the stream ended");
            }
            Ok(self.answers.next().await.context("the stream ended")??)
        };
        let answer = match tokio::time::timeout(ANSWER_TIMEOUT, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Sent::Unknown { reason: format!("{error:#}") },
            Err(_) => return Sent::Unknown { reason: "no answer".into() },
        };
        if answer.sequence != self.sequence {
            return Sent::Unknown { reason: format!("an ack of {}", answer.sequence) };
        }
        let status = answer.status.unwrap_or_default();
        match status.code() {
            status::Code::Ok => Sent::Stored {
                queue: answer.queue_id,
                offset: answer.base_offset,
                degraded: answer.degraded,
            },
            status::Code::UnknownOutcome => Sent::Unknown { reason: status.message },
            code => Sent::Refused { code, message: status.message },
        }
    }
}

/// A fetch stream to one broker that reads several queues of a topic.
#[derive(Debug)]
pub struct Fetcher {
    answers: Streaming<FetchResponse>,
    // Ends the stream when it goes.
    _requests: mpsc::Sender<FetchRequest>,
}

/// Of one answer to a fetch.
#[derive(Debug)]
pub struct Fetched {
    pub queue: u32,
    pub min: u64,
    pub end: u64,
    /// Where the next record will be.
    pub next: Option<u64>,
    pub seen: Vec<Seen>,
}

impl Fetcher {
    /// `from`: the offset to begin each queue at.
    pub async fn open(channel: Channel, topic: &str, from: &[(u32, u64)]) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(from.len().max(1));
        for &(queue_id, offset) in from {
            let open = fetch_request::Open {
                fetch_id: queue_id + 1,
                topic: topic.into(),
                queue_id,
                from: Some(Position { at: Some(position::At::Offset(offset)) }),
                credit_bytes: 1 << 40,
            };
            let request = Some(fetch_request::Request::Open(open));
            requests.send(FetchRequest { request }).await?;
        }
        let mut client = BrokerClient::new(channel).max_decoding_message_size(64 << 20);
        let opened = client.fetch(ReceiverStream::new(receiver));
        let answers = tokio::time::timeout(CALL_TIMEOUT, opened).await??.into_inner();
        Ok(Self { answers, _requests: requests })
    }

    /// The next answer, or an error where the broker does not lead (any more).
    pub async fn next(&mut self, limit: Duration) -> Result<Option<Fetched>> {
        let answer = match tokio::time::timeout(limit, self.answers.next()).await {
            Ok(answer) => answer.context("the stream ended")??,
            Err(_) => return Ok(None),
        };
        expect_ok(answer.status)?;
        let mut all = Vec::new();
        for fetched in answer.runs {
            let run = Run::from_log(fetched.run)?;
            run.verify()?;
            let records = (fetched.base_offset..).zip(run.records());
            all.extend(records.map(|(offset, record)| seen(offset, record.body())));
        }
        Ok(Some(Fetched {
            queue: answer.fetch_id - 1,
            min: answer.min_offset,
            end: answer.max_offset,
            next: all.last().map(|last| last.offset + 1).or(answer.start_offset),
            seen: all,
        }))
    }
}

/// A queue from its oldest record to its end, and where it begins.
pub async fn read_queue(channel: &Channel, topic: &str, queue: u32) -> Result<(u64, Vec<Seen>)> {
    let mut fetcher = Fetcher::open(channel.clone(), topic, &[(queue, 0)]).await?;
    let (mut all, mut next) = (Vec::new(), 0);
    loop {
        let answer = fetcher.next(Duration::from_secs(30)).await?.context("no answer")?;
        all.extend(answer.seen);
        next = answer.next.unwrap_or(next);
        if next >= answer.end {
            return Ok((answer.min, all));
        }
    }
}

pub async fn commit(
    channel: &Channel,
    consumers: &str,
    queue: &Queue,
    offset: u64,
) -> Result<Status> {
    let commit = CommitOffsetRequest {
        group: consumers.to_owned(),
        topic: queue.topic.to_string(),
        queue_id: queue.id,
        offset,
        broker_group: queue.group.to_string(),
    };
    let answer = AdminClient::new(channel.clone()).commit_offset(request(commit)).await?;
    answer.into_inner().status.context("no status")
}

pub async fn committed(channel: &Channel, consumers: &str, queue: &Queue) -> Result<Option<u64>> {
    let get = GetCommittedOffsetRequest {
        group: consumers.to_owned(),
        topic: queue.topic.to_string(),
        queue_id: queue.id,
        broker_group: queue.group.to_string(),
    };
    let answer = AdminClient::new(channel.clone()).get_committed_offset(request(get)).await?;
    let answer = answer.into_inner();
    expect_ok(answer.status)?;
    Ok(answer.offset)
}

/// Ends of the queues of a topic that the asked broker group has.
pub async fn ends(channel: &Channel, topic: &str) -> Result<Vec<(String, u32, u64)>> {
    let at = Some(Position { at: Some(position::At::Latest(true)) });
    let query = QueryOffsetsRequest { topic: topic.to_owned(), at, own_group_only: true };
    let answer = AdminClient::new(channel.clone()).query_offsets(request(query)).await?;
    let answer = answer.into_inner();
    expect_ok(answer.status)?;
    let offsets = answer.offsets.into_iter();
    Ok(offsets.map(|queue| (queue.broker_group, queue.queue_id, queue.offset)).collect())
}

pub async fn describe(channel: &Channel) -> Result<DescribeBrokerResponse> {
    let mut client = AdminClient::new(channel.clone());
    let answer = client.describe_broker(request(DescribeBrokerRequest {})).await?.into_inner();
    expect_ok(answer.status.clone())?;
    Ok(answer)
}

/// Term of the vote that a member remembers, as it says to other members; `of`: any node of its
/// broker group.
pub async fn member_term(channel: &Channel, of: &DescribeBrokerResponse) -> Result<u64> {
    let mut asked = request(StateRequest {});
    let caller = [
        ("drumlin-cluster", &of.cluster),
        ("drumlin-broker-group", &of.broker_group),
        ("drumlin-group-uuid", &of.group_uuid),
        // The first data node; whom it asks does not matter here.
        ("drumlin-from", &"1".to_owned()),
        ("drumlin-to", &WITNESS_ID.to_owned()),
    ];
    for (key, value) in caller {
        asked.metadata_mut().insert(key, value.parse()?);
    }
    Ok(PeerClient::new(channel.clone()).state(asked).await?.into_inner().term)
}
