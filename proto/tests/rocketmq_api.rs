//! The compiled `apache.rocketmq.v2` against a table of its names and numbers, in both directions:
//! official clients break on each that differs.

use std::collections::BTreeSet;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

const PACKAGE: &str = "apache.rocketmq.v2";
const TABLE: &str = include_str!("../rocketmq-api.tsv");

/// A line of the table: kind, owner, name, number or shape, type, label.
type Line = [String; 6];

fn line<const N: usize>(columns: [&str; N]) -> Line {
    let mut columns = columns.into_iter();
    std::array::from_fn(|_| columns.next().unwrap_or_default().to_owned())
}

fn table() -> BTreeSet<Line> {
    let lines = TABLE.lines().filter(|text| !text.starts_with('#'));
    lines
        .map(|text| {
            let mut columns = text.split('\t');
            std::array::from_fn(|_| columns.next().unwrap_or_default().to_owned())
        })
        .collect()
}

fn compiled() -> BTreeSet<Line> {
    let files =
        FileDescriptorSet::decode(drumlin_proto::DESCRIPTORS).expect("built from protos").file;
    let mut lines = BTreeSet::new();
    for file in files.iter().filter(|file| file.package() == PACKAGE) {
        file.service.iter().for_each(|service| add_service(&mut lines, service));
        file.enum_type.iter().for_each(|values| add_enum(&mut lines, values, ""));
        file.message_type.iter().for_each(|message| add_message(&mut lines, message, ""));
    }
    lines
}

fn add_service(lines: &mut BTreeSet<Line>, service: &ServiceDescriptorProto) {
    for rpc in &service.method {
        let shape = match (rpc.client_streaming(), rpc.server_streaming()) {
            (false, false) => "unary",
            (false, true) => "server stream",
            (true, false) => "client stream",
            (true, true) => "bidi stream",
        };
        let (input, output) = (short(rpc.input_type()), short(rpc.output_type()));
        lines.insert(line(["rpc", service.name(), rpc.name(), shape, input, output]));
    }
}

fn add_enum(lines: &mut BTreeSet<Line>, values: &EnumDescriptorProto, outer: &str) {
    let owner = format!("{outer}{}", values.name());
    for value in &values.value {
        let number = value.number().to_string();
        lines.insert(line(["value", &owner, value.name(), &number]));
    }
}

fn add_message(lines: &mut BTreeSet<Line>, message: &DescriptorProto, outer: &str) {
    let name = format!("{outer}{}", message.name());
    lines.insert(line(["message", &name]));
    let nested = format!("{name}.");
    message.enum_type.iter().for_each(|values| add_enum(lines, values, &nested));
    for field in &message.field {
        let number = field.number().to_string();
        let (of, label) = (type_of(message, field), label_of(message, field));
        lines.insert(line(["field", &name, field.name(), &number, &of, &label]));
    }
    let is_map =
        |message: &&DescriptorProto| message.options.as_ref().is_some_and(|o| o.map_entry());
    for inner in message.nested_type.iter().filter(|message| !is_map(message)) {
        add_message(lines, inner, &nested);
    }
}

/// Names as the table has them: without this package, and without the dot in front.
fn short(name: &str) -> &str {
    let name = name.trim_start_matches('.');
    name.strip_prefix(PACKAGE).map_or(name, |rest| rest.trim_start_matches('.'))
}

fn map_entry<'a>(
    message: &'a DescriptorProto,
    field: &FieldDescriptorProto,
) -> Option<&'a DescriptorProto> {
    let entry = field.type_name().rsplit('.').next()?;
    message.nested_type.iter().find(|inner| {
        inner.name() == entry && inner.options.as_ref().is_some_and(|options| options.map_entry())
    })
}

fn type_of(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    if let Some(entry) = map_entry(message, field) {
        let [key, value] = &entry.field[..] else { panic!("a map entry has two fields") };
        return format!("map<{}, {}>", type_of(entry, key), type_of(entry, value));
    }
    match field.r#type() {
        Type::Message | Type::Enum => short(field.type_name()).to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

fn label_of(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    if map_entry(message, field).is_some() {
        return "map".into();
    }
    if field.label() == Label::Repeated {
        return "repeated".into();
    }
    match field.oneof_index.and_then(|index| usize::try_from(index).ok()) {
        None => "-".into(),
        Some(_) if field.proto3_optional() => "optional".into(),
        Some(index) => format!("oneof {}", message.oneof_decl[index].name()),
    }
}

#[test]
fn compiled_api_has_all_that_the_table_names_and_nothing_else() {
    let (table, compiled) = (table(), compiled());
    assert!(table.len() > 600, "the table was cut to {} lines", table.len());
    let missing: Vec<_> = table.difference(&compiled).collect();
    let surplus: Vec<_> = compiled.difference(&table).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "only in the table: {missing:#?}\nonly compiled: {surplus:#?}"
    );
}
