//! config.json with a stable order: oci-spec keeps maps and sets that iterate at random.

use oci_spec::runtime::Spec;
use serde_json::{Map, Value};

/// Keys of lists that are sets.
const SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// The specification's JSON, objects and sets sorted, indented for people.
pub(crate) fn stable(spec: &Spec) -> Vec<u8> {
    let value = serde_json::to_value(spec).expect("a specification has only text keys");
    let sorted = sort(value, "");
    let mut text = serde_json::to_vec_pretty(&sorted).expect("a JSON value can be written");
    text.push(b'\n');
    text
}

fn sort(value: Value, key: &str) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            let sorted: Map<String, Value> = entries
                .into_iter()
                .map(|(k, v)| (k.clone(), sort(v, &k)))
                .collect();
            Value::Object(sorted)
        }
        Value::Array(mut list) => {
            if SETS.contains(&key) {
                list.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
            }
            Value::Array(list.into_iter().map(|v| sort(v, "")).collect())
        }
        other => other,
    }
}
