//! Reads all queues of a broker group as their records come.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use drumlin_proto::record::RunError;

use super::native::{Fetched, Fetcher, connect};
use super::{RETRY_PAUSE, Shared};
use crate::event::{Queue, Step, What};

/// Silence after which another node is asked.
const SILENCE_MAX: Duration = Duration::from_secs(2);

pub(super) async fn run(shared: Arc<Shared>, group: String) -> Result<()> {
    let process = shared.recorder.new_process();
    let mut next: Vec<(u32, u64)> = (0..shared.mix.queue_count).map(|id| (id, 0)).collect();
    let nodes = shared.nodes(&group).to_vec();
    for (_, address) in nodes.iter().cycle() {
        if shared.stop.is_cancelled() {
            break;
        }
        let fetcher = match connect(address).await {
            Ok(channel) => Fetcher::open(channel, &shared.mix.topic, &next).await,
            Err(error) => Err(error),
        };
        let Ok(mut fetcher) = fetcher else {
            shared.pause(RETRY_PAUSE).await;
            continue;
        };
        loop {
            let fetched = match shared.stop.run_until_cancelled(fetcher.next(SILENCE_MAX)).await {
                Some(Ok(Some(fetched))) => fetched,
                // Who does not lead says so; what it does send is whole.
                Some(Err(error)) if error.is::<RunError>() => {
                    println!("a reader of {group} got a damaged run from {address}: {error}");
                    return Err(error);
                }
                Some(Ok(None) | Err(_)) | None => break,
            };
            let queue = shared.queue(&group, fetched.queue);
            let position = next.iter_mut().find(|(id, _)| *id == fetched.queue);
            if let Some((_, position)) = position {
                go_on(&shared, &queue, position, &fetched);
            }
            if fetched.seen.is_empty() {
                continue;
            }
            // What was there when it was asked for is of no matter, only that it was there.
            let asked = What::Read { queue: queue.clone(), seen: Vec::new() };
            shared.recorder.record(process, Step::Invoke, asked);
            shared.recorder.record(process, Step::Ok, What::Read { queue, seen: fetched.seen });
        }
        shared.pause(RETRY_PAUSE).await;
    }
    Ok(())
}

/// Moves the position behind what came, which must begin at it and leave nothing out.
fn go_on(shared: &Shared, queue: &Queue, position: &mut u64, fetched: &Fetched) {
    let starts = fetched.seen.is_empty().then_some(fetched.next).flatten();
    let offsets = starts.into_iter().chain(fetched.seen.iter().map(|seen| seen.offset));
    let mut expected = *position;
    for offset in offsets {
        if offset != expected {
            let queue = queue.clone();
            shared.recorder.note(What::Skipped { queue, expected, offset });
        }
        expected = if fetched.seen.is_empty() { offset } else { offset + 1 };
    }
    *position = expected;
    shared.read.lock().insert(queue.clone(), expected);
}
