//! Wall clocks lie: nothing is lost, nothing is trimmed early, leases still end.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::{
    FilterExpression, Message, MessageQueue, ReceiveMessageRequest, Resource,
    receive_message_response,
};
use drumlin_tests::history::History;
use drumlin_tests::node::{Launch, Node};
use drumlin_tests::skip::skipped;
use drumlin_tests::traffic::{self, Sent};
use tokio_stream::StreamExt;
use tonic::transport::Channel;

const READY: Duration = Duration::from_secs(30);
const LEASE_SECONDS: i64 = 2;

/// The preloaded library that shifts a process's wall clock, where it is installed.
fn faketime_library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?;
    let library = |folder: std::fs::DirEntry| folder.path().join("faketime/libfaketimeMT.so.1");
    folders.flatten().map(library).find(|path| path.is_file())
}

/// Steps the wall clock of the node; its monotonic clock stays true.
fn step(file: &Path, offset: &str) -> Result<()> {
    let next = file.with_extension("next");
    std::fs::write(&next, offset)?;
    Ok(std::fs::rename(next, file)?)
}

fn launch(library: &Path, file: &Path) -> Launch {
    let pairs = [
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", file),
        ("FAKETIME_NO_CACHE", Path::new("1")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", Path::new("1")),
    ];
    let environment =
        pairs.map(|(name, value)| (name.to_owned(), value.to_string_lossy().into_owned()));
    Launch {
        settings: vec!["topics.invisible_min=1s".into()],
        environment: environment.to_vec(),
        ..Launch::default()
    }
}

/// Receives what is due; `None` while everything is leased.
async fn receive(channel: &Channel) -> Result<Option<Message>> {
    let resource = |name: &str| Some(Resource { name: name.into(), ..Resource::default() });
    let request = ReceiveMessageRequest {
        group: resource(traffic::GROUP),
        message_queue: Some(MessageQueue {
            topic: resource(traffic::TOPIC),
            ..MessageQueue::default()
        }),
        filter_expression: Some(FilterExpression {
            expression: "*".into(),
            ..FilterExpression::default()
        }),
        batch_size: 1,
        invisible_duration: Some(prost_types::Duration { seconds: LEASE_SECONDS, nanos: 0 }),
        long_polling_timeout: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        ..ReceiveMessageRequest::default()
    };
    let mut request = tonic::Request::new(request);
    request.metadata_mut().insert("x-mq-client-id", "clock-test".parse()?);
    let mut client = MessagingServiceClient::new(channel.clone());
    let mut frames = client.receive_message(request).await?.into_inner();
    while let Some(frame) = frames.next().await {
        if let Some(receive_message_response::Content::Message(message)) = frame?.content {
            return Ok(Some(message));
        }
    }
    Ok(None)
}

async fn send(channel: &Channel, history: &mut History, value: &str) -> Result<()> {
    let sent = traffic::send_one(channel, value, 100).await?;
    ensure!(matches!(sent, Sent::Acknowledged { .. }), "{sent:?}");
    sent.record(history, value)
}

/// How long a record stays leased, by a clock that does not lie: its first lease was granted in
/// the call before.
async fn lease_ends(channel: &Channel, first: &Message) -> Result<()> {
    let began = Instant::now();
    let again = receive(channel).await?.context("the lease did not end within the poll")?;
    let id = |message: &Message| {
        message.system_properties.as_ref().map(|properties| properties.message_id.clone())
    };
    ensure!(id(&again) == id(first), "{again:?} is another message");
    let attempt = again.system_properties.and_then(|properties| properties.delivery_attempt);
    ensure!(attempt == Some(2), "attempt {attempt:?}");
    ensure!(began.elapsed() < Duration::from_secs(5), "only after {:?}", began.elapsed());
    Ok(())
}

/// `alarm` is what the node must have noticed: a step that was never installed proves nothing.
async fn with_clock_step(offset: &str, alarm: &str) -> Result<()> {
    let Some(library) = faketime_library() else {
        skipped(&format!("clock step {offset}"), "libfaketime is not installed")?;
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("clock");
    step(&file, "+0")?;
    let launch = launch(&library, &file);
    let data_dir = folder.path().join("data");
    let node = Node::start(&data_dir, &launch)?;
    node.wait_ready(READY)?;
    let channel = traffic::connect(&node.broker).await?;
    traffic::create_topic(&channel).await?;
    let mut history = History::default();
    send(&channel, &mut history, "before").await?;
    let first = receive(&channel).await?.context("nothing to receive")?;
    step(&file, offset)?;
    lease_ends(&channel, &first).await?;
    for number in 0..20 {
        send(&channel, &mut history, &format!("after-{number}")).await?;
    }
    check_store_times(&channel).await?;
    let violations = history.check_read(&traffic::read_all(&channel).await?);
    ensure!(violations.is_empty(), "{violations:#?}");
    ensure!(node.log_text()?.contains(alarm), "the node did not notice the step");
    node.stop(READY)?;
    // And once more from the log: the clock goes on from the highest it ever said.
    let node = Node::start(&data_dir, &launch)?;
    node.wait_ready(READY)?;
    let channel = traffic::connect(&node.broker).await?;
    send(&channel, &mut history, "restarted").await?;
    check_store_times(&channel).await?;
    let violations = history.check_read(&traffic::read_all(&channel).await?);
    ensure!(violations.is_empty(), "{violations:#?}");
    node.stop(READY)
}

async fn check_store_times(channel: &Channel) -> Result<()> {
    let mut newest: HashMap<u32, i64> = HashMap::new();
    for (queue, time_ms) in traffic::store_times(channel).await? {
        let before = newest.insert(queue, time_ms).unwrap_or(time_ms);
        ensure!(before <= time_ms, "store time went back from {before} to {time_ms}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_back_of_an_hour_freezes_no_lease() -> Result<()> {
    with_clock_step("-3600", "the wall clock stepped back").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_jump_of_a_year_trims_nothing() -> Result<()> {
    with_clock_step("+1y", "the wall clock stepped forward").await
}
