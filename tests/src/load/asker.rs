//! Commits offsets, and asks for them and for the ends of queues.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use drumlin_proto::native::status::Code;
use tonic::transport::Channel;

use super::native::{commit, committed, connect, ends};
use super::{RETRY_PAUSE, Shared};
use crate::event::{Process, Queue, Step, What};

const CONSUMERS: &str = "auditor";
/// Between two rounds.
const ROUND_PAUSE: Duration = Duration::from_millis(50);

pub(super) async fn run(shared: Arc<Shared>, group: String) -> Result<()> {
    let mut asker = Asker {
        process: shared.recorder.new_process(),
        next: vec![0; usize::try_from(shared.mix.queue_count)?],
        group,
        shared,
    };
    let nodes = asker.shared.nodes(&asker.group).to_vec();
    for (_, address) in nodes.iter().cycle() {
        if asker.shared.stop.is_cancelled() {
            break;
        }
        if let Ok(channel) = connect(address).await {
            while !asker.shared.stop.is_cancelled() && asker.round(&channel).await {
                asker.shared.pause(ROUND_PAUSE).await;
            }
        }
        asker.shared.pause(RETRY_PAUSE).await;
    }
    Ok(())
}

struct Asker {
    shared: Arc<Shared>,
    group: String,
    process: Process,
    /// What is committed next of each queue.
    next: Vec<u64>,
}

impl Asker {
    /// False where this node does not answer as a leader does.
    async fn round(&mut self, channel: &Channel) -> bool {
        let topic = self.shared.mix.topic.clone();
        let Some(ends) = self.ask_ends(channel, &topic).await else { return false };
        for (queue, end) in ends {
            if !self.commit_next(channel, &queue, end).await
                || !self.ask_committed(channel, &queue).await
            {
                return false;
            }
        }
        true
    }

    /// One call answers for all queues; each gets lines of its own.
    async fn ask_ends(&self, channel: &Channel, topic: &str) -> Option<Vec<(Queue, u64)>> {
        let recorder = &self.shared.recorder;
        let queues: Vec<(Process, Queue)> = (0..self.shared.mix.queue_count)
            .map(|id| (recorder.new_process(), self.shared.queue(&self.group, id)))
            .collect();
        for (process, queue) in &queues {
            let what = What::MaxOffset { queue: queue.clone(), offset: None };
            recorder.record(*process, Step::Invoke, what);
        }
        let answer = ends(channel, topic).await.ok();
        let mut found = Vec::new();
        for (process, queue) in queues {
            let end = answer.as_ref().and_then(|ends| {
                let mut ends = ends.iter();
                let of_queue =
                    |end: &&(String, u32, u64)| *end.0 == *queue.group && end.1 == queue.id;
                ends.find(of_queue).map(|end| end.2)
            });
            // An answer that leaves a queue out says that nothing is there.
            let step = if answer.is_some() { Step::Ok } else { Step::Fail };
            let what = What::MaxOffset { queue: queue.clone(), offset: end };
            recorder.record(process, step, what);
            found.extend(end.map(|end| (queue, end)));
        }
        (!found.is_empty()).then_some(found)
    }

    async fn commit_next(&mut self, channel: &Channel, queue: &Queue, end: u64) -> bool {
        let Ok(at) = usize::try_from(queue.id) else { return false };
        let offset = self.next[at] + 1;
        if offset > end {
            return true;
        }
        let what = || What::Commit { consumers: CONSUMERS.into(), queue: queue.clone(), offset };
        let recorder = &self.shared.recorder;
        recorder.record(self.process, Step::Invoke, what());
        let answer = commit(channel, CONSUMERS, queue, offset).await;
        let step = match answer.as_ref().map(drumlin_proto::native::Status::code) {
            Ok(Code::Ok) => Step::Ok,
            Ok(Code::UnknownOutcome | Code::Internal) | Err(_) => Step::Info,
            Ok(_) => Step::Fail,
        };
        recorder.record(self.process, step, what());
        match step {
            Step::Ok => self.next[at] = offset,
            // It may yet arrive: the next one lies behind it.
            Step::Info => {
                self.next[at] = offset;
                self.process = recorder.new_process();
            }
            Step::Fail | Step::Invoke => {}
        }
        step == Step::Ok
    }

    async fn ask_committed(&self, channel: &Channel, queue: &Queue) -> bool {
        let what =
            |offset| What::Committed { consumers: CONSUMERS.into(), queue: queue.clone(), offset };
        let recorder = &self.shared.recorder;
        recorder.record(self.process, Step::Invoke, what(None));
        let answer = committed(channel, CONSUMERS, queue).await;
        match answer {
            Ok(offset) => {
                recorder.record(self.process, Step::Ok, what(offset));
                true
            }
            Err(_) => {
                recorder.record(self.process, Step::Fail, what(None));
                false
            }
        }
    }
}
