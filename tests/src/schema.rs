//! Documents of the command line against the schemas in `docs/schema`: of JSON Schema just what those
//! use.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// The schema that is shipped for `drumlin/NAME/vN`.
pub fn shipped(schema: &str) -> Result<Value> {
    let name = schema.strip_prefix("drumlin/").context(schema.to_owned())?.replace('/', ".");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema");
    let path = root.join(format!("{name}.json"));
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

/// What of `value` is not as the schema has it, with its place; all of it.
pub fn faults(schema: &Value, value: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    look(schema, value, "$", &mut faults);
    faults
}

fn look(schema: &Value, value: &Value, at: &str, faults: &mut Vec<String>) {
    let types = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        Value::String(one) => vec![one.as_str()],
        _ => Vec::new(),
    };
    if !types.is_empty() && !types.iter().any(|name| is_of(name, value)) {
        faults.push(format!("{at} is no {}", types.join(" or ")));
    }
    let is_const = schema.get("const").is_none_or(|only| only == value);
    let is_listed = schema["enum"].as_array().is_none_or(|all| all.contains(value));
    if !is_const || !is_listed {
        faults.push(format!("{at} must not be {value}"));
    }
    for (number, item) in value.as_array().into_iter().flatten().enumerate() {
        look(&schema["items"], item, &format!("{at}[{number}]"), faults);
    }
    if let Some(fields) = value.as_object() {
        look_at_fields(schema, fields, at, faults);
    }
}

fn look_at_fields(schema: &Value, fields: &Map<String, Value>, at: &str, faults: &mut Vec<String>) {
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for name in required.filter(|name| !fields.contains_key(*name)) {
        faults.push(format!("{at}.{name} is missing"));
    }
    for (name, value) in fields {
        match schema["properties"].get(name) {
            Some(property) => look(property, value, &format!("{at}.{name}"), faults),
            None if schema["additionalProperties"] == false => {
                faults.push(format!("{at}.{name} is not known"));
            }
            None => {}
        }
    }
}

fn is_of(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_way_to_be_wrong_is_named() {
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["a", "b"],
            "properties": {
                "a": {"type": ["integer", "null"]},
                "b": {"type": "array", "items": {"enum": ["x", null]}},
                "c": {"const": "only"},
            },
        });
        assert_eq!(faults(&schema, &json!({"a": null, "b": ["x", null]})), Vec::<String>::new());
        let wrong = json!({"a": 1.5, "b": ["y"], "c": "other", "d": 1});
        let named = faults(&schema, &wrong);
        let of = |text: &str| named.iter().filter(|fault| fault.contains(text)).count();
        assert_eq!((of("$.a"), of("$.b[0]"), of("$.c"), of("$.d"), named.len()), (1, 1, 1, 1, 4));
        assert_eq!(faults(&schema, &json!({})).len(), 2);
        assert_eq!(faults(&schema, &json!([])).len(), 1);
    }
}
