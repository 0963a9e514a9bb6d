use drumlin_proto::native::{Status, status};
use drumlin_proto::record::Run;
use tokio::sync::oneshot;

use super::super::window::Window;
use super::*;
use crate::Message;

const LINK: LinkId = 1;

struct Bench {
    lane: Lane,
    ledger: Ledger,
    now: Instant,
    next_sequence: u64,
    batching: Batching,
}

type Ack = oneshot::Receiver<Result<Receipt, Error>>;

impl Bench {
    fn new() -> Self {
        let place = Place { topic: "t".into(), broker_group: "a".into(), queue_id: 3 };
        Self {
            lane: Lane::new(place),
            ledger: Ledger::new(Arc::new(Window::new(1 << 20, 1000))),
            now: Instant::now(),
            next_sequence: 1,
            batching: Batching { run_bytes_max: 1000, linger: Duration::ZERO, hurry: false },
        }
    }

    fn push(&mut self, body: &str) -> Ack {
        self.push_message(Message::new("t", body.to_owned()))
    }

    fn push_message(&mut self, message: Message) -> Ack {
        let (ack, receipt) = oneshot::channel();
        let sealed = message.seal(0, || "id".into()).unwrap();
        self.lane.push(Pending {
            record_bytes: sealed.fields().record_bytes(),
            sealed,
            accepted_at: self.now,
            deadline: self.now + Duration::from_secs(10),
            waiter: self.ledger.accept("id".into(), 1, Some(ack)),
            maybe_stored: false,
        });
        receipt
    }

    /// Sends all that may be sent; (sequence, resume, bodies) of each run.
    fn pump(&mut self) -> Vec<(u64, bool, Vec<String>)> {
        let mut sent = Vec::new();
        while self.lane.may_send(LINK, self.now) {
            let Some(run) = self.lane.next_run(&self.batching, self.now) else { break };
            let parsed = Run::parse(run.bytes.clone()).unwrap();
            let text =
                |r: drumlin_proto::record::Record<'_>| String::from_utf8_lossy(r.body()).into();
            let bodies = parsed.records().map(text).collect();
            sent.push((self.next_sequence, self.lane.resume(), bodies));
            self.lane.sent(LINK, self.next_sequence, run);
            self.next_sequence += 1;
        }
        sent
    }

    fn answer(&mut self, sequence: u64, code: status::Code) {
        let answer = ProduceResponse {
            sequence,
            status: Some(Status { code: code.into(), ..Default::default() }),
            queue_id: 3,
            base_offset: sequence * 100,
            ..ProduceResponse::default()
        };
        self.lane.answered(LINK, &answer, self.now, &mut self.ledger);
    }

    fn pass(&mut self, duration: Duration) {
        self.now += duration;
        self.lane.wake(self.now);
        self.lane.expire(self.now, &mut self.ledger);
    }
}

fn bodies(of: &[&str]) -> Vec<String> {
    of.iter().map(ToString::to_string).collect()
}

#[test]
fn batch_forms_behind_the_run_in_flight() {
    let mut bench = Bench::new();
    let mut first = bench.push("1");
    assert_eq!(bench.pump(), [(1, false, bodies(&["1"]))]);
    let (_second, mut third) = (bench.push("2"), bench.push("3"));
    assert_eq!(bench.pump(), []);
    bench.answer(1, status::Code::Ok);
    assert_eq!(first.try_recv().unwrap().unwrap().offset, QueueOffset::new(100));
    assert_eq!(bench.pump(), [(2, false, bodies(&["2", "3"]))]);
    bench.answer(2, status::Code::Ok);
    assert_eq!(third.try_recv().unwrap().unwrap().offset, QueueOffset::new(201));
}

#[test]
fn full_batches_do_not_wait_for_an_answer() {
    let mut bench = Bench::new();
    let body = "x".repeat(700);
    let _acks: Vec<_> = (0..8).map(|_| bench.push(&body)).collect();
    assert_eq!(bench.pump().len(), RUNS_IN_FLIGHT_MAX);
}

#[test]
fn failed_run_and_those_behind_it_go_again_in_order() {
    let mut bench = Bench::new();
    let body = |n: u32| format!("{n}{}", "x".repeat(960));
    let mut acks: Vec<_> = (0..3).map(|n| bench.push(&body(n))).collect();
    assert_eq!(bench.pump().len(), 3);
    bench.answer(1, status::Code::Busy);
    bench.answer(2, status::Code::OutOfOrder);
    assert_eq!(bench.pump(), [], "one is still in flight");
    bench.answer(3, status::Code::OutOfOrder);
    assert_eq!(bench.pump(), [], "a pause comes first");
    bench.pass(Duration::from_millis(100));
    let again = bench.pump();
    let resumes: Vec<_> = again.iter().map(|(_, resume, _)| *resume).collect();
    assert_eq!(resumes, [true, false, false]);
    let order: Vec<_> = again.iter().flat_map(|(_, _, bodies)| bodies.clone()).collect();
    assert_eq!(order, [body(0), body(1), body(2)]);
    for sequence in 4..7 {
        bench.answer(sequence, status::Code::Ok);
    }
    for (ack, offset) in acks.iter_mut().zip([400, 500, 600]) {
        assert_eq!(ack.try_recv().unwrap().unwrap().offset, QueueOffset::new(offset));
    }
}

#[test]
fn refused_run_fails_and_the_next_one_resumes() {
    let mut bench = Bench::new();
    let mut refused = bench.push("1");
    bench.pump();
    let _next = bench.push("2");
    bench.answer(1, status::Code::InvalidArgument);
    assert_eq!(refused.try_recv().unwrap().unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(bench.pump(), [(2, true, bodies(&["2"]))]);
}

#[test]
fn broken_stream_sends_what_it_held_again() {
    let mut bench = Bench::new();
    let _ack = bench.push("1");
    bench.pump();
    bench.lane.link_down(LINK, true, "gone", bench.now);
    bench.pass(Duration::from_millis(100));
    assert_eq!(bench.pump(), [(2, false, bodies(&["1"]))]);
}

#[test]
fn only_what_is_surely_not_stored_moves_to_another_queue() {
    let mut bench = Bench::new();
    let _ack = bench.push("1");
    bench.pump();
    bench.lane.link_down(LINK, true, "gone", bench.now);
    let _ack = bench.push("2");
    let _ack = bench.push_message(Message::new("t", "3").message_group("g"));
    let (runs, messages) = bench.lane.give_away();
    assert_eq!((runs.len(), messages.len()), (0, 1), "the run may be stored");

    let mut bench = Bench::new();
    let _ack = bench.push("1");
    bench.pump();
    bench.lane.link_down(LINK, false, "refused", bench.now);
    assert_eq!(bench.lane.give_away().0.len(), 1, "nothing arrived");

    let mut bench = Bench::new();
    let _ack = bench.push_message(Message::new("t", "3").message_group("g"));
    bench.pump();
    bench.lane.link_down(LINK, false, "refused", bench.now);
    assert_eq!(bench.lane.give_away().0.len(), 0, "its group's order is in this queue");
}

#[test]
fn deadline_tells_whether_it_may_be_stored() {
    let mut bench = Bench::new();
    let mut sent = bench.push("1");
    bench.pump();
    let mut waiting = bench.push("2");
    bench.pass(Duration::from_secs(10));
    assert_eq!(waiting.try_recv().unwrap().unwrap_err().code(), Code::DeadlineExceeded);
    assert!(sent.try_recv().is_err(), "its answer may be on its way");
    bench.pass(ANSWER_GRACE);
    assert_eq!(sent.try_recv().unwrap().unwrap_err().code(), Code::UnknownOutcome);
    bench.answer(1, status::Code::Busy);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.pump(), [], "given up, so not sent again");
    assert_eq!(bench.ledger.outstanding(), 0);
}

#[test]
fn deadline_also_ends_what_came_back_while_others_are_in_flight() {
    let mut bench = Bench::new();
    let body = "x".repeat(960);
    let mut acks: Vec<_> = (0..3).map(|_| bench.push(&body)).collect();
    assert_eq!(bench.pump().len(), 3);
    bench.answer(1, status::Code::Busy);
    bench.answer(2, status::Code::UnknownOutcome);
    bench.pass(Duration::from_secs(10));
    let code = |ack: &mut Ack| ack.try_recv().map(|settled| settled.unwrap_err().code());
    assert_eq!(code(&mut acks[0]), Ok(Code::DeadlineExceeded));
    assert_eq!(code(&mut acks[1]), Ok(Code::UnknownOutcome));
    assert!(code(&mut acks[2]).is_err(), "its answer may be on its way");
    bench.answer(3, status::Code::OutOfOrder);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.pump(), [], "given up, so not sent again");
    assert_eq!(bench.ledger.outstanding(), 0);
}

#[test]
fn late_message_does_not_take_those_with_time_left_along() {
    let mut bench = Bench::new();
    let _sent = bench.push("1");
    bench.pump();
    let mut late = bench.push("2");
    bench.pass(Duration::from_millis(9900));
    let mut early = bench.push("3");
    bench.answer(1, status::Code::Ok);
    assert_eq!(bench.pump(), [(2, false, bodies(&["2"]))]);
    bench.pass(Duration::from_secs(2));
    assert_eq!(late.try_recv().unwrap().unwrap_err().code(), Code::UnknownOutcome);
    assert!(early.try_recv().is_err());
    bench.answer(2, status::Code::DeadlineExceeded);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.pump(), [(3, true, bodies(&["3"]))]);
}

#[test]
fn linger_waits_for_company_but_not_for_a_flush() {
    let mut bench = Bench::new();
    bench.batching.linger = Duration::from_millis(50);
    let _ack = bench.push("1");
    assert_eq!(bench.pump(), []);
    bench.batching.hurry = true;
    assert_eq!(bench.pump().len(), 1);
    bench.answer(1, status::Code::Ok);
    bench.batching.hurry = false;
    let _ack = bench.push("2");
    assert_eq!(bench.pump(), []);
    bench.pass(Duration::from_millis(50));
    assert_eq!(bench.pump().len(), 1);
}

#[test]
fn closing_fails_everything() {
    let mut bench = Bench::new();
    let mut acks = vec![bench.push("1")];
    bench.pump();
    acks.push(bench.push("2"));
    bench.lane.close(&mut bench.ledger);
    for ack in &mut acks {
        assert_eq!(ack.try_recv().unwrap().unwrap_err(), Error::Closed);
    }
    assert_eq!(bench.ledger.outstanding(), 0);
}
