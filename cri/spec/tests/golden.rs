//! Golden tests: each `tests/golden/*.json` is a container's wishes; `*.expected` beside it is what
//! becomes of them. `UPDATE=1 cargo test -p slipway-spec` rewrites the expectations: read the diff.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use slipway_spec::{SpecInput, generate};

/// A file is one case, or several: name → wishes, for cases whose outcome is short.
#[derive(Deserialize)]
#[serde(untagged)]
enum File {
    Many {
        cases: std::collections::BTreeMap<String, Value>,
    },
    One(Value),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text.push_str(": ");
        text.push_str(&e.to_string());
        source = e.source();
    }
    text
}

fn outcome(wishes: &Value) -> String {
    let input: SpecInput = serde_json::from_value(wishes.clone()).expect("a SpecInput");
    match generate(&input) {
        Err(e) => format!("refused: {}\n", chain(&e)),
        Ok(out) => {
            let mut text = format!(
                "user: {}:{} groups {:?} home {} name {:?}\nstop signal: {} ({})\nvolumes: {:?}\n",
                out.user.uid,
                out.user.gid,
                out.user.additional_gids,
                out.user.home,
                out.user.name,
                out.stop_signal,
                out.stop_signal_number,
                out.volumes
            );
            for warning in &out.warnings {
                text.push_str(&format!("warning: {warning}\n"));
            }
            let mut spec: Value = serde_json::from_slice(&out.to_json()).expect("JSON");
            shorten(&mut spec);
            text.push_str(&serde_json::to_string_pretty(&spec).expect("JSON"));
            text.push('\n');
            text
        }
    }
}

/// The profile has tests of its own and depends on the machine.
fn shorten(spec: &mut Value) {
    if let Some(seccomp) = spec.pointer_mut("/linux/seccomp") {
        *seccomp = Value::String(format!(
            "a profile with the default action {}",
            seccomp["defaultAction"]
        ));
    }
}

fn render(path: &Path) -> String {
    let text = fs::read(path).expect("readable");
    match serde_json::from_slice::<File>(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display())) {
        File::One(wishes) => outcome(&wishes),
        File::Many { cases } => cases
            .iter()
            .map(|(name, wishes)| format!("{name}\n    {}", outcome(wishes)))
            .collect(),
    }
}

#[test]
fn wishes_become_the_specifications_that_are_expected() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let update = std::env::var_os("UPDATE").is_some_and(|v| v == "1");
    let mut seen = 0;
    let mut wrong = Vec::new();
    let mut files: Vec<_> = fs::read_dir(&dir)
        .expect("the folder")
        .map(|e| e.expect("an entry").path())
        .collect();
    files.sort();
    for path in files
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "json"))
    {
        seen += 1;
        let (got, expected) = (render(path), path.with_extension("expected"));
        if update {
            fs::write(&expected, &got).expect("writable");
        } else if fs::read_to_string(&expected).unwrap_or_default() != got {
            wrong.push(format!("{}:\n{got}", path.display()));
        }
    }
    assert!(seen >= 10, "only {seen} golden cases were found");
    assert!(
        wrong.is_empty(),
        "not as expected (UPDATE=1 rewrites):\n{}",
        wrong.join("\n")
    );
}
