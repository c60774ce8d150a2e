//! `slipway inspect | history | version`: what there is to know.

use anyhow::Result;
use serde_json::{Value, json};
use slipway_image::{ChainId, Image, Store};

use crate::args::{Format, HistoryArgs, InspectArgs};
use crate::images::{self, blocking, find};
use crate::text;

/// `slipway inspect`: as JSON an object for one image, an array for several.
pub async fn inspect(store: &Store, args: InspectArgs) -> Result<()> {
    let store = store.clone();
    let (images, format) = blocking(move || {
        let mut found = Vec::new();
        for name in &args.images {
            let image = find(&store, name)?;
            let config: Value = serde_json::from_slice(&store.config(&image.id)?)?;
            found.push(describe(&image, &config));
        }
        Ok((found, args.format.format))
    })
    .await?;
    match (format, images.as_slice()) {
        (Format::Json, [one]) => outln!("{}", serde_json::to_string_pretty(one)?),
        (Format::Json, many) => outln!("{}", serde_json::to_string_pretty(many)?),
        (Format::Table, many) => many.iter().for_each(|image| {
            // What an image says of itself does not speak to the terminal.
            for line in readable(image).lines() {
                outln!("{}", slipway_engine::printable(line.as_bytes()));
            }
        }),
    }
    Ok(())
}

fn describe(image: &Image, config: &Value) -> Value {
    let mut value = images::json(image);
    if let Some(object) = value.as_object_mut() {
        for key in ["architecture", "os", "variant", "author", "config", "history"] {
            if let Some(part) = config.get(key) {
                object.insert(key.to_owned(), part.clone());
            }
        }
        object.insert(
            "manifest".to_owned(),
            json!(image.manifest.map(|m| m.to_string())),
        );
    }
    value
}

/// What people look for first.
fn readable(image: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => list
            .iter()
            .map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join("\n            "),
        Value::Object(map) => map
            .iter()
            .map(|(k, v)| match v {
                Value::String(v) => format!("{k}={v}"),
                Value::Object(o) if o.is_empty() => k.clone(),
                other => format!("{k}={other}"),
            })
            .collect::<Vec<_>>()
            .join("\n            "),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            out.push_str(&format!("{name:<12}{value}\n"));
        }
    };
    line("id", text(&image["id"]));
    line("names", text(&image["names"]));
    line("digests", text(&image["repo_digests"]));
    line("platform", text(&image["platform"]));
    line("created", text(&image["created"]));
    line("size", text::size(image["size"].as_u64().unwrap_or(0)));
    let argv = |value: &Value| {
        if value.is_null() {
            String::new()
        } else {
            value.to_string()
        }
    };
    line("entrypoint", argv(&image["config"]["Entrypoint"]));
    line("cmd", argv(&image["config"]["Cmd"]));
    line("user", text(&image["config"]["User"]));
    line("directory", text(&image["config"]["WorkingDir"]));
    line("env", text(&image["config"]["Env"]));
    line("ports", text(&image["config"]["ExposedPorts"]));
    line("volumes", text(&image["config"]["Volumes"]));
    line("labels", text(&image["config"]["Labels"]));
    line("layers", text(&image["layers"]));
    if image["pinned"] == true {
        let why = if image["built_here"] == true {
            "yes: it was built here and exists nowhere else"
        } else {
            "yes"
        };
        line("pinned", why.to_owned());
    }
    out
}

/// `slipway history`, newest first.
pub async fn history(store: &Store, args: HistoryArgs) -> Result<()> {
    let store = store.clone();
    let (name, no_trunc, format) = (args.image, args.no_trunc, args.format.format);
    let lines = blocking(move || {
        let image = find(&store, &name)?;
        let config: Value = serde_json::from_slice(&store.config(&image.id)?)?;
        let mut chains = ChainId::all(&image.layers).into_iter();
        let mut lines = Vec::new();
        for entry in config["history"].as_array().unwrap_or(&Vec::new()) {
            let empty = entry["empty_layer"].as_bool().unwrap_or(false);
            let chain = if empty { None } else { chains.next() };
            let size = match chain {
                Some(chain) => store.layer(&chain)?.map_or(0, |l| l.usage.bytes),
                None => 0,
            };
            let mut line = entry.clone();
            if let Some(object) = line.as_object_mut() {
                object.insert("size".to_owned(), json!(size));
                object.insert("empty_layer".to_owned(), json!(empty));
            }
            lines.push(line);
        }
        lines.reverse();
        Ok(lines)
    })
    .await?;
    if format == Format::Json {
        outln!("{}", serde_json::to_string_pretty(&lines)?);
        return Ok(());
    }
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let by = line["created_by"]
                .as_str()
                .unwrap_or_default()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ");
            vec![
                line["created"]
                    .as_str()
                    .unwrap_or_default()
                    .get(..19)
                    .unwrap_or_default()
                    .replace('T', " "),
                text::size(line["size"].as_u64().unwrap_or(0)),
                if no_trunc { by } else { text::shorten(&by, 80) },
            ]
        })
        .collect();
    out!("{}", text::table(&["CREATED", "SIZE", "CREATED BY"], &rows));
    Ok(())
}

/// `slipway version`.
pub fn version(format: Format) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    match format {
        Format::Json => outln!("{}", json!({ "name": "slipway", "version": version })),
        Format::Table => outln!("slipway {version}"),
    }
    Ok(())
}
