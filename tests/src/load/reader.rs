//! Reads all queues of a broker group as their records come.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::native::{Fetcher, connect};
use super::{RETRY_PAUSE, Shared};
use crate::event::{Step, What};

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
        while let Some(Ok(Some(fetched))) =
            shared.stop.run_until_cancelled(fetcher.next(SILENCE_MAX)).await
        {
            let queue = shared.queue(&group, fetched.queue);
            if let Some((_, position)) = next.iter_mut().find(|(id, _)| *id == fetched.queue) {
                *position = fetched.next.unwrap_or(*position);
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
