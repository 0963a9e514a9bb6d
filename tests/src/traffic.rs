//! Load for the durability tests, straight on the native API: no SDK in between that could hide or
//! repeat anything.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::native::broker_client::BrokerClient;
use drumlin_proto::native::{
    CommitOffsetRequest, CreateTopicRequest, FetchRequest, FetchedRun, GetCommittedOffsetRequest,
    Position, ProduceRequest, TopicType, fetch_request, position, status,
};
use drumlin_proto::record::{RecordFields, Run, RunBuilder};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::history::{History, Queue, Value};

pub const TOPIC: &str = "durable";
pub const GROUP: &str = "auditor";
pub const QUEUE_COUNT: u32 = 4;

pub async fn connect(address: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
    Ok(endpoint.connect_timeout(Duration::from_secs(5)).connect().await?)
}

pub async fn create_topic(channel: &Channel) -> Result<()> {
    let request = CreateTopicRequest {
        name: TOPIC.into(),
        queue_count: QUEUE_COUNT,
        r#type: TopicType::Normal.into(),
        ..CreateTopicRequest::default()
    };
    let answer = AdminClient::new(channel.clone()).create_topic(request).await?.into_inner();
    let status = answer.status.context("no status")?;
    ensure!(status.code() == status::Code::Ok, "{status:?}");
    Ok(())
}

/// Sends numbered values one after the other, until the connection ends or `enough` says so.
///
/// Each send that was begun ends up in the history: as acknowledged, or as unknown.
pub async fn produce(
    channel: Channel,
    producer: String,
    body_bytes: usize,
    mut enough: impl FnMut(&History) -> bool,
) -> Result<History> {
    let mut history = History::default();
    let (requests, receiver) = mpsc::channel(1);
    let mut client = BrokerClient::new(channel);
    let Ok(answers) = client.produce(ReceiverStream::new(receiver)).await else {
        return Ok(history);
    };
    let mut answers = answers.into_inner();
    for sequence in 1.. {
        if enough(&history) {
            break;
        }
        let value = format!("{producer}-{sequence}");
        let queue_id = i32::try_from(sequence % u64::from(QUEUE_COUNT))?;
        let run = run_of(&value, body_bytes);
        let request = ProduceRequest {
            sequence,
            topic: TOPIC.into(),
            queue_id,
            run,
            resume: true,
            timeout_ms: 5_000,
        };
        history.unknown(value.clone());
        if requests.send(request).await.is_err() {
            break;
        }
        let Some(Ok(answer)) = answers.next().await else { break };
        let status = answer.status.context("no status")?;
        ensure!(answer.sequence == sequence, "ack of {}, not {sequence}", answer.sequence);
        if status.code() == status::Code::Ok {
            let reused = history.acknowledged(answer.queue_id, answer.base_offset, value);
            ensure!(reused.is_none(), "{reused:?}");
        }
    }
    Ok(history)
}

/// What one send was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    Acknowledged {
        queue: Queue,
        offset: u64,
    },
    /// Not stored, or not known to be.
    Refused {
        code: status::Code,
        message: String,
    },
}

impl Sent {
    /// Enters it into a history.
    pub fn record(&self, history: &mut History, value: &str) -> Result<()> {
        match self {
            Self::Acknowledged { queue, offset } => {
                let reused = history.acknowledged(*queue, *offset, value.to_owned());
                ensure!(reused.is_none(), "{reused:?}");
            }
            Self::Refused { .. } => history.unknown(value.to_owned()),
        }
        Ok(())
    }
}

/// Sends one value on a stream of its own.
pub async fn send_one(channel: &Channel, value: &str, body_bytes: usize) -> Result<Sent> {
    let request = ProduceRequest {
        sequence: 1,
        topic: TOPIC.into(),
        queue_id: 0,
        run: run_of(value, body_bytes),
        resume: true,
        timeout_ms: 5_000,
    };
    let mut client = BrokerClient::new(channel.clone());
    let mut answers = client.produce(tokio_stream::iter([request])).await?.into_inner();
    let answer = answers.next().await.context("the stream ended without an answer")??;
    let status = answer.status.context("no status")?;
    Ok(match status.code() {
        status::Code::Ok => {
            Sent::Acknowledged { queue: answer.queue_id, offset: answer.base_offset }
        }
        code => Sent::Refused { code, message: status.message },
    })
}

fn run_of(value: &str, body_bytes: usize) -> bytes::Bytes {
    let mut body = value.as_bytes().to_vec();
    body.push(b' ');
    let filler = value.bytes().cycle();
    let missing = body_bytes.saturating_sub(body.len());
    body.extend(filler.take(missing));
    let mut run = RunBuilder::new();
    run.push(&RecordFields { message_id: value, body: &body, ..RecordFields::default() });
    run.finish()
}

/// Reads every queue from its oldest record to its end.
pub async fn read_all(channel: &Channel) -> Result<BTreeMap<Queue, Vec<(u64, Value)>>> {
    let mut queues = BTreeMap::new();
    for queue in 0..QUEUE_COUNT {
        let mut records = Vec::new();
        for fetched in read_queue(channel.clone(), queue).await? {
            let run = Run::from_log(fetched.run)?;
            run.verify()?;
            for (offset, record) in (fetched.base_offset..).zip(run.records()) {
                let text = std::str::from_utf8(record.body())?;
                let value = text.split(' ').next().context("an empty body")?.to_owned();
                ensure!(record.message_id() == value, "{} holds {value}", record.message_id());
                records.push((offset, value));
            }
        }
        queues.insert(queue, records);
    }
    Ok(queues)
}

/// Queue and store time of every run, in the order of the queues' offsets.
pub async fn store_times(channel: &Channel) -> Result<Vec<(Queue, i64)>> {
    let mut times = Vec::new();
    for queue in 0..QUEUE_COUNT {
        let runs = read_queue(channel.clone(), queue).await?;
        times.extend(runs.into_iter().map(|fetched| (queue, fetched.store_time_ms)));
    }
    Ok(times)
}

/// All runs of a queue, from its oldest to the end it had when the last of them came.
async fn read_queue(channel: Channel, queue_id: Queue) -> Result<Vec<FetchedRun>> {
    let (requests, receiver) = mpsc::channel(16);
    let open = fetch_request::Open {
        fetch_id: 1,
        topic: TOPIC.into(),
        queue_id,
        from: Some(Position { at: Some(position::At::Earliest(true)) }),
        credit_bytes: 1 << 30,
    };
    let request = FetchRequest { request: Some(fetch_request::Request::Open(open)) };
    requests.send(request).await?;
    let mut client = BrokerClient::new(channel).max_decoding_message_size(64 << 20);
    let mut answers = client.fetch(ReceiverStream::new(receiver)).await?.into_inner();
    let mut runs: Vec<FetchedRun> = Vec::new();
    let mut next = 0;
    while let Some(answer) = answers.next().await {
        let answer = answer?;
        let status = answer.status.unwrap_or_default();
        ensure!(status.code() == status::Code::Ok, "{status:?}");
        next = answer.start_offset.unwrap_or(next);
        for fetched in answer.runs {
            next =
                fetched.base_offset + u64::from(Run::from_log(fetched.run.clone())?.record_count());
            runs.push(fetched);
        }
        if next >= answer.max_offset {
            break;
        }
    }
    Ok(runs)
}

/// Commits the end of what is acknowledged in each queue, once.
pub async fn commit_offset(channel: &Channel, queue_id: Queue, offset: u64) -> Result<()> {
    let request = CommitOffsetRequest {
        group: GROUP.into(),
        topic: TOPIC.into(),
        queue_id,
        offset,
        ..Default::default()
    };
    let answer = AdminClient::new(channel.clone()).commit_offset(request).await?.into_inner();
    let status = answer.status.context("no status")?;
    ensure!(status.code() == status::Code::Ok, "{status:?}");
    Ok(())
}

pub async fn committed_offsets(channel: &Channel) -> Result<BTreeMap<Queue, Option<u64>>> {
    let mut offsets = BTreeMap::new();
    for queue_id in 0..QUEUE_COUNT {
        let request = GetCommittedOffsetRequest {
            group: GROUP.into(),
            topic: TOPIC.into(),
            queue_id,
            ..Default::default()
        };
        let mut client = AdminClient::new(channel.clone());
        offsets.insert(queue_id, client.get_committed_offset(request).await?.into_inner().offset);
    }
    Ok(offsets)
}
