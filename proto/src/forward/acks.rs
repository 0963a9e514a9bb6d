//! Acknowledgements of one request that belong to several broker groups: taken apart by their receipt
//! handles and put together again. Pure.

use std::collections::BTreeMap;

use crate::rocketmq::{AckMessageRequest, AckMessageResponse, AckMessageResultEntry, Code, Status};

/// Places of a request's entries, by the broker group that owns them.
pub fn parts(
    ack: &AckMessageRequest,
    owner: impl Fn(&str) -> String,
) -> BTreeMap<String, Vec<usize>> {
    let mut parts: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (at, entry) in ack.entries.iter().enumerate() {
        parts.entry(owner(&entry.receipt_handle)).or_default().push(at);
    }
    parts
}

/// The request for the entries at these places.
pub fn part(ack: &AckMessageRequest, places: &[usize]) -> AckMessageRequest {
    let entries = places.iter().filter_map(|at| ack.entries.get(*at).cloned()).collect();
    AckMessageRequest { entries, ..ack.clone() }
}

/// The answer to the whole request, entries in its order. An answer without entries is one for all of
/// its part.
pub fn merge(
    ack: &AckMessageRequest,
    answers: impl IntoIterator<Item = (Vec<usize>, AckMessageResponse)>,
) -> AckMessageResponse {
    let status = |code: i32, message: &str| Some(Status { code, message: message.to_owned() });
    let unanswered = Code::InternalServerError.into();
    let mut entries: Vec<AckMessageResultEntry> = ack
        .entries
        .iter()
        .map(|entry| AckMessageResultEntry {
            message_id: entry.message_id.clone(),
            receipt_handle: entry.receipt_handle.clone(),
            status: status(unanswered, "its broker gave no answer"),
        })
        .collect();
    for (places, answer) in answers {
        for (nth, at) in places.into_iter().enumerate() {
            let Some(entry) = entries.get_mut(at) else { continue };
            match answer.entries.get(nth) {
                Some(told) => entry.clone_from(told),
                None => entry.status.clone_from(&answer.status),
            }
        }
    }
    let code =
        |entry: &AckMessageResultEntry| entry.status.as_ref().map_or(0, |status| status.code);
    let mut codes = entries.iter().map(code);
    let first = codes.next().unwrap_or(unanswered);
    let same = codes.all(|code| code == first);
    let overall = if same { first } else { Code::MultipleResults.into() };
    AckMessageResponse { status: status(overall, ""), entries }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rocketmq::AckMessageEntry;

    fn told(codes: &[Code]) -> AckMessageResponse {
        let status = |code: &Code| Some(Status { code: (*code).into(), message: String::new() });
        let entry = |code| AckMessageResultEntry { status: status(code), ..Default::default() };
        let entries = codes.iter().map(entry).collect();
        AckMessageResponse { status: codes.first().and_then(status), entries }
    }

    #[test]
    fn answers_come_back_in_the_order_asked() {
        let entry = |handle: &str| AckMessageEntry {
            receipt_handle: handle.into(),
            ..AckMessageEntry::default()
        };
        let entries = vec![entry("a.1"), entry("b.1"), entry("a.2"), entry("c.1")];
        let ack = AckMessageRequest { entries, ..AckMessageRequest::default() };
        let parts = parts(&ack, |handle| handle.split('.').next().unwrap().to_owned());
        assert_eq!(parts["a"], [0, 2]);
        assert_eq!(part(&ack, &parts["a"]).entries, [entry("a.1"), entry("a.2")]);
        let refused = AckMessageResponse { entries: Vec::new(), ..told(&[Code::Forbidden]) };
        let answers = [
            (parts["a"].clone(), told(&[Code::Ok, Code::InvalidReceiptHandle])),
            (parts["b"].clone(), refused),
        ];
        let merged = merge(&ack, answers);
        let codes: Vec<Code> =
            merged.entries.iter().map(|e| e.status.as_ref().unwrap().code()).collect();
        let expected =
            [Code::Ok, Code::Forbidden, Code::InvalidReceiptHandle, Code::InternalServerError];
        assert_eq!(codes, expected);
        assert_eq!(merged.status.unwrap().code(), Code::MultipleResults);
        let one = AckMessageRequest { entries: vec![entry("a.1")], ..Default::default() };
        let merged = merge(&one, [(vec![0], told(&[Code::Ok]))]);
        assert_eq!(merged.status.unwrap().code(), Code::Ok);
    }
}
