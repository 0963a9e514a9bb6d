use drumlin_proto::ids::{GroupName, QueueId, TopicId};
use drumlin_proto::record::{RecordFields, RunBuilder};
use proptest::prelude::*;

use super::*;
use crate::command::{GroupId, GroupStart};

fn run(bodies: &[&[u8]]) -> Run {
    let mut builder = RunBuilder::new();
    for (born_ms, body) in (1..).zip(bodies) {
        builder.push(&RecordFields { message_id: "m", born_ms, body, ..RecordFields::default() });
    }
    Run::parse(builder.finish()).unwrap()
}

fn queue(topic: u32, queue: u16) -> QueueKey {
    QueueKey { topic: TopicId::new(topic), queue: QueueId::new(queue) }
}

fn command() -> Command {
    let name = GroupName::parse("g").unwrap();
    Command::CreateGroup { name, start: GroupStart::Earliest }
}

/// A run of two records, a command, a guarded run.
fn payload() -> (Bytes, u32, u32) {
    let mut builder = PayloadBuilder::new();
    builder.push_run(queue(7, 3), &run(&[b"one", b"three"]), 0);
    builder.push_command(&command());
    builder.push_run(queue(7, 4), &run(&[b"x"]), 2);
    builder.finish()
}

#[test]
fn items_come_back_as_they_were_pushed() {
    let (payload, _, count) = payload();
    assert_eq!(count, 3);
    let items: Vec<_> = items(&payload).map(Result::unwrap).collect();
    let [first, second, third] = items.as_slice() else { panic!("three items") };
    assert!(items.iter().all(|item| item.at_bytes.is_multiple_of(8)));

    let ItemView::Run(header) = first.item else { panic!("a run") };
    assert_eq!((first.at_bytes, header.queue_key(), header.guard), (0, queue(7, 3), 0));
    assert_eq!((header.record_count, header.first_born_ms, header.last_born_ms), (2, 1, 2));
    let stored = Run::from_log(payload.slice(..header.run_bytes())).unwrap();
    stored.verify().unwrap();
    let bodies: Vec<_> = stored.records().map(|record| record.body()).collect();
    assert_eq!(bodies, [&b"one"[..], b"three"]);

    let ItemView::Command(stored) = second.item else { panic!("a command") };
    assert_eq!(stored.decode().unwrap(), command());

    let ItemView::Run(header) = third.item else { panic!("a run") };
    assert_eq!((header.queue_key(), header.guard), (queue(7, 4), 2));
}

#[test]
fn the_combined_crc_is_that_of_the_bytes() {
    let (payload, crc, _) = payload();
    assert_eq!(crc, crc32fast::hash(&payload));
    assert_eq!(payload.len() % 8, 0);
    let (empty, crc, count) = PayloadBuilder::new().finish();
    assert_eq!((empty.len(), crc, count), (0, crc32fast::hash(&[]), 0));
}

#[test]
fn a_command_item_keeps_its_bytes() {
    let mut builder = PayloadBuilder::new();
    builder.push_command(&Command::DeleteGroup { group: GroupId(0x0a0b_0c0d) });
    let (payload, ..) = builder.finish();
    let golden = [
        20, 0, 0, 0, 2, 0, 0, 0, // bytes, item kind
        4, 0, 1, 0, 4, 0, 0, 0, // command kind, version, bytes of the archive
        0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0, // archive, padding
    ];
    assert_eq!(payload[..], golden);
}

#[test]
fn runs_of_one_queue_can_be_stored_as_one() {
    let (first, second) = (run(&[b"one"]), run(&[b"two", b"three"]));
    let mut header = first.header().placed(queue(1, 2), 0);
    assert!(header.extend(&second.header().placed(queue(1, 2), 0), usize::MAX));
    let mut builder = PayloadBuilder::new();
    builder.push_records(&header, [first.records_bytes(), second.records_bytes()]);
    let (payload, crc, count) = builder.finish();
    assert_eq!((crc, count), (crc32fast::hash(&payload), 1));
    let merged = Run::from_log(payload).unwrap();
    merged.verify().unwrap();
    assert_eq!(merged.record_count(), 3);
}

#[test]
fn damage_ends_the_items_with_an_error() {
    let (payload, ..) = payload();
    let changed = |at: usize, byte: u8| {
        let mut bytes = payload.to_vec();
        bytes[at] = byte;
        bytes
    };
    let second = usize::try_from(items(&payload).nth(1).unwrap().unwrap().at_bytes).unwrap();
    let error = |bytes: &[u8], ordinal: usize| {
        let mut items = items(bytes);
        let error = items.nth(ordinal).unwrap().unwrap_err();
        assert!(items.next().is_none(), "nothing follows an error");
        error
    };
    assert!(matches!(error(&changed(4, 3), 0), ItemError::Kind { at: 0, kind: 3 }));
    assert!(matches!(error(&changed(16, 0), 0), ItemError::Run { at: 0, .. }));
    assert!(matches!(
        error(&changed(second + 5, 1), 1),
        ItemError::Field { field: "reserved field", .. }
    ));
    assert!(matches!(
        error(&changed(second + 12, 1), 1),
        ItemError::Field { field: "archive size", .. }
    ));
    assert!(matches!(
        error(&changed(payload.len() - 1, 1), 2),
        ItemError::Field { field: "padding", .. } | ItemError::Run { .. }
    ));
    assert!(matches!(error(&payload[..payload.len() - 8], 2), ItemError::Short { .. }));
    assert!(matches!(error(&[0; 8], 0), ItemError::Short { at: 0 }));
    assert!(matches!(error(&[0xff; 64], 0), ItemError::Short { at: 0 }));
}

proptest! {
    #[test]
    fn no_bytes_make_the_iterator_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        // Ends, since each step either fails or goes on by at least one header.
        prop_assert!(items(&bytes).count() <= bytes.len() / 8 + 1);
    }

    #[test]
    fn changed_bytes_never_panic(at in 0usize..300, byte in any::<u8>()) {
        let (payload, ..) = payload();
        let mut bytes = payload.to_vec();
        let at = at % bytes.len();
        bytes[at] = byte;
        for placed in items(&bytes).flatten() {
            if let ItemView::Command(command) = placed.item
                && let Ok(command) = command.decode()
            {
                let (kind, ..) = command::encode(&command);
                prop_assert!(kind > 0);
            }
        }
    }
}
