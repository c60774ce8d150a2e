//! Holds the crate graph against the arrows written in ARCHITECTURE.md: the fenced block that begins with ```arrows.
//!
//! Only arrows between our own crates count, dev-dependencies too; a crate that the block does not name, and an arrow it
//! does not have, fail.
#![forbid(unsafe_code)]

mod skips;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// "a → b, c" lines of the arrows block.
fn allowed(architecture: &str) -> Graph {
    let block = architecture
        .split("```arrows\n")
        .nth(1)
        .and_then(|r| r.split("```").next())
        .expect("an arrows block");
    block
        .lines()
        .filter(|l| !l.trim().is_empty())
        .map(|l| {
            let (from, to) = l.split_once('→').unwrap_or((l, ""));
            let to = to
                .split(',')
                .map(|t| t.trim().to_owned())
                .filter(|t| !t.is_empty())
                .collect();
            (from.trim().to_owned(), to)
        })
        .collect()
}

/// The arrows between workspace members, from `cargo metadata --no-deps`.
fn actual(metadata: &serde_json::Value) -> Graph {
    let packages = metadata["packages"].as_array().expect("packages");
    let ours: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    packages
        .iter()
        .map(|p| {
            let deps = p["dependencies"].as_array().expect("dependencies");
            let to = deps
                .iter()
                .filter_map(|d| d["name"].as_str())
                .filter(|d| ours.contains(d))
                .map(str::to_owned)
                .collect();
            (p["name"].as_str().expect("a name").to_owned(), to)
        })
        .collect()
}

/// What of `actual` is forbidden, a line each.
fn forbidden(allowed: &Graph, actual: &Graph) -> Vec<String> {
    let mut wrong = Vec::new();
    for (from, to) in actual {
        let Some(may) = allowed.get(from) else {
            wrong.push(format!("{from} is not in ARCHITECTURE.md's arrows"));
            continue;
        };
        wrong.extend(
            to.difference(may)
                .map(|t| format!("{from} → {t} is not an arrow of ARCHITECTURE.md")),
        );
    }
    wrong
}

fn metadata() -> serde_json::Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent");
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root)
        .output()
        .expect("cargo metadata runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON")
}

fn architecture() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent");
    std::fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md")
}

#[test]
fn the_crate_graph_has_only_the_arrows_of_the_architecture() {
    let wrong = forbidden(&allowed(&architecture()), &actual(&metadata()));
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn a_forbidden_arrow_is_found() {
    let allowed = allowed(&architecture());
    let mut graph = actual(&metadata());
    graph
        .get_mut("slipway-sys")
        .expect("slipway-sys")
        .insert("slipwayd".into());
    graph.insert("slipway-new".into(), BTreeSet::new());
    assert_eq!(
        forbidden(&allowed, &graph),
        [
            "slipway-new is not in ARCHITECTURE.md's arrows",
            "slipway-sys → slipwayd is not an arrow of ARCHITECTURE.md"
        ]
    );
}

#[test]
fn nobody_imports_a_program() {
    let programs = [
        "slipwayd",
        "slipway-cli",
        "containerd-shim-slipway-v1",
        "slipway-runc",
        "slipway-agent",
    ];
    for (from, to) in actual(&metadata()) {
        for p in programs {
            assert!(!to.contains(p), "{from} imports the program {p}; run it instead");
        }
    }
}
