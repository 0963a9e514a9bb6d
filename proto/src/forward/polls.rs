//! Polls that another process does: the frames that a client gets, whatever becomes of that process.

use futures::Stream;
use futures::stream::unfold;
use prost_types::Timestamp;
use tonic::{Status, Streaming};

use crate::rocketmq::receive_message_response::Content;
use crate::rocketmq::{ReceiveMessageResponse, Status as Told};

type Frames = Streaming<ReceiveMessageResponse>;

/// How far a poll is.
enum Part {
    /// The client has got nothing yet.
    Begun(Frames),
    /// It has got frames, which it must keep.
    Passing(Frames),
    /// It was told why nothing comes.
    Refused,
    Ended,
}

/// The frames of a poll. While none has passed, a poll whose process goes away is begun `again`,
/// until that fails; later it ends as one that timed out, so that what came is kept and the client
/// asks for more. `now` stamps the end.
pub fn frames<A, F>(
    first: Frames,
    again: A,
    now: impl Fn() -> Timestamp + Send + Sync,
) -> impl Stream<Item = Result<ReceiveMessageResponse, Status>> + Send
where
    A: Fn() -> F + Send + Sync,
    F: Future<Output = Result<Frames, Told>> + Send,
{
    unfold((Part::Begun(first), again, now), |(part, again, now)| async move {
        let (frame, part) = next(part, &again, &now).await?;
        Some((Ok(frame), (part, again, now)))
    })
}

async fn next<A, F>(
    mut part: Part,
    again: &A,
    now: &impl Fn() -> Timestamp,
) -> Option<(ReceiveMessageResponse, Part)>
where
    A: Fn() -> F,
    F: Future<Output = Result<Frames, Told>>,
{
    let frame = |content| ReceiveMessageResponse { content: Some(content) };
    let end = || frame(Content::DeliveryTimestamp(now()));
    loop {
        let (mut frames, passing) = match part {
            Part::Begun(frames) => (frames, false),
            Part::Passing(frames) => (frames, true),
            Part::Refused => return Some((end(), Part::Ended)),
            Part::Ended => return None,
        };
        match frames.message().await {
            Ok(Some(frame)) => {
                let last = matches!(frame.content, Some(Content::DeliveryTimestamp(_)));
                return Some((frame, if last { Part::Ended } else { Part::Passing(frames) }));
            }
            Ok(None) | Err(_) if passing => return Some((end(), Part::Ended)),
            Ok(None) => return None,
            Err(error) => tracing::debug!(%error, "begins a poll again, who had it went away"),
        }
        part = match again().await {
            Ok(frames) => Part::Begun(frames),
            Err(status) => return Some((frame(Content::Status(status)), Part::Refused)),
        };
    }
}
