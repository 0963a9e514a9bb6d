//! What waited together becomes the items of one entry, and its outcomes find their way back.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use drumlin_proto::ids::QueueKey;
use drumlin_proto::record::RunHeader;

use super::{Content, ENTRY_BYTES_MAX, MERGED_BYTES_MAX, Reply, Ticket, Waiting};
use crate::command::Refusal;
use crate::entry::EntryKind;
use crate::item::PayloadBuilder;
use crate::replica::raft_types::Payload;
use crate::replica::{Applied, ProposeError};

/// One item of an entry and who waits for it.
#[derive(Debug)]
pub(super) enum Piece {
    Runs { header: RunHeader, records: Vec<Bytes>, replies: Vec<(u64, Reply)> },
    Command { item: Bytes, reply: Reply },
}

/// Runs of one queue become one item, unless a command lies between them: what a command finds must
/// not depend on what waited with it.
pub(super) fn merge(items: Vec<Waiting>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(items.len());
    let mut open: HashMap<QueueKey, usize> = HashMap::new();
    for waiting in items {
        match waiting.content {
            Content::Command(item) => {
                open.clear();
                pieces.push(Piece::Command { item, reply: waiting.reply });
            }
            Content::Run { queue, run } => {
                let count = u64::from(run.record_count());
                let header = run.header().placed(queue, 0);
                let open_piece = open.get(&queue).and_then(|at| pieces.get_mut(*at));
                if let Some(Piece::Runs { header: merged, records, replies }) = open_piece
                    && merged.extend(&header, MERGED_BYTES_MAX)
                {
                    records.push(run.records_bytes());
                    replies.push((count, waiting.reply));
                } else {
                    open.insert(queue, pieces.len());
                    let records = vec![run.records_bytes()];
                    pieces.push(Piece::Runs {
                        header,
                        records,
                        replies: vec![(count, waiting.reply)],
                    });
                }
            }
        }
    }
    pieces
}

/// Who waits for one item of a proposed entry.
#[derive(Debug)]
pub(super) enum Replies {
    /// Record counts of the runs that were merged, in order.
    Runs(Vec<(u64, Reply)>),
    Command(Reply),
}

impl Replies {
    pub(super) fn fail(self, error: &ProposeError) {
        match self {
            Self::Runs(replies) => {
                for (_, reply) in replies {
                    reply.fail(error.clone());
                }
            }
            Self::Command(reply) => reply.fail(error.clone()),
        }
    }

    /// `degraded`: there is one copy only.
    pub(super) fn answer(self, outcome: Result<Applied, Refusal>, degraded: bool) {
        let applied = match outcome {
            Ok(applied) => applied,
            Err(refusal) => return self.fail(&ProposeError::Refused(refusal)),
        };
        match (self, applied) {
            (Self::Runs(replies), Applied::Run { mut base_offset, store_time_ms, .. }) => {
                for (records, reply) in replies {
                    if degraded && reply.needs_two {
                        // The second copy may come, or this one may be lost.
                        reply.fail(ProposeError::UnknownOutcome);
                    } else {
                        reply.send(Ok(Applied::Run { base_offset, store_time_ms, degraded }));
                    }
                    base_offset = base_offset.advance(records);
                }
            }
            (Self::Command(reply), applied @ Applied::Command(_)) => reply.send(Ok(applied)),
            (replies, applied) => panic!("{applied:?} answers {replies:?}"),
        }
    }
}

/// The payload of an entry, and who waits for each of its items.
pub(super) fn build(
    pieces: Vec<Piece>,
    clock_ms: u64,
    ticket: Arc<Ticket>,
) -> (Payload, Vec<Replies>) {
    let mut builder = PayloadBuilder::new();
    let mut replies = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match piece {
            Piece::Runs { header, records, replies: waiting } => {
                builder.push_records(&header, records);
                replies.push(Replies::Runs(waiting));
            }
            Piece::Command { item, reply } => {
                builder.push_encoded(item);
                replies.push(Replies::Command(reply));
            }
        }
    }
    let (payload, payload_crc, item_count) = builder.finish();
    assert_eq!(usize::try_from(item_count).ok(), Some(replies.len()), "an item for each piece");
    assert!(payload.len() <= ENTRY_BYTES_MAX, "{} bytes were gathered", payload.len());
    let payload = Payload {
        kind: EntryKind::Batch,
        clock_ms,
        item_count,
        payload_crc,
        payload,
        ticket: Some(ticket),
    };
    (payload, replies)
}
