//! Reads the keys of a role out of the merged values, and notes every fault.

use std::path::PathBuf;

use config::ValueKind;

use super::fault::{Fault, Faults, Origin};
use super::key::{Key, Table};
use super::source::Layers;
use super::value::Value;

/// The keys of one role.
pub(crate) trait Keys: Sized {
    /// In the order of its file.
    const TABLES: &'static [&'static Table];

    fn read(reader: &mut Reader) -> Self;

    /// Looks at keys that must fit each other.
    fn check(&self, reader: &mut Reader);
}

/// A value as it is in force.
#[derive(Clone, Debug)]
pub(crate) struct Effective {
    pub(crate) section: &'static str,
    pub(crate) name: &'static str,
    /// As it would be written in a file.
    pub(crate) shown: String,
    pub(crate) origin: Origin,
}

impl Effective {
    /// Whether the user set it.
    pub(crate) fn is_given(&self) -> bool {
        !matches!(self.origin, Origin::Default | Origin::Preset(_))
    }
}

/// Keys without a fault, and where each came from.
#[derive(Clone, Debug)]
pub(crate) struct Loaded<K> {
    pub(crate) keys: K,
    pub(crate) effective: Vec<Effective>,
    pub(crate) files: Vec<PathBuf>,
    /// Allowed, but worth a word at every start.
    pub(crate) warnings: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Reader {
    layers: Layers,
    effective: Vec<Effective>,
    faults: Vec<Fault>,
    warnings: Vec<String>,
}

impl Reader {
    pub(crate) fn new(layers: Layers, faults: Vec<Fault>) -> Self {
        Self { layers, effective: Vec::new(), faults, warnings: Vec::new() }
    }

    /// The value in force. A faulty one is noted, and the default returned, so that the rest of
    /// the configuration can be looked at.
    pub(crate) fn read<V: Value>(&mut self, key: &Key) -> V {
        let default = built_in::<V>(key.default, key);
        let path = key.path();
        let (value, origin) = match self.layers.get(&path) {
            None => (default, Origin::Default),
            Some((raw, origin)) => match V::parse(raw, key).and_then(|v| limited(v, key)) {
                Ok(value) => (value, origin.clone()),
                Err(message) => {
                    let origin = origin.clone();
                    self.faults.push(Fault { origin, path, message });
                    (default, Origin::Default)
                }
            },
        };
        let shown = value.show();
        self.effective.push(Effective { section: key.section, name: key.name, shown, origin });
        value
    }

    /// Notes a fault of a key that fits its own limits, but not another key.
    pub(crate) fn fault(&mut self, path: &str, message: String) {
        let origin = self.layers.get(path).map_or(Origin::Default, |(_, origin)| origin.clone());
        self.faults.push(Fault { origin, path: path.to_owned(), message });
    }

    pub(crate) fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    pub(crate) fn finish<K>(self, keys: K, files: Vec<PathBuf>) -> Result<Loaded<K>, Faults> {
        match self.faults.is_empty() {
            true => {
                let Self { effective, warnings, .. } = self;
                Ok(Loaded { keys, effective, files, warnings })
            }
            false => Err(Faults(self.faults)),
        }
    }
}

/// A default or limit out of the table.
fn built_in<V: Value>(text: &str, key: &Key) -> V {
    let raw = ValueKind::String(text.to_owned());
    V::parse(&raw, key).expect("defaults and limits of the tables are valid, which a test shows")
}

fn limited<V: Value>(value: V, key: &Key) -> Result<V, String> {
    if let Some(min) = key.min
        && built_in::<V>(min, key).above(&value)
    {
        return Err(format!("is {}, less than the {min} that it must be at least", value.show()));
    }
    if let Some(max) = key.max
        && value.above(&built_in::<V>(max, key))
    {
        return Err(format!("is {}, more than the {max} that it may be at most", value.show()));
    }
    Ok(value)
}
