//! What the members of a broker group have on their disks once they have stopped, compared with the
//! tools that operators have: logs of data nodes byte for byte, the witness's by what it keeps of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Cluster;
use crate::event::What;

/// Entries of one log that are looked at: more than any run writes.
const ENTRIES_MAX: &str = "1000000";

/// Of each pair what they have in common. Behind `committed` leaders may have left what was cut later.
pub fn compare(cluster: &Cluster, group: &str, committed: u64) -> Result<Vec<What>> {
    let members = cluster.members(group);
    let [one, other] = &members[..] else { return Ok(Vec::new()) };
    let tool = Tool { binary: cluster.node(one)?.binary.clone() };
    let dir = |name: &str| Ok::<_, anyhow::Error>(cluster.node(name)?.data_dir.clone());
    let compared = |other: &str, (entries, difference): Difference| What::Compared {
        group: group.to_owned(),
        one: one.clone(),
        other: other.to_owned(),
        entries,
        difference,
    };
    let mut found = vec![compared(other, tool.diff(&dir(one)?, &dir(other)?, committed)?)];
    let uuid = tool.json(&["log", "stat"], &[&dir(one)?])?["group_uuid"].clone();
    let uuid = uuid.as_str().context("no group_uuid")?;
    for nameserver in cluster.nameservers() {
        let witness = dir(&nameserver)?.join("witness").join(uuid);
        if witness.is_dir() {
            let difference = tool.headers_differ(&dir(one)?, &witness, committed)?;
            found.push(compared(&nameserver, difference));
        }
    }
    Ok(found)
}

/// Entries in common, and the first that differs.
type Difference = (u64, Option<String>);

struct Tool {
    binary: PathBuf,
}

impl Tool {
    fn run(&self, words: &[&str], dirs: &[&Path]) -> Result<String> {
        let mut command = Command::new(&self.binary);
        command.args(words).args(dirs);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DRUMLIN_") {
                command.env_remove(name);
            }
        }
        let output = command.output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.stdout.is_empty(), "{command:?}: {}: {told}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    fn json(&self, words: &[&str], dirs: &[&Path]) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(&[words, &["-o", "json"]].concat(), dirs)?)?)
    }

    fn diff(&self, one: &Path, other: &Path, committed: u64) -> Result<Difference> {
        let found = self.json(&["log", "diff"], &[one, other])?;
        let entries = found["identical_entries"].as_u64().context("no identical_entries")?;
        let at = found["index"].as_u64().filter(|index| *index <= committed);
        Ok((entries, at.map(|at| format!("entry {at}: {}", found["differences"]))))
    }

    fn headers(&self, dir: &Path) -> Result<Vec<Header>> {
        let text = self.run(&["log", "dump", "--max", ENTRIES_MAX, "-o", "csv"], &[dir])?;
        text.lines().skip(1).map(Header::parse).collect()
    }

    fn headers_differ(&self, data: &Path, witness: &Path, committed: u64) -> Result<Difference> {
        let (data, witness) = (self.headers(data)?, self.headers(witness)?);
        let first = data.first().map_or(0, |header| header.index);
        let mut entries = 0;
        for kept in witness.iter().filter(|kept| (first..=committed).contains(&kept.index)) {
            let at = usize::try_from(kept.index - first)?;
            let Some(held) = data.get(at) else { break };
            let expected = held.as_a_witness_keeps_it();
            if expected != *kept {
                let text = format!("the data node's is {expected:?}, the witness has {kept:?}");
                return Ok((entries, Some(text)));
            }
            entries += 1;
        }
        Ok((entries, None))
    }
}

/// What `log dump` prints of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    index: u64,
    term: u64,
    kind: String,
    time: String,
    item_count: u32,
    payload_bytes: u32,
    payload_crc: u32,
}

impl Header {
    fn parse(line: &str) -> Result<Self> {
        let cells: Vec<_> = line.split(',').collect();
        let cell = |at: usize| cells.get(at).copied().with_context(|| format!("too short: {line}"));
        Ok(Self {
            index: cell(0)?.parse()?,
            term: cell(1)?.parse()?,
            kind: cell(2)?.to_owned(),
            time: cell(3)?.to_owned(),
            item_count: cell(4)?.parse()?,
            payload_bytes: cell(6)?.parse()?,
            payload_crc: u32::from_str_radix(cell(10)?, 16)?,
        })
    }

    /// In place of a batch's payload twelve bytes: its size, its checksum, its count of items.
    fn as_a_witness_keeps_it(&self) -> Self {
        if self.kind != "batch" {
            return self.clone();
        }
        let kept = [self.payload_bytes, self.payload_crc, self.item_count];
        let kept: Vec<u8> = kept.into_iter().flat_map(u32::to_le_bytes).collect();
        Self {
            item_count: 0,
            payload_bytes: 12,
            payload_crc: crc32fast::hash(&kept),
            ..self.clone()
        }
    }
}
