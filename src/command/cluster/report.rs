//! What the nodes said, as tables and documents.

use drumlin_client::cluster::{Agreement, Copies, GroupMember};
use serde_json::{Map, Value, json};

use super::survey::{GroupSurvey, Survey};
use crate::cli::{Global, Shape};
use crate::failure::{Failure, Kind};
use crate::moment::rfc3339;
use crate::output::{self, Column, Listing, column, wide};

const NODES: &[Column] = &[
    column("NODE", "node"),
    column("GROUP", "broker_group"),
    column("ROLE", "role"),
    column("STATE", "state"),
    column("CLIENTS", "endpoint"),
    column("PEERS", "peer_address"),
    wide("ID", "node_id"),
    wide("RELEASE", "release"),
    wide("GROUP-UUID", "group_uuid"),
];

const REPLICAS: &[Column] = &[
    column("NODE", "node"),
    column("GROUP", "broker_group"),
    column("ROLE", "role"),
    column("STATE", "state"),
    column("TERM", "term"),
    column("LAG-ENTRIES", "lag_entries"),
    column("LAG-BYTES", "lag_bytes"),
    column("LAG-MS", "lag_ms"),
    column("DISK-%", "disk_percent"),
    column("DIGEST", "digest"),
    wide("SEEDED-BYTES", "seed_done_bytes"),
    wide("OF-BYTES", "seed_all_bytes"),
    wide("HEARD-MS", "heard_ago_ms"),
    wide("FREE-BYTES", "disk_free_bytes"),
    wide("RELEASE", "release"),
];

const INDEXES: &[Column] = &[
    column("NODE", "node"),
    column("GROUP", "broker_group"),
    column("ROLE", "role"),
    column("TERM", "term"),
    column("APPENDED", "appended_index"),
    column("DURABLE", "durable_index"),
    column("COMMITTED", "committed_index"),
    column("APPLIED", "applied_index"),
    column("TRIMMED", "trimmed_index"),
    wide("MATCHED", "matched_index"),
    wide("WITNESS-SENT", "witness_sent_index"),
    wide("WITNESS-MAY", "witness_feed_index"),
];

pub(super) fn list(survey: &Survey, global: &Global) -> Result<(), Failure> {
    print(survey, "drumlin/cluster.list/v1", "nodes", NODES, node_row, Map::new(), global)
}

pub(super) fn raft(survey: &Survey, global: &Global) -> Result<(), Failure> {
    print(survey, "drumlin/cluster.raft/v1", "nodes", INDEXES, index_row, Map::new(), global)
}

/// Fails with all that is wrong, after it has told the rest.
pub(super) fn health(survey: &Survey, global: &Global) -> Result<(), Failure> {
    let problems: Vec<String> = survey
        .problems()
        .into_iter()
        .map(|problem| match problem.broker_group.as_str() {
            "" => problem.text,
            group => format!("{group}: {}", problem.text),
        })
        .collect();
    let fields = Map::from_iter([
        ("healthy".to_owned(), problems.is_empty().into()),
        ("problems".to_owned(), problems.clone().into()),
        ("groups".to_owned(), survey.groups.iter().map(group_row).collect()),
    ]);
    if matches!(global.output, Shape::Table | Shape::Wide) && !global.no_headers {
        for group in &survey.groups {
            output::print_line(&group_line(group))?;
        }
        output::print_line("")?;
    }
    let (schema, columns) = ("drumlin/cluster.health/v1", REPLICAS);
    print(survey, schema, "replicas", columns, replica_row, fields, global)?;
    match problems.len() {
        0 => Ok(()),
        1 => Err(Failure::new(Kind::Failed, "the cluster has a problem").details(problems)),
        count => {
            let text = format!("the cluster has {count} problems");
            Err(Failure::new(Kind::Failed, text).details(problems))
        }
    }
}

fn print(
    survey: &Survey,
    schema: &'static str,
    rows_field: &'static str,
    columns: &'static [Column],
    row: fn(&GroupSurvey, &GroupMember) -> Map<String, Value>,
    mut fields: Map<String, Value>,
    global: &Global,
) -> Result<(), Failure> {
    let of = |group: &GroupSurvey| -> Vec<Value> {
        let members = group.members();
        members.iter().map(|member| whole_row(group, member, row(group, member))).collect()
    };
    fields.insert("cluster".to_owned(), survey.cluster.clone().into());
    let rows = survey.groups.iter().flat_map(of).collect();
    let listing = Listing { schema, rows_field, rows, fields, columns, name_field: "node" };
    Ok(listing.print(global)?)
}

fn role(member: &GroupMember) -> &'static str {
    match member {
        _ if member.witness => "witness",
        _ if member.leader => "leader",
        _ if member.voter => "follower",
        _ => "learner",
    }
}

/// `ok`, or in a word why not.
fn state(member: &GroupMember) -> String {
    let said = member.state.clone().unwrap_or_default();
    match member {
        _ if !member.reachable => "unreachable".into(),
        _ if said.seed_all_bytes > 0 => "seeding".into(),
        _ if !member.gone.is_empty() => member.gone.clone(),
        _ if said.stopping => "stopping".into(),
        _ if said.disk_full => "disk full".into(),
        _ => "ok".into(),
    }
}

fn whole_row(group: &GroupSurvey, member: &GroupMember, row: Map<String, Value>) -> Value {
    let mut whole = Map::from_iter([
        ("node".to_owned(), member.node.clone().into()),
        ("broker_group".to_owned(), group.known.broker_group.clone().into()),
        ("role".to_owned(), role(member).into()),
        ("node_id".to_owned(), member.node_id.into()),
    ]);
    whole.extend(row);
    Value::Object(whole)
}

fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn node_row(group: &GroupSurvey, member: &GroupMember) -> Map<String, Value> {
    let known = group.known.nodes.iter().find(|node| node.node == member.node);
    let endpoint = known.and_then(|node| node.address.as_ref()).map(ToString::to_string);
    fields(json!({
        "state": state(member),
        "endpoint": endpoint,
        "peer_address": (!member.address.is_empty()).then_some(&member.address),
        "release": member.state.as_ref().map(|said| &said.release),
        "group_uuid": group.known.group_uuid,
    }))
}

fn replica_row(_: &GroupSurvey, member: &GroupMember) -> Map<String, Value> {
    let said = member.state.as_ref();
    // A witness tells nothing of its disk.
    let disk = said.filter(|_| !member.witness);
    let seed = said.filter(|said| member.reachable && said.seed_all_bytes > 0);
    fields(json!({
        "state": state(member),
        "term": said.map(|said| said.term),
        "lag_entries": member.lag_entries,
        "lag_bytes": member.lag_bytes,
        "lag_ms": member.lag_ms,
        "disk_percent": disk.map(|said| said.disk_percent),
        "disk_free_bytes": disk.map(|said| said.disk_free_bytes),
        "seed_done_bytes": seed.map(|said| said.seed_done_bytes),
        "seed_all_bytes": seed.map(|said| said.seed_all_bytes),
        "digest": match member.digest() {
            Agreement::Equal => Some("equal"),
            Agreement::Differs => Some("differs"),
            Agreement::Unknown => None,
        },
        "reachable": member.reachable,
        "heard_ago_ms": member.heard_ago_ms,
        "release": said.map(|said| &said.release),
    }))
}

/// The last index below an end, which an empty range does not have.
fn last(end: u64) -> Option<u64> {
    end.checked_sub(1).filter(|last| *last > 0)
}

fn index_row(group: &GroupSurvey, member: &GroupMember) -> Map<String, Value> {
    let said = member.state.as_ref();
    let gate = group.standing().filter(|standing| standing.leads && member.leader);
    fields(json!({
        "term": said.map(|said| said.term),
        "appended_index": said.and_then(|said| last(said.appended_end)),
        "durable_index": said.and_then(|said| last(said.durable_end)),
        "committed_index": said.and_then(|said| last(said.committed_end)),
        "applied_index": said.and_then(|said| last(said.applied_end)),
        "trimmed_index": said.and_then(|said| last(said.trimmed_below)),
        "matched_index": gate.and_then(|standing| last(standing.matched_end)),
        "witness_sent_index": gate.and_then(|standing| last(standing.witness_sent_end)),
        "witness_feed_index": gate.and_then(|standing| last(standing.witness_feed_end)),
    }))
}

fn copies(group: &GroupSurvey) -> Option<&'static str> {
    let standing = group.standing().filter(|standing| standing.leads)?;
    match standing.copies() {
        Copies::Unknown => None,
        Copies::Single => Some("single"),
        Copies::Paired => Some("paired"),
        Copies::Alone => Some("alone"),
        Copies::Majority => Some("majority"),
    }
}

fn group_row(group: &GroupSurvey) -> Value {
    let standing = group.standing().cloned().unwrap_or_default();
    let copies = copies(group);
    let since_ms = copies.map(|_| standing.copies_since_ms).filter(|ms| *ms > 0);
    json!({
        "broker_group": group.known.broker_group,
        "group_uuid": group.known.group_uuid,
        "catalog": standing.catalog,
        "copies": copies,
        "degraded": group.is_degraded(),
        "closing": standing.closing,
        "since": since_ms.and_then(rfc3339),
        "since_ms": since_ms,
        "leader": (!standing.leader.is_empty()).then_some(&standing.leader),
        "term": (standing.term > 0).then_some(standing.term),
        "refusing": (!standing.refusing.is_empty()).then_some(&standing.refusing),
        "feature_level": (standing.feature_level > 0).then_some(standing.feature_level),
        "feature_level_max":
            (standing.feature_level_max > 0).then_some(standing.feature_level_max),
        "problems": standing.problems,
    })
}

/// `broker-a: paired since …, leader broker-a-0 in term 3`
fn group_line(group: &GroupSurvey) -> String {
    let row = group_row(group);
    let name = &group.known.broker_group;
    let Some(copies) = copies(group) else { return format!("{name}: no leader answers") };
    let shown = match copies {
        "alone" => "ALONE, acknowledgements are DEGRADED to one copy,",
        copies => copies,
    };
    let since = row["since"].as_str().map(|since| format!(" since {since}")).unwrap_or_default();
    let closing = if row["closing"] == true { ", about to be paired" } else { "" };
    let (leader, term) = (output::plain(&row["leader"]), output::plain(&row["term"]));
    format!("{name}: {shown}{since}{closing}; {leader} leads in term {term}")
}

#[cfg(test)]
mod tests {
    use drumlin_client::cluster::{GroupStanding, KnownGroup};

    use super::*;

    fn group(copies: Copies) -> GroupSurvey {
        let member = GroupMember {
            node: "a-0".into(),
            leader: true,
            voter: true,
            reachable: true,
            ..GroupMember::default()
        };
        let standing = GroupStanding {
            leads: true,
            leader: "a-0".into(),
            term: 3,
            copies: copies.into(),
            copies_since_ms: 1_000,
            members: vec![member],
            ..GroupStanding::default()
        };
        let known = KnownGroup { broker_group: "a".into(), ..KnownGroup::default() };
        GroupSurvey { known, answers: vec![standing] }
    }

    #[test]
    fn a_group_says_how_many_copies_it_keeps_and_since_when() {
        let line = "a: paired since 1970-01-01T00:00:01.000Z; a-0 leads in term 3";
        assert_eq!(group_line(&group(Copies::Paired)), line);
        assert!(group_line(&group(Copies::Alone)).contains("DEGRADED"));
        assert_eq!(group_row(&group(Copies::Alone))["degraded"], true);
        assert_eq!(group_row(&group(Copies::Paired))["degraded"], false);
    }

    #[test]
    fn nobody_answering_is_null_and_not_healthy() {
        let known = KnownGroup { broker_group: "a".into(), ..KnownGroup::default() };
        let row = group_row(&GroupSurvey { known, answers: Vec::new() });
        assert_eq!((&row["copies"], &row["degraded"]), (&Value::Null, &Value::Null));
    }

    #[test]
    fn an_empty_log_has_no_last_index() {
        assert_eq!((last(0), last(1), last(2)), (None, None, Some(1)));
    }
}
