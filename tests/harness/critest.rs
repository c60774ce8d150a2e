//! critest, the CRI's own conformance suite, and the images it asks for by name.
//!
//! Its images live in registries of the internet: local equivalents are built from tests/images/Dockerfile and served by a
//! registry that stands in for theirs. It expects to be the runtime's only client, and uses ports 12000 to 12003.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::lab::{self, Lab};
use crate::registry::Registry;
use crate::{cmd, image};

/// The registries that its image names start with.
pub const HOSTS: &[&str] = &["registry.k8s.io", "k8s.gcr.io", "gcr.io"];

/// stage, build arguments, repository with tag.
const IMAGES: &[(&str, &[&str], &str)] = &[
    ("busybox", &[], "e2e-test-images/busybox:1.29-2"),
    ("nginx", &[], "e2e-test-images/nginx:1.14-2"),
    ("httpd", &[], "e2e-test-images/httpd:2.4.39-4"),
    ("nonewprivs", &[], "e2e-test-images/nonewprivs:1.3"),
    ("pause", &[], "pause:3.9"),
    (
        "user",
        &["USER=1002"],
        "k8s-staging-cri-tools/test-image-user-uid:latest",
    ),
    (
        "user",
        &["USER=www-data"],
        "k8s-staging-cri-tools/test-image-user-username:latest",
    ),
    (
        "user",
        &["USER=1003:1004"],
        "k8s-staging-cri-tools/test-image-user-uid-group:latest",
    ),
    (
        "user",
        &["USER=www-data:1004"],
        "k8s-staging-cri-tools/test-image-user-username-group:latest",
    ),
    (
        "predefined-group",
        &[],
        "k8s-staging-cri-tools/test-image-predefined-group:latest",
    ),
    (
        "nginx",
        &["PORT=12003"],
        "k8s-staging-cri-tools/hostnet-nginx-amd64:latest",
    ),
    (
        "marked",
        &["TEST=latest"],
        "k8s-staging-cri-tools/test-image-latest:latest",
    ),
    (
        "marked",
        &["TEST=digest"],
        "k8s-staging-cri-tools/test-image-digest:latest",
    ),
    ("marked", &["TEST=1"], "k8s-staging-cri-tools/test-image-1:latest"),
    ("marked", &["TEST=2"], "k8s-staging-cri-tools/test-image-2:latest"),
    ("marked", &["TEST=3"], "k8s-staging-cri-tools/test-image-3:latest"),
    (
        "marked",
        &["TEST=same-image"],
        "k8s-staging-cri-tools/test-image-tags:1",
    ),
    (
        "marked",
        &["TEST=same-image"],
        "k8s-staging-cri-tools/test-image-tags:2",
    ),
    (
        "marked",
        &["TEST=same-image"],
        "k8s-staging-cri-tools/test-image-tags:3",
    ),
    (
        "marked",
        &["TEST=test"],
        "k8s-staging-cri-tools/test-image-tag:test",
    ),
    (
        "marked",
        &["TEST=all"],
        "k8s-staging-cri-tools/test-image-tag:all",
    ),
];

/// Builds every image critest asks for into a store of its own below `lab` and pushes it to `registry`.
///
/// # Errors
/// As [`image::stage`].
pub fn push_images(lab: &Lab, registry: &Registry) -> Result<()> {
    for (stage, args, name) in IMAGES {
        image::stage(&lab.join("images"), registry, stage, args, name)?;
    }
    Ok(())
}

/// How the streaming specs connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// SPDY/3.1.
    Spdy,
    /// WebSocket, with SPDY tunnelled in it for port-forward.
    WebSocket,
}

/// What became of one spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Containers and leaf, as ginkgo joins them.
    pub name: String,
    /// passed, failed, skipped, …
    pub state: String,
    /// Why it failed; empty otherwise.
    pub why: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<Report>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    message: Option<String>,
}

/// Runs critest against the runtime at `socket`; `focus`: only specs that match this expression.
///
/// # Errors
/// It is not built, ran past 15 minutes, or left no report.
pub fn run(lab: &Lab, socket: &Path, transport: Transport, focus: Option<&str>) -> Result<Vec<Spec>> {
    let endpoint = format!("unix://{}", socket.display());
    let yaml = format!("runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 60\n");
    let config = lab.write("crictl.yaml", yaml)?;
    let report = lab.join(format!("critest-{transport:?}.json"));
    let log = lab.join(format!("critest-{transport:?}.log"));
    let temp = lab.join("critest-tmp");
    std::fs::create_dir_all(&temp)?;
    let mut c = cmd::command(lab::tool("critest"), ["-ginkgo.no-color", "-ginkgo.timeout=14m"]);
    c.arg(format!("-ginkgo.json-report={}", report.display()))
        .arg("-config")
        .arg(&config)
        .args(["-runtime-endpoint", &endpoint, "-image-endpoint", &endpoint])
        .env("TMPDIR", &temp)
        .current_dir(lab.path());
    if transport == Transport::WebSocket {
        c.args(["-websocket-exec", "-websocket-attach", "-websocket-portforward"]);
    }
    if let Some(f) = focus {
        c.args(["-ginkgo.focus", f]);
    }
    let o = cmd::run(&mut c, Duration::from_secs(900))?;
    std::fs::write(&log, format!("{}\n{}", o.stdout, o.stderr))?;
    let text = std::fs::read(&report).with_context(|| {
        format!(
            "critest ended with {} and left no report:\n{}\n{}",
            o.code, o.stdout, o.stderr
        )
    })?;
    parse(&text)
}

fn parse(json: &[u8]) -> Result<Vec<Spec>> {
    let suites: Vec<Suite> = serde_json::from_slice(json).context("reading critest's report")?;
    let mut specs = Vec::new();
    for r in suites
        .into_iter()
        .flat_map(|s| s.spec_reports.unwrap_or_default())
    {
        let it = r.leaf_node_type == "It";
        // A failed set-up of the whole suite must not read as "nothing failed".
        if !it && r.state == "passed" {
            continue;
        }
        let mut name = r.container_hierarchy_texts.unwrap_or_default();
        name.push(if it { r.leaf_node_text } else { r.leaf_node_type });
        specs.push(Spec {
            name: name.join(" "),
            state: r.state,
            why: r.failure.and_then(|f| f.message).unwrap_or_default(),
        });
    }
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(specs)
}

/// The verdicts as a table: a line of counts, then what failed with its reason's first lines, then what was skipped.
pub fn table(transport: Transport, specs: &[Spec]) -> String {
    let of = |state: &str| specs.iter().filter(|s| s.state == state).count();
    let (passed, skipped) = (of("passed"), of("skipped") + of("pending"));
    let failed = specs.len() - passed - skipped;
    let mut t = format!(
        "critest over {transport:?}: {} specs, {passed} passed, {failed} failed, {skipped} skipped",
        specs.len()
    );
    for s in specs.iter().filter(|s| s.state != "passed") {
        let _ = write!(t, "\n  {:8} {}", s.state, s.name);
        if s.state != "skipped" && s.state != "pending" {
            for l in s.why.lines().take(6) {
                let _ = write!(t, "\n             {l}");
            }
        }
    }
    t
}
