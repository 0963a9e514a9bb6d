//! The broker groups that a nameserver has seen, in a small file of its data directory.
//!
//! Text: a first line with format and version, one line per broker group, a last line with their
//! count. It is only ever replaced as a whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use drumlin_proto::ids::BrokerGroupName;

use crate::route_table::Remembered;

const FIRST_LINE: &str = "drumlin broker groups 1";
const FILE_NAME: &str = "broker-groups";

#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("cannot use {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: line {line} is not what was written there")]
    Damaged { path: PathBuf, line: usize },
}

/// The file; the directory is made when first needed.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    dir: PathBuf,
}

impl Memory {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> MemoryError {
        let path = self.dir.join(FILE_NAME);
        move |source| MemoryError::Io { path, source }
    }

    /// What was remembered; nothing if there is no file yet.
    pub(crate) fn load(&self) -> Result<Vec<Remembered>, MemoryError> {
        let path = self.dir.join(FILE_NAME);
        match fs::read_to_string(&path) {
            Ok(text) => parse(&text).map_err(|line| MemoryError::Damaged { path, line }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(self.failed()(error)),
        }
    }

    /// Replaces the file by another that is synced first.
    pub(crate) fn save(&self, groups: &[Remembered]) -> Result<(), MemoryError> {
        self.replace(&render(groups)).map_err(self.failed())
    }

    fn replace(&self, text: &str) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let next = self.dir.join(format!("{FILE_NAME}.next"));
        let mut file = File::create(&next)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&next, self.dir.join(FILE_NAME))?;
        File::open(&self.dir)?.sync_all()
    }
}

fn render(groups: &[Remembered]) -> String {
    let mut text = format!("{FIRST_LINE}\n");
    for group in groups {
        let Remembered { broker_group, group_uuid, term } = group;
        text.push_str(&format!("{broker_group} {group_uuid} {term}\n"));
    }
    text.push_str(&format!("end {}\n", groups.len()));
    text
}

/// Whether a text may stand for a group UUID here and on the wire.
pub(crate) fn is_group_uuid(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

/// The groups of a text, or the number of the first line that is wrong.
fn parse(text: &str) -> Result<Vec<Remembered>, usize> {
    let mut groups = Vec::new();
    let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    if lines.next().is_none_or(|(_, line)| line != FIRST_LINE) {
        return Err(1);
    }
    for (at, line) in lines.by_ref() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["end", count] if count.parse() == Ok(groups.len()) => return Ok(groups),
            [name, uuid, term] if is_group_uuid(uuid) => groups.push(Remembered {
                broker_group: BrokerGroupName::parse(name).map_err(|_| at)?.to_string(),
                group_uuid: (*uuid).to_owned(),
                term: term.parse().map_err(|_| at)?,
            }),
            _ => return Err(at),
        }
    }
    Err(groups.len() + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, term: u64) -> Remembered {
        Remembered { broker_group: name.into(), group_uuid: "0a-1b".into(), term }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::new(&dir.path().join("new"));
        assert_eq!(memory.load().unwrap(), []);
        for groups in [vec![group("a", 3), group("b", u64::MAX)], vec![], vec![group("a", 4)]] {
            memory.save(&groups).unwrap();
            assert_eq!(memory.load().unwrap(), groups);
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let text = render(&[group("a", 3), group("b", 4)]);
        for end in 0..text.len() - 1 {
            assert!(parse(&text[..end]).is_err(), "{:?}", &text[..end]);
        }
        assert!(parse(&text.replace("0a-1b", "0a 1b")).is_err());
        assert!(parse(&text.replace("groups 1", "groups 2")).is_err());
    }
}
