//! From the bytes of a CDI file to a [`Spec`]. JSON through serde_json; YAML through a parser's
//! events, because the schema says which values are numbers (so `name: 0` stays the text "0", as
//! in Go's implementation) and because aliases are refused: a few of them expand without bound.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

use crate::types::Spec;

/// Deepest nesting; CDI needs six levels.
const MAX_DEPTH: usize = 32;

/// Why a file is not a CDI file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// Not JSON.
    #[error("not valid JSON")]
    Json(#[source] serde_json::Error),
    /// Not YAML.
    #[error("not valid YAML")]
    Yaml(#[source] saphyr_parser::ScanError),
    /// YAML that CDI files do not use.
    #[error("line {line}: {what}")]
    YamlForm {
        /// From 1.
        line: usize,
        /// What is there.
        what: &'static str,
    },
    /// Other fields, or other types, than CDI's.
    #[error("not a CDI file")]
    Shape(#[source] serde_json::Error),
}

impl Spec {
    /// Parses a `.json` file. Unknown fields are refused; validity is [`Spec::validate`]'s.
    ///
    /// # Errors
    /// Bytes that are not JSON, or JSON of another shape.
    pub fn from_json(bytes: &[u8]) -> Result<Spec, ParseError> {
        from_value(serde_json::from_slice(bytes).map_err(ParseError::Json)?)
    }

    /// Parses a `.yaml` file. Unknown fields are refused; validity is [`Spec::validate`]'s.
    ///
    /// # Errors
    /// Text that is not YAML, has several documents or aliases, or another shape.
    pub fn from_yaml(text: &str) -> Result<Spec, ParseError> {
        from_value(yaml(text)?)
    }
}

fn from_value(mut value: Value) -> Result<Spec, ParseError> {
    drop_nulls(&mut value);
    serde_json::from_value(value).map_err(ParseError::Shape)
}

/// Go writes an empty list as null: the field is as good as absent.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// A collection being filled.
enum Open {
    Sequence(Option<String>, Vec<Value>),
    Mapping(Map<String, Value>, Option<String>),
}

/// YAML as a value, with the same bounds as for CDI files; what CDI does not have as a number or a boolean is text.
///
/// # Errors
/// Text that is not YAML, has several documents, aliases or tags, or is nested too deeply.
pub fn yaml(text: &str) -> Result<Value, ParseError> {
    let mut open: Vec<Open> = Vec::new();
    let mut document = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(ParseError::Yaml)?;
        let form = |what| ParseError::YamlForm {
            line: span.start.line(),
            what,
        };
        let done = match event {
            Event::Alias(_) => return Err(form("aliases are not supported")),
            Event::DocumentStart(_) if document.is_some() => return Err(form("a second document")),
            Event::Scalar(text, style, _, tag) => {
                if tag.is_some() {
                    return Err(form("tags are not supported"));
                }
                if let Some(Open::Mapping(map, key @ None)) = open.last_mut() {
                    if map.contains_key(text.as_ref()) {
                        return Err(form("a key for the second time"));
                    }
                    *key = Some(text.into_owned());
                    continue;
                }
                scalar(&text, style == ScalarStyle::Plain, current_key(&open))
                    .ok_or_else(|| form("not a number"))?
            }
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if open.len() == MAX_DEPTH {
                    return Err(form("nested too deeply"));
                }
                if let Some(Open::Mapping(_, None)) = open.last() {
                    return Err(form("a key that is not text"));
                }
                let key = current_key(&open).map(str::to_owned);
                open.push(match event {
                    Event::SequenceStart(..) => Open::Sequence(key, Vec::new()),
                    _ => Open::Mapping(Map::new(), None),
                });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::Sequence(_, list)) => Value::Array(list),
                Some(Open::Mapping(map, _)) => Value::Object(map),
                None => return Err(form("an end without a beginning")),
            },
            _ => continue,
        };
        match open.last_mut() {
            Some(Open::Sequence(_, list)) => list.push(done),
            Some(Open::Mapping(map, key)) => {
                let key = key.take().ok_or_else(|| form("a key that is not text"))?;
                map.insert(key, done);
            }
            None => document = Some(done),
        }
    }
    Ok(document.unwrap_or(Value::Null))
}

/// The key whose value (or whose list's element) comes next.
fn current_key(open: &[Open]) -> Option<&str> {
    match open.last()? {
        Open::Sequence(key, _) | Open::Mapping(_, key) => key.as_deref(),
    }
}

/// CDI's schema decides: a few keys hold numbers or booleans, all others text.
fn scalar(text: &str, plain: bool, key: Option<&str>) -> Option<Value> {
    if plain && matches!(text, "" | "~" | "null" | "Null" | "NULL") {
        return Some(Value::Null);
    }
    match key {
        Some("major" | "minor" | "fileMode" | "uid" | "gid" | "timeout" | "additionalGids") if plain => {
            number(text).map(|n| Value::Number(Number::from(n)))
        }
        Some("enableMonitoring" | "enableCMT" | "enableMBM") if plain => match text {
            "true" | "True" | "TRUE" => Some(Value::Bool(true)),
            "false" | "False" | "FALSE" => Some(Value::Bool(false)),
            _ => Some(Value::String(text.to_owned())),
        },
        _ => Some(Value::String(text.to_owned())),
    }
}

/// Decimal, `0x`, `0o`, and YAML 1.1's leading zero for octal (file modes).
fn number(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let magnitude = if let Some(hex) = digits.strip_prefix("0x") {
        i64::from_str_radix(hex, 16).ok()?
    } else if let Some(octal) = digits.strip_prefix("0o") {
        i64::from_str_radix(octal, 8).ok()?
    } else if digits.len() > 1 && digits.starts_with('0') {
        i64::from_str_radix(digits, 8).ok()?
    } else if digits.bytes().all(|b| b.is_ascii_digit()) {
        digits.parse().ok()?
    } else {
        return None;
    };
    Some(if negative { -magnitude } else { magnitude })
}

#[cfg(test)]
mod tests {
    use super::*;

    const YAML: &str = "---\n\
        cdiVersion: 0.5.0\n\
        kind: nvidia.com/gpu\n\
        containerEdits:\n  env:\n  - NVIDIA_VISIBLE_DEVICES=void\n  mounts: null\n\
        devices:\n\
        - name: 0\n  containerEdits:\n    deviceNodes:\n    - path: /dev/nvidia0\n      major: 195\n      fileMode: 0666\n      permissions: rw\n\
        - name: \"all\"\n  containerEdits:\n    additionalGids: [ 44 ]\n    hooks:\n    - {hookName: createContainer, path: /bin/x, args: [x, 1, \"2\"]}\n";

    #[test]
    fn yaml_keeps_text_where_cdi_has_text_and_numbers_where_it_has_numbers() {
        let spec = Spec::from_yaml(YAML).unwrap();
        assert_eq!(spec.devices[0].name, "0");
        let node = &spec.devices[0].container_edits.device_nodes[0];
        assert_eq!((node.major, node.file_mode), (195, Some(0o666)));
        assert_eq!(spec.devices[1].container_edits.additional_gids, [44]);
        assert_eq!(spec.devices[1].container_edits.hooks[0].args, ["x", "1", "2"]);
        assert!(spec.container_edits.mounts.is_empty());
    }

    #[test]
    fn the_same_file_in_json_is_the_same() {
        let spec = Spec::from_yaml(YAML).unwrap();
        let json = serde_json::to_vec(&spec).unwrap();
        assert_eq!(Spec::from_json(&json).unwrap(), spec);
    }

    #[test]
    fn unknown_fields_are_refused_in_both_forms() {
        assert!(matches!(
            Spec::from_yaml("cdiVersion: 0.5.0\nkind: a/b\ndevices: []\nextra: 1\n"),
            Err(ParseError::Shape(_))
        ));
        assert!(Spec::from_json(br#"{"cdiVersion":"0.5.0","kind":"a/b","devices":[],"x":1}"#).is_err());
        assert!(Spec::from_json(br#"{"cdiVersion":"0.5.0","kind":"a/b","devices":null}"#).is_err());
    }

    #[test]
    fn what_could_expand_or_confuse_is_refused() {
        for text in [
            "a: &x [1]\nb: *x\n",
            "a: 1\na: 2\n",
            "a: 1\n---\nb: 1\n",
            "? [a]\n: 1\n",
            "a: !!binary abc\n",
            "devices:\n- containerEdits:\n    deviceNodes:\n    - major: many\n",
            &"[".repeat(100),
            "a: [",
        ] {
            assert!(Spec::from_yaml(text).is_err(), "{text}");
        }
    }
}
