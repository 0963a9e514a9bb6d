use drumlin_proto::ids::{QueueId, QueueOffset, TopicId};
use drumlin_proto::record::{RecordFields, RunBuilder};
use futures::FutureExt;

use super::*;
use crate::command::{Command, GroupId, LeaseId, Outcome};
use crate::item::ItemView;
use crate::replica::raft_types::Payload;

type Answer = oneshot::Receiver<Result<Applied, ProposeError>>;

fn queue(number: u16) -> QueueKey {
    QueueKey { topic: TopicId::new(1), queue: QueueId::new(number) }
}

fn run(bodies: &[&[u8]]) -> Run {
    let mut builder = RunBuilder::new();
    for body in bodies {
        builder.push(&RecordFields { message_id: "m", body, ..Default::default() });
    }
    Run::parse(builder.finish()).unwrap()
}

fn waiting(item: Item) -> (Waiting, Answer) {
    let permits = Arc::new(Semaphore::new(1));
    let (sender, answer) = oneshot::channel();
    let reply = Reply {
        sender,
        link: None,
        needs_two: false,
        _in_flight: permits.try_acquire_owned().unwrap(),
    };
    (Waiting { content: item.into(), since: Instant::now(), deadline: None, reply }, answer)
}

fn run_item(number: u16, bodies: &[&[u8]]) -> (Waiting, Answer) {
    waiting(Item::Run { queue: queue(number), run: run(bodies) })
}

fn command_item() -> (Waiting, Answer) {
    waiting(Item::Command(Command::DeleteTopic { topic: TopicId::new(9) }))
}

fn handle(bytes_max: usize) -> (ProposerHandle, mpsc::UnboundedReceiver<Waiting>) {
    let (queue, waiting) = mpsc::unbounded_channel();
    let (_, refused) = watch::channel(None);
    let handle = ProposerHandle {
        queue,
        permits: Arc::new(Semaphore::new(bytes_max)),
        bytes_max: u64::try_from(bytes_max).unwrap(),
        refused,
        stop: CancellationToken::new(),
    };
    (handle, waiting)
}

/// As large as a consumer's request makes them.
fn ack(record_count: u64) -> Item {
    let records = (0..record_count).map(|n| (QueueOffset::new(n), LeaseId(n))).collect();
    Item::Command(Command::Ack { group: GroupId(1), queue: queue(0), records })
}

fn linked(chain: &Chain, (mut waiting, answer): (Waiting, Answer)) -> (Waiting, Answer) {
    waiting.reply.link = Some(chain.next_link());
    (waiting, answer)
}

fn ticket() -> Arc<Ticket> {
    let window = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
    Arc::new(Ticket::new(window))
}

/// Queue and record count of each run; `None` for commands.
fn contents(payload: &Payload) -> Vec<Option<(u16, u32)>> {
    let items = item::items(&payload.payload).map(|placed| match placed.unwrap().item {
        ItemView::Run(header) => Some((header.queue.get(), header.record_count)),
        ItemView::Command(_) => None,
    });
    items.collect()
}

#[test]
fn runs_of_a_queue_become_one_item_and_its_offsets_are_told_apart() {
    let (first, mut first_answer) = run_item(0, &[b"a", b"b"]);
    let (other, mut other_answer) = run_item(1, &[b"x"]);
    let (second, mut second_answer) = run_item(0, &[b"c"]);
    let (payload, replies) = build(merge(vec![first, other, second]), 5, ticket());
    assert_eq!(contents(&payload), [Some((0, 3)), Some((1, 1))]);
    assert_eq!(payload.payload_crc, crc32fast::hash(&payload.payload));
    assert_eq!((payload.clock_ms, payload.item_count), (5, 2));
    let at = |offset| Applied::Run {
        base_offset: QueueOffset::new(offset),
        store_time_ms: 5,
        degraded: false,
    };
    for (reply, offset) in replies.into_iter().zip([70, 90]) {
        reply.answer(Ok(at(offset)), false);
    }
    assert_eq!(first_answer.try_recv().unwrap().unwrap(), at(70));
    assert_eq!(second_answer.try_recv().unwrap().unwrap(), at(72));
    assert_eq!(other_answer.try_recv().unwrap().unwrap(), at(90));
}

#[test]
fn runs_are_not_merged_across_a_command() {
    let items = [run_item(0, &[b"a"]), command_item(), run_item(0, &[b"b"])];
    let (items, mut answers): (Vec<_>, Vec<_>) = items.into_iter().unzip();
    let (payload, replies) = build(merge(items), 0, ticket());
    assert_eq!(contents(&payload), [Some((0, 1)), None, Some((0, 1))]);
    let outcomes = [
        Err(Refusal::QueueNotFound),
        Ok(Applied::Command(Outcome::Done)),
        Err(Refusal::TopicNotFound),
    ];
    for (reply, outcome) in replies.into_iter().zip(outcomes) {
        reply.answer(outcome, false);
    }
    let told: Vec<_> = answers.iter_mut().map(|answer| answer.try_recv().unwrap()).collect();
    assert!(matches!(told[0], Err(ProposeError::Refused(Refusal::QueueNotFound))));
    assert!(matches!(told[1], Ok(Applied::Command(Outcome::Done))));
    assert!(matches!(told[2], Err(ProposeError::Refused(Refusal::TopicNotFound))));
}

#[test]
fn merged_runs_stay_below_their_limit() {
    let body = vec![b'x'; 100 << 10];
    let items = (0..6).map(|_| run_item(0, &[&body]).0).collect();
    let (payload, _) = build(merge(items), 0, ticket());
    assert_eq!(contents(&payload), [Some((0, 2)), Some((0, 2)), Some((0, 2))]);
}

#[tokio::test]
async fn what_waited_too_long_is_not_proposed() {
    let now = Instant::now();
    let (mut late, mut late_answer) = run_item(0, &[b"a"]);
    let (mut timely, _timely_answer) = run_item(0, &[b"b"]);
    late.deadline = Some(now);
    timely.deadline = Some(now + Duration::from_millis(1));
    assert_eq!(admit(vec![late, timely], now, None, None).len(), 1);
    assert!(matches!(late_answer.try_recv().unwrap(), Err(ProposeError::Expired)));
}

#[tokio::test]
async fn full_disk_refuses_runs_and_lets_commands_pass() {
    let (run, mut run_answer) = run_item(0, &[b"a"]);
    let (command, _command_answer) = command_item();
    let admitted = admit(vec![run, command], Instant::now(), Some("91 %"), None);
    assert!(matches!(admitted[..], [Waiting { content: Content::Command(_), .. }]));
    assert!(matches!(run_answer.try_recv().unwrap(), Err(ProposeError::DiskFull(_))));
}

#[tokio::test]
async fn a_broken_chain_stops_what_follows_and_nothing_before() {
    let chain = Chain::default();
    let now = Instant::now();
    let link = |item| linked(&chain, item);
    let (before, _before_answer) = link(run_item(0, &[b"1"]));
    let (mut late, mut late_answer) = link(run_item(0, &[b"2"]));
    let (after, mut after_answer) = link(run_item(0, &[b"3"]));
    let (other, _other_answer) = run_item(0, &[b"other"]);
    late.deadline = Some(now);
    assert_eq!(admit(vec![before, late, after, other], now, None, None).len(), 2);
    assert!(matches!(late_answer.try_recv().unwrap(), Err(ProposeError::Expired)));
    assert!(matches!(after_answer.try_recv().unwrap(), Err(ProposeError::OutOfOrder)));
}

#[tokio::test]
async fn more_than_the_allowed_bytes_in_flight_is_busy() {
    let (handle, mut items) = handle(1000);
    let body = [b'x'; 300];
    let item = || Item::Run { queue: self::queue(0), run: run(&[&body]) };
    let _waits = handle.propose(item(), None, None);
    let in_flight = handle.in_flight_bytes();
    assert!(in_flight > 300);
    let refused = handle.propose(item(), None, None).await;
    assert!(matches!(refused, Err(ProposeError::Busy { waiting_bytes, bytes_max: 1000 })
        if waiting_bytes == in_flight));
    drop(items.try_recv().unwrap());
    assert_eq!(handle.in_flight_bytes(), 0);
}

#[tokio::test]
async fn large_commands_close_an_entry_and_count_as_in_flight() {
    let (handle, waiting) = handle(64 << 20);
    let answers: Vec<_> = (0..300).map(|_| handle.propose(ack(4096), None, None)).collect();
    assert!(handle.in_flight_bytes() > 300 * 4096 * 16);
    let mut backlog = Backlog::of(waiting);
    let mut entries = 0;
    while backlog.filled().now_or_never().is_some() {
        let (payload, _) = build(merge(backlog.gather()), 0, ticket());
        assert!(payload.payload.len() < ENTRY_BYTES_TARGET + (70 << 10));
        entries += 1;
    }
    assert!(entries >= 60, "{entries} entries");
    drop(answers);
}

#[tokio::test]
async fn an_item_that_no_entry_can_hold_is_refused() {
    let (handle, _waiting) = handle(64 << 20);
    let refused = handle.propose(ack(1 << 19), None, None).await;
    assert!(matches!(refused, Err(ProposeError::Refused(Refusal::Malformed { .. }))));
    assert_eq!(handle.in_flight_bytes(), 0);
}

#[tokio::test]
async fn what_expires_before_there_is_room_is_answered_and_the_rest_keeps_its_order() {
    let (handle, waiting) = handle(1 << 20);
    let mut backlog = Backlog::of(waiting);
    let now = Instant::now();
    let item = |body: &[u8]| Item::Run { queue: queue(0), run: run(&[body]) };
    let chain = Chain::default();
    let first = handle.propose(item(b"1"), None, None);
    let late = handle.propose(item(b"2"), Some(now), Some(&chain));
    let behind = handle.propose(item(b"3"), None, Some(&chain));
    backlog.sweep(now, None);
    let last = handle.propose(item(b"4"), None, None);
    assert!(matches!(late.now_or_never(), Some(Err(ProposeError::Expired))));
    assert!(matches!(behind.now_or_never(), Some(Err(ProposeError::OutOfOrder))));
    let gathered = backlog.gather();
    let bodies: Vec<_> = gathered
        .iter()
        .map(|waiting| match &waiting.content {
            Content::Run { run, .. } => run.records().next().unwrap().body().to_vec(),
            Content::Command(_) => unreachable!("runs were proposed"),
        })
        .collect();
    assert_eq!(bodies, [b"1", b"4"]);
    assert!(first.now_or_never().is_none() && last.now_or_never().is_none());
}

#[tokio::test]
async fn a_run_of_unknown_outcome_stops_what_follows_it_in_its_chain() {
    let now = Instant::now();
    for error in [ProposeError::UnknownOutcome, ProposeError::NotLeader { leader: None }] {
        let chain = Chain::default();
        let (first, _first_answer) = linked(&chain, run_item(0, &[b"1"]));
        let (second, mut second_answer) = linked(&chain, run_item(0, &[b"2"]));
        let first = admit(vec![first], now, None, Some(Term::new(1)));
        let (_, replies) = build(merge(first), 0, ticket());
        replies.into_iter().for_each(|reply| reply.fail(&error));
        assert!(admit(vec![second], now, None, Some(Term::new(1))).is_empty());
        assert!(matches!(second_answer.try_recv().unwrap(), Err(ProposeError::OutOfOrder)));
    }
}

#[tokio::test]
async fn a_chain_does_not_go_on_in_another_term() {
    let now = Instant::now();
    let chain = Chain::default();
    let (first, _first_answer) = linked(&chain, run_item(0, &[b"1"]));
    let (second, _second_answer) = linked(&chain, run_item(0, &[b"2"]));
    let (third, mut third_answer) = linked(&chain, run_item(0, &[b"3"]));
    assert_eq!(admit(vec![first, second], now, None, Some(Term::new(3))).len(), 2);
    assert!(admit(vec![third], now, None, Some(Term::new(5))).is_empty());
    assert!(matches!(third_answer.try_recv().unwrap(), Err(ProposeError::OutOfOrder)));
}
