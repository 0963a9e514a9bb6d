//! The tables as text: commented configuration files, and what is in force.

use std::fmt::Write;

use super::key::{Key, Table};
use super::reader::{Effective, Keys, Loaded};

/// A configuration file with every key at its default, commented out.
pub(crate) fn document<K: Keys>(role: &str) -> String {
    let mut text = format!(
        "# Configuration of a Drumlin {role}: every key, with its default.\n\
         #\n\
         # The environment overrides this file (DRUMLIN_<SECTION>_<KEY>, named beside each key),\n\
         # and flags override the environment (--set section.key=value). A bare number is in the\n\
         # unit of its key; text may carry its own: \"64MiB\", \"10s\". A key that is not known is\n\
         # an error. Generated from the tables in src/config; a test compares.\n"
    );
    for table in K::TABLES {
        section(&mut text, table);
    }
    text
}

fn section(text: &mut String, table: &Table) {
    text.push('\n');
    for line in table.about {
        comment(text, line.trim());
    }
    push(text, format_args!("[{}]\n", table.section));
    for key in table.keys {
        text.push('\n');
        for line in key.doc {
            comment(text, line.trim());
        }
        comment(text, &facts(key));
        push(text, format_args!("# {} = {}\n", key.name, default_text(key)));
    }
}

/// Kind, unit, limits and the name in the environment.
fn facts(key: &Key) -> String {
    let mut facts = key.kind.to_owned();
    if let Some(unit) = key.unit {
        push(&mut facts, format_args!(", a bare number is in {unit}"));
    }
    match (key.min, key.max) {
        (Some(min), Some(max)) => push(&mut facts, format_args!(", from {min} to {max}")),
        (Some(min), None) => push(&mut facts, format_args!(", at least {min}")),
        (None, Some(max)) => push(&mut facts, format_args!(", at most {max}")),
        (None, None) => {}
    }
    push(&mut facts, format_args!("; {}", key.variable()));
    facts
}

fn default_text(key: &Key) -> String {
    let bare = matches!(key.kind, "number" | "true or false");
    match (key.kind, key.default) {
        (kind, list) if kind.starts_with("list of ") => {
            let items: Vec<_> = list.split(',').filter(|i| !i.is_empty()).collect();
            format!("{items:?}")
        }
        (_, "") => "\"off\"".to_owned(),
        (_, default) if bare => default.to_owned(),
        (_, default) => format!("{default:?}"),
    }
}

fn comment(text: &mut String, line: &str) {
    match line.is_empty() {
        true => text.push_str("#\n"),
        false => push(text, format_args!("# {line}\n")),
    }
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a string cannot fail");
}

/// The values in force as a file would hold them, each with its origin.
pub(crate) fn effective<K>(loaded: &Loaded<K>) -> String {
    let mut text = String::new();
    let mut section = "";
    for Effective { section: of, name, shown, origin } in &loaded.effective {
        if *of != section {
            let gap = if section.is_empty() { "" } else { "\n" };
            push(&mut text, format_args!("{gap}[{of}]\n"));
            section = of;
        }
        push(&mut text, format_args!("{:<44} # {origin}\n", format!("{name} = {shown}")));
    }
    text
}
