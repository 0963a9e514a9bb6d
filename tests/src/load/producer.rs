//! Sends one value after the other to a broker group, at whichever node takes them.

use std::sync::Arc;

use anyhow::Result;
use drumlin_proto::native::status::Code;

use super::native::{Sender, Sent, connect};
use super::{RETRY_PAUSE, Shared};
use crate::event::{Process, Queue, Step, What};

pub(super) async fn run(shared: Arc<Shared>, group: String, number: usize) -> Result<()> {
    let mut process = shared.recorder.new_process();
    let bytes = shared.mix.body_bytes * (number + 1);
    let nodes = shared.nodes(&group).to_vec();
    let mut count: u64 = 0;
    for (_, address) in nodes.iter().cycle() {
        if shared.sent_enough.is_cancelled() {
            break;
        }
        let sender = match connect(address).await {
            Ok(channel) => Sender::open(channel).await,
            Err(error) => Err(error),
        };
        let Ok(mut sender) = sender else {
            shared.pause(RETRY_PAUSE).await;
            continue;
        };
        while !shared.sent_enough.is_cancelled() {
            count += 1;
            let id = u32::try_from(count % u64::from(shared.mix.queue_count))?;
            let value = format!("p{process}-{count}");
            let queue = shared.queue(&group, id);
            match send(&shared, process, &mut sender, &value, queue, bytes).await {
                Sent::Stored { .. } => shared.pause(shared.mix.pause).await,
                Sent::Refused { code: Code::Busy, .. } => shared.pause(RETRY_PAUSE).await,
                Sent::Refused { .. } => break,
                Sent::Unknown { .. } => {
                    process = shared.recorder.new_process();
                    break;
                }
            }
        }
        shared.pause(RETRY_PAUSE).await;
    }
    Ok(())
}

async fn send(
    shared: &Shared,
    process: Process,
    sender: &mut Sender,
    value: &str,
    queue: Queue,
    bytes: usize,
) -> Sent {
    let what = |place: Option<(Queue, u64)>, degraded| {
        let (queue, offset) = place.unzip();
        What::Send { value: value.to_owned(), queue, offset, degraded, repeats: false }
    };
    shared.recorder.record(process, Step::Invoke, what(None, false));
    let sent = sender.send(&shared.mix.topic, queue.id, value, bytes).await;
    let (step, what) = match &sent {
        Sent::Stored { queue: id, offset, degraded } => {
            let stored = shared.queue(&queue.group, *id);
            (Step::Ok, what(Some((stored, *offset)), *degraded))
        }
        Sent::Refused { .. } => (Step::Fail, what(None, false)),
        Sent::Unknown { .. } => (Step::Info, what(None, false)),
    };
    shared.recorder.record(process, step, what);
    sent
}
