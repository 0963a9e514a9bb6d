//! Data on stdout: one list of rows in whatever shape was asked for.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Map, Value};

use crate::cli::{Global, Shape};

/// A column of a table: what it is called and which field of a row it shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub(crate) header: &'static str,
    pub(crate) field: &'static str,
    /// Only in wide tables.
    pub(crate) wide: bool,
}

pub(crate) const fn column(header: &'static str, field: &'static str) -> Column {
    Column { header, field, wide: false }
}

pub(crate) const fn wide(header: &'static str, field: &'static str) -> Column {
    Column { header, field, wide: true }
}

/// Rows with their schema. The JSON shapes show every field, the others the columns.
#[derive(Clone, Debug)]
pub(crate) struct Listing {
    /// `drumlin/topic.list/v1`
    pub(crate) schema: &'static str,
    /// What the rows are called in JSON.
    pub(crate) rows_field: &'static str,
    /// Objects.
    pub(crate) rows: Vec<Value>,
    /// Fields beside the rows.
    pub(crate) fields: Map<String, Value>,
    pub(crate) columns: &'static [Column],
    /// The field that `-o name` prints.
    pub(crate) name_field: &'static str,
}

impl Listing {
    pub(crate) fn print(&self, global: &Global) -> io::Result<()> {
        let mut out = io::stdout().lock();
        self.write(global.output, !global.no_headers, &mut out)?;
        out.flush()
    }

    fn write(&self, shape: Shape, headers: bool, out: &mut impl Write) -> io::Result<()> {
        match shape {
            Shape::Table | Shape::Wide => self.write_table(shape == Shape::Wide, headers, out),
            Shape::Json => writeln!(out, "{}", self.document()),
            Shape::Jsonl => self.rows.iter().try_for_each(|row| {
                let mut line = Map::from_iter([("schema".to_owned(), self.schema.into())]);
                line.extend(row.as_object().cloned().unwrap_or_default());
                writeln!(out, "{}", Value::Object(line))
            }),
            Shape::Csv => self.write_csv(headers, out),
            Shape::Name => {
                self.rows.iter().try_for_each(|row| writeln!(out, "{}", cell(row, self.name_field)))
            }
        }
    }

    fn document(&self) -> Value {
        let mut document = Map::from_iter([("schema".to_owned(), self.schema.into())]);
        document.extend(self.fields.clone());
        document.insert(self.rows_field.to_owned(), self.rows.clone().into());
        Value::Object(document)
    }

    fn write_table(&self, all: bool, headers: bool, out: &mut impl Write) -> io::Result<()> {
        let columns: Vec<_> = self.columns.iter().filter(|c| all || !c.wide).collect();
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if headers {
            table.set_header(columns.iter().map(|column| column.header));
        }
        for row in &self.rows {
            table.add_row(columns.iter().map(|column| cell(row, column.field)));
        }
        for (nth, column) in columns.iter().enumerate() {
            let number = |row: &Value| row[column.field].is_number();
            let right = !self.rows.is_empty() && self.rows.iter().all(number);
            if let Some(column) = table.column_mut(nth) {
                column.set_padding((0, 2));
                if right {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        table.lines().try_for_each(|line| writeln!(out, "{}", line.trim_end()))
    }

    fn write_csv(&self, headers: bool, out: &mut impl Write) -> io::Result<()> {
        if headers {
            let fields: Vec<_> = self.columns.iter().map(|column| column.field).collect();
            writeln!(out, "{}", fields.join(","))?;
        }
        self.rows.iter().try_for_each(|row| {
            let cells: Vec<_> =
                self.columns.iter().map(|column| csv_cell(&row[column.field])).collect();
            writeln!(out, "{}", cells.join(","))
        })
    }
}

/// One JSON document on a line: `schema` and the fields of `value`.
pub(crate) fn print_document(schema: &str, value: Value) -> io::Result<()> {
    let mut document = Map::from_iter([("schema".to_owned(), schema.into())]);
    match value {
        Value::Object(fields) => document.extend(fields),
        other => document.extend([("value".to_owned(), other)]),
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{}", Value::Object(document))?;
    out.flush()
}

/// Text as it is.
pub(crate) fn print_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn cell(row: &Value, field: &str) -> String {
    match &row[field] {
        Value::Null => "-".into(),
        value => plain(value),
    }
}

/// A value without quotes; of a list the items with commas between.
pub(crate) fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn csv_cell(value: &Value) -> String {
    let text = plain(value);
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: &[Column] = &[
        column("NAME", "name"),
        column("QUEUES", "queues"),
        wide("GROUPS", "groups"),
        column("NOTE", "note"),
    ];

    fn listing() -> Listing {
        Listing {
            schema: "drumlin/test/v1",
            rows_field: "topics",
            rows: vec![
                json!({"name": "orders", "queues": 8, "groups": ["a", "b"], "note": null}),
                json!({"name": "logs", "queues": 16, "groups": [], "note": "x"}),
            ],
            fields: Map::from_iter([("total".to_owned(), json!(2))]),
            columns: COLUMNS,
            name_field: "name",
        }
    }

    fn shown(shape: Shape, headers: bool) -> String {
        let mut out = Vec::new();
        listing().write(shape, headers, &mut out).expect("memory can be written");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn tables_align_numbers_to_the_right() {
        let table = "NAME    QUEUES  NOTE\norders       8  -\nlogs        16  x\n";
        assert_eq!(shown(Shape::Table, true), table);
        assert_eq!(shown(Shape::Table, false), "orders   8  -\nlogs    16  x\n");
    }

    #[test]
    fn wide_tables_have_all_columns() {
        assert!(shown(Shape::Wide, true).contains("GROUPS"));
        assert!(shown(Shape::Wide, true).contains("a,b"));
    }

    #[test]
    fn json_has_schema_fields_and_rows() {
        let document: Value = serde_json::from_str(&shown(Shape::Json, true)).expect("JSON");
        assert_eq!(document["schema"], "drumlin/test/v1");
        assert_eq!(document["total"], 2);
        assert_eq!(document["topics"][1]["groups"], json!([]));
        for line in shown(Shape::Jsonl, true).lines() {
            let row: Value = serde_json::from_str(line).expect("JSON");
            assert_eq!(row["schema"], "drumlin/test/v1");
        }
    }

    #[test]
    fn csv_quotes_what_holds_a_comma() {
        assert_eq!(
            shown(Shape::Csv, true),
            "name,queues,groups,note\norders,8,\"a,b\",\nlogs,16,,x\n"
        );
    }

    #[test]
    fn names_come_one_per_line() {
        assert_eq!(shown(Shape::Name, true), "orders\nlogs\n");
    }
}
