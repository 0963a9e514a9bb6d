//! Where values come from: files, environment, flags, merged by the `config` crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::{ConfigError, FileFormat, Format, Map, Source, Value, ValueKind};

use super::fault::{Fault, Origin, nearest};
use super::key::{Key, PREFIX, Table};
use super::{Flag, Given};

/// The one variable with our prefix that is no configuration key: the CLI's access point.
const ENDPOINT_VARIABLE: &str = "DRUMLIN_ENDPOINT";
/// Picks a deliberate fault in a build that has them.
const FAULT_VARIABLE: &str = "DRUMLIN_FAULT";

/// The values that were given, strongest kept, each with its origin.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    values: BTreeMap<String, (ValueKind, Origin)>,
}

impl Layers {
    pub(crate) fn collect(
        given: &Given,
        tables: &'static [&'static Table],
        others: &[&'static Table],
        faults: &mut Vec<Fault>,
    ) -> Self {
        let mut origins = Origins::default();
        let mut builder = config::Config::builder();
        if let Some((name, text)) = &given.preset {
            let id = origins.add(Origins::preset(name));
            builder = add(builder, parse(&id, text), faults, &Origin::Preset(name));
        }
        for path in &given.files {
            let origin = Origin::File { path: path.clone(), line: None };
            match std::fs::read_to_string(path) {
                Ok(text) => {
                    let parsed =
                        parse(&origins.add(Layer::File(path.clone(), text.clone())), &text);
                    builder = add(builder, parsed, faults, &origin);
                }
                Err(error) => faults.push(Fault {
                    origin,
                    path: String::new(),
                    message: format!("cannot be read: {error}"),
                }),
            }
        }
        let environment = environment(&given.environment, tables, others, &mut origins, faults);
        builder = builder.add_source(environment).add_source(flags(&given.flags, &mut origins));
        let mut layers = Self::default();
        match builder.build() {
            Ok(merged) => layers.flatten("", &merged.cache, &origins),
            Err(error) => faults.push(Fault {
                origin: Origin::Default,
                path: String::new(),
                message: format!("cannot be merged: {error}"),
            }),
        }
        layers.refuse_unknown(tables, others, faults);
        layers
    }

    pub(crate) fn get(&self, path: &str) -> Option<&(ValueKind, Origin)> {
        self.values.get(path)
    }

    fn flatten(&mut self, prefix: &str, value: &Value, origins: &Origins) {
        match &value.kind {
            ValueKind::Table(table) => {
                for (name, value) in table {
                    let path = match prefix {
                        "" => name.clone(),
                        prefix => format!("{prefix}.{name}"),
                    };
                    self.flatten(&path, value, origins);
                }
            }
            kind => {
                let origin = origins.of(value.origin(), prefix);
                self.values.insert(prefix.to_owned(), (kind.clone(), origin));
            }
        }
    }

    fn refuse_unknown(
        &mut self,
        tables: &[&'static Table],
        others: &[&'static Table],
        faults: &mut Vec<Fault>,
    ) {
        let known: Vec<String> = keys(tables).map(Key::path).collect();
        for (path, (_, origin)) in &self.values {
            let elsewhere = || keys(others).any(|key| key.path() == *path);
            if known.contains(path) || elsewhere() {
                continue;
            }
            let section = tables.iter().any(|table| table.section == path);
            let message = match nearest(path, known.iter().map(String::as_str)) {
                _ if section => "is a section, not a key".to_owned(),
                Some(near) => format!("is no key; did you mean {near}?"),
                None => "is no key".to_owned(),
            };
            faults.push(Fault { origin: origin.clone(), path: path.clone(), message });
        }
    }
}

fn keys<'a>(tables: &'a [&'static Table]) -> impl Iterator<Item = &'static Key> + 'a {
    tables.iter().flat_map(|table| table.keys)
}

type Builder = config::ConfigBuilder<config::builder::DefaultState>;
type Parsed = Result<Map<String, Value>, String>;

fn parse(id: &str, text: &str) -> Parsed {
    FileFormat::Toml.parse(Some(&id.to_owned()), text).map_err(|error| error.to_string())
}

fn add(builder: Builder, parsed: Parsed, faults: &mut Vec<Fault>, origin: &Origin) -> Builder {
    match parsed {
        Ok(values) => builder.add_source(Layered(values)),
        Err(error) => {
            let message = format!("is no TOML: {}", error.trim_end());
            faults.push(Fault { origin: origin.clone(), path: String::new(), message });
            builder
        }
    }
}

/// Values that were collected already.
#[derive(Clone, Debug)]
struct Layered(Map<String, Value>);

impl Source for Layered {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

/// A variable names a key or is a fault: nothing is guessed from its underscores.
fn environment(
    variables: &[(String, String)],
    tables: &[&'static Table],
    others: &[&'static Table],
    origins: &mut Origins,
    faults: &mut Vec<Fault>,
) -> Layered {
    let mut values = Map::new();
    for (name, value) in variables.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
        if name == ENDPOINT_VARIABLE || (cfg!(fault) && name == FAULT_VARIABLE) {
            continue;
        }
        if let Some(key) = keys(tables).find(|key| key.variable() == *name) {
            let id = origins.add(Layer::Variable(name.clone()));
            values.insert(key.path(), Value::new(Some(&id), value.as_str()));
        } else if !keys(others).any(|key| key.variable() == *name) {
            let known: Vec<String> = keys(tables).map(Key::variable).collect();
            // Without the prefix, which would make everything alike.
            let known = known.iter().filter_map(|name| name.strip_prefix(PREFIX));
            let message = match nearest(name.trim_start_matches(PREFIX), known) {
                Some(near) => format!("names no key; did you mean {PREFIX}{near}?"),
                None => "names no key".to_owned(),
            };
            let origin = Origin::Variable(name.clone());
            faults.push(Fault { origin, path: String::new(), message });
        }
    }
    Layered(values)
}

fn flags(flags: &[Flag], origins: &mut Origins) -> Layered {
    let mut values = Map::new();
    for Flag { flag, path, value } in flags {
        let id = origins.add(Layer::Flag(flag));
        values.insert(path.clone(), Value::new(Some(&id), value.as_str()));
    }
    Layered(values)
}

#[derive(Clone, Debug)]
enum Layer {
    Preset(&'static str),
    File(PathBuf, String),
    Variable(String),
    Flag(&'static str),
}

/// What the origin strings of the merged values stand for.
#[derive(Debug, Default)]
struct Origins(Vec<Layer>);

impl Origins {
    fn preset(name: &'static str) -> Layer {
        Layer::Preset(name)
    }

    fn add(&mut self, layer: Layer) -> String {
        self.0.push(layer);
        (self.0.len() - 1).to_string()
    }

    fn of(&self, id: Option<&str>, path: &str) -> Origin {
        match id.and_then(|id| id.parse::<usize>().ok()).and_then(|nth| self.0.get(nth)) {
            Some(Layer::Preset(name)) => Origin::Preset(name),
            Some(Layer::File(file, text)) => file_origin(file, text, path),
            Some(Layer::Variable(name)) => Origin::Variable(name.clone()),
            Some(Layer::Flag(flag)) => Origin::Flag(flag),
            None => Origin::Default,
        }
    }
}

fn file_origin(file: &Path, text: &str, path: &str) -> Origin {
    Origin::File { path: file.to_owned(), line: line_of(text, path) }
}

/// The line, from 1, that sets `path` in plain TOML: headers of sections, then `key =`.
///
/// What is written in another way (inline tables, quoted keys) has no line; it is still found by
/// its name.
fn line_of(text: &str, path: &str) -> Option<usize> {
    let mut section = String::new();
    for (nth, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[').and_then(|l| l.split(']').next()) {
            section = header.trim().to_owned();
        } else if let Some((key, _)) = line.split_once('=') {
            let full = match section.as_str() {
                "" => key.trim().to_owned(),
                section => format!("{section}.{}", key.trim()),
            };
            if full == path {
                return Some(nth + 1);
            }
        }
    }
    None
}
