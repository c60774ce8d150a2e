//! The image's configuration as BuildKit writes it: config, history with its times, rootfs. Pure.

use std::time::SystemTime;

use serde_json::{Map, Value, json};
use slipway_dockerfile::Platform;
use slipway_dockerfile::image::{History, ImageConfig};
use slipway_image::DiffId;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// One line of an image's history.
#[derive(Debug, Clone)]
pub enum Entry {
    /// Of the base image, as it is there.
    Base(Value),
    /// Of a step of this build.
    Step {
        /// What it says.
        history: History,
        /// When its layer was made; `None`: it made none.
        created: Option<SystemTime>,
    },
}

/// What the configuration is made of.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The image's platform.
    pub platform: &'a Platform,
    /// The `config` object.
    pub config: &'a ImageConfig,
    /// The `author` field.
    pub author: Option<&'a str>,
    /// Oldest first.
    pub history: &'a [Entry],
    /// Lowest first.
    pub layers: &'a [DiffId],
    /// SOURCE_DATE_EPOCH.
    pub epoch: Option<i64>,
    /// Used where nothing else gives a time: an image without any layer of known age.
    pub now: SystemTime,
}

/// The bytes of the configuration. The same parts give the same bytes.
#[must_use]
pub fn bytes(parts: &Parts<'_>) -> Vec<u8> {
    let (history, created) = history(parts);
    let mut image = Map::new();
    image.insert("architecture".into(), json!(parts.platform.architecture));
    image.insert("os".into(), json!(parts.platform.os));
    if !parts.platform.variant.is_empty() {
        image.insert("variant".into(), json!(parts.platform.variant));
    }
    if let Some(author) = parts.author.filter(|a| !a.is_empty()) {
        image.insert("author".into(), json!(author));
    }
    image.insert(
        "config".into(),
        serde_json::to_value(parts.config).unwrap_or_default(),
    );
    image.insert("created".into(), json!(created));
    image.insert("history".into(), Value::Array(history));
    let layers: Vec<String> = parts.layers.iter().map(ToString::to_string).collect();
    image.insert("rootfs".into(), json!({ "type": "layers", "diff_ids": layers }));
    serde_json::to_vec(&Value::Object(image)).unwrap_or_default()
}

/// History with all its times, and the image's own.
///
/// A line without a layer gets the time of the layer before it, or of the first one this build made; with an epoch,
/// every line this build added has that time, unless its layer is older.
fn history(parts: &Parts<'_>) -> (Vec<Value>, String) {
    let epoch = parts
        .epoch
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s).ok());
    let clamp = |t: OffsetDateTime| epoch.map_or(t, |e| t.min(e));
    let mut lines: Vec<(Value, Option<String>)> = Vec::new();
    for entry in parts.history {
        lines.push(match entry {
            Entry::Base(value) => (
                value.clone(),
                value.get("created").and_then(Value::as_str).map(str::to_owned),
            ),
            Entry::Step { history, created } => {
                let time = match (created, epoch) {
                    (Some(created), _) => Some(clamp(OffsetDateTime::from(*created))),
                    (None, epoch) => epoch,
                };
                (serde_json::to_value(history).unwrap_or_default(), time.map(text))
            }
        });
    }
    let mut current = first_time(&lines);
    let mut missing = false;
    for (_, time) in &mut lines {
        match time {
            Some(time) if missing => current = Some(time.clone()),
            Some(_) => {}
            None => {
                missing = true;
                time.clone_from(&current);
            }
        }
    }
    let fallback = || text(epoch.unwrap_or_else(|| OffsetDateTime::from(parts.now)));
    let created = lines
        .iter()
        .rev()
        .find_map(|(_, t)| t.clone())
        .unwrap_or_else(fallback);
    let values = lines
        .into_iter()
        .map(|(mut value, time)| {
            if let (Some(object), Some(time)) = (value.as_object_mut(), time) {
                object.insert("created".into(), Value::String(time));
            }
            value
        })
        .collect();
    (values, created)
}

/// The time of the first line that comes after one without a time; else of the last line that has one.
fn first_time(lines: &[(Value, Option<String>)]) -> Option<String> {
    let mut found = None;
    let mut missing = false;
    for (_, time) in lines {
        match time {
            Some(time) => {
                found = Some(time.clone());
                if missing {
                    break;
                }
            }
            None => missing = true,
        }
    }
    found
}

fn text(time: OffsetDateTime) -> String {
    time.to_offset(time::UtcOffset::UTC)
        .format(&Rfc3339)
        .unwrap_or_default()
}

/// The history of a base image, with a line for each layer it says nothing about.
#[must_use]
pub fn base_history(config: &Value, layers: usize) -> Vec<Entry> {
    let mut lines: Vec<Value> = config
        .get("history")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let mut with_layer = 0;
    for line in &mut lines {
        if line.get("empty_layer").and_then(Value::as_bool).unwrap_or(false) {
            continue;
        }
        if with_layer >= layers {
            if let Some(object) = line.as_object_mut() {
                object.insert("empty_layer".into(), Value::Bool(true));
            }
        } else {
            with_layer += 1;
        }
    }
    for _ in with_layer..layers {
        let created = config.get("created").cloned().unwrap_or(Value::Null);
        let mut line = json!({ "comment": "imported from an image without history" });
        if let (Some(object), false) = (line.as_object_mut(), created.is_null()) {
            object.insert("created".into(), created);
        }
        lines.push(line);
    }
    lines.into_iter().map(Entry::Base).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn line(text: &str, empty_layer: bool) -> History {
        History {
            created_by: text.into(),
            comment: "buildkit.dockerfile.v0".into(),
            empty_layer,
        }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn config(history: &[Entry], epoch: Option<i64>) -> Value {
        let config = ImageConfig {
            env: vec!["A=b".into()],
            ..ImageConfig::default()
        };
        let platform = Platform::new("linux", "amd64");
        let parts = Parts {
            platform: &platform,
            config: &config,
            author: None,
            history,
            layers: &[],
            epoch,
            now: at(9),
        };
        serde_json::from_slice(&bytes(&parts)).unwrap()
    }

    #[test]
    fn lines_without_a_layer_take_the_time_of_their_neighbours() {
        let history = [
            Entry::Base(json!({ "created": "2001-01-01T00:00:00Z", "created_by": "base" })),
            Entry::Step {
                history: line("ENV A=b", true),
                created: None,
            },
            Entry::Step {
                history: line("RUN x", false),
                created: Some(at(100)),
            },
            Entry::Step {
                history: line("CMD y", true),
                created: None,
            },
        ];
        let made = config(&history, None);
        let times: Vec<&str> = made["history"]
            .as_array()
            .unwrap()
            .iter()
            .map(|h| h["created"].as_str().unwrap())
            .collect();
        assert_eq!(
            times,
            [
                "2001-01-01T00:00:00Z",
                "1970-01-01T00:01:40Z",
                "1970-01-01T00:01:40Z",
                "1970-01-01T00:01:40Z"
            ]
        );
        assert_eq!(made["created"], "1970-01-01T00:01:40Z");
        assert_eq!(made["history"][1]["empty_layer"], true);
        assert!(made["history"][2].get("empty_layer").is_none());
    }

    #[test]
    fn with_an_epoch_every_new_line_has_its_time_and_the_bases_keep_theirs() {
        let history = [
            Entry::Base(json!({ "created": "2031-01-01T00:00:00Z" })),
            Entry::Step {
                history: line("ENV A=b", true),
                created: None,
            },
            Entry::Step {
                history: line("RUN x", false),
                created: Some(at(2_000_000_000)),
            },
        ];
        let made = config(&history, Some(1_700_000_000));
        assert_eq!(made["history"][0]["created"], "2031-01-01T00:00:00Z");
        assert_eq!(made["history"][1]["created"], "2023-11-14T22:13:20Z");
        assert_eq!(made["history"][2]["created"], "2023-11-14T22:13:20Z");
        assert_eq!(made["created"], "2023-11-14T22:13:20Z");
    }

    #[test]
    fn the_same_parts_give_the_same_bytes() {
        let history = [Entry::Step {
            history: line("RUN x", false),
            created: Some(at(5)),
        }];
        assert_eq!(config(&history, None), config(&history, None));
    }

    #[test]
    fn a_base_without_history_gets_a_line_for_each_layer() {
        assert_eq!(base_history(&json!({}), 2).len(), 2);
        let told = json!({ "history": [{ "created_by": "a" }, { "created_by": "b", "empty_layer": true }] });
        assert_eq!(base_history(&told, 1).len(), 2);
        assert_eq!(base_history(&told, 2).len(), 3);
    }
}
