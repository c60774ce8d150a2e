//! What kubelet tells of a pod on slipwayd beside what it tells of the same pod on containerd: /stats/summary and
//! /metrics/cadvisor, field by field.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::kube::Kube;
use crate::{OURS, PEER};

/// What the pod writes into its root, into a volume, and holds in a volume of memory.
const ROOT: f64 = 24e6;
const DISK: f64 = 12e6;
const MEMORY: f64 = 6e6;

pub async fn statistics_and_metrics_are_those_that_containerd_gives(k: Kube) -> Result<()> {
    let script = format!(
        "head -c {ROOT} /dev/zero > /written; head -c {DISK} /dev/zero > /disk/x; head -c {MEMORY} /dev/zero > /memory/x; \
         echo written; while true; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; sleep 0.1; done"
    );
    for (name, node) in [("ours", OURS), ("peer", PEER)] {
        k.pod(
            name,
            &script,
            json!({ "nodeName": format!("node{node}"), "nodeSelector": {},
                    "volumes": [{ "name": "disk", "emptyDir": {} },
                                { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "16Mi" } }] }),
            json!({ "resources": { "requests": { "cpu": "100m", "memory": "16Mi" },
                                   "limits": { "cpu": "1", "memory": "64Mi" } },
                    "volumeMounts": [{ "name": "disk", "mountPath": "/disk" }, { "name": "memory", "mountPath": "/memory" }] }),
        )?;
    }
    for name in ["ours", "peer"] {
        k.ready(name).await?;
        k.until_true("everything to be written", |k| {
            Ok(k.logs(name)?.contains("written"))
        })
        .await?;
    }
    // kubelet looks at volumes now and then, and has a rate of CPU from the second look on.
    let (ours, peer) = (field_paths(&k, OURS, "ours"), field_paths(&k, PEER, "peer"));
    k.until_true("every field of the summary", |_| {
        let (a, b) = (ours()?, peer()?);
        let all = |f: &BTreeMap<String, f64>| {
            f.contains_key("cpu.usageNanoCores")
                && f.get("volume[disk].usedBytes").is_some_and(|v| *v >= DISK)
                && f.get("containers[main].rootfs.usedBytes")
                    .is_some_and(|v| *v >= ROOT)
        };
        Ok(all(&a) && all(&b))
    })
    .await?;
    let (a, b) = (ours()?, peer()?);
    let mut wrong = missing("/stats/summary", a.keys(), b.keys());
    // What is written is the same, and so is what is read of it; the rest depends on the moment.
    for (field, slack) in [
        ("containers[main].rootfs.usedBytes", 1e6),
        ("containers[main].rootfs.capacityBytes", 1.0),
        ("volume[disk].usedBytes", 1e6),
        ("volume[memory].usedBytes", 1e6),
        ("ephemeral-storage.usedBytes", 2e6),
        ("ephemeral-storage.capacityBytes", 1.0),
        ("containers[main].memory.workingSetBytes", 30e6),
        ("containers[main].memory.availableBytes", 30e6),
        ("memory.workingSetBytes", 30e6),
        ("process_stats.process_count", 4.0),
    ] {
        if let (Some(x), Some(y)) = (a.get(field), b.get(field))
            && (x - y).abs() > slack
        {
            wrong.push(format!("/stats/summary {field}: {x}, and containerd's {y}"));
        }
    }
    let (a, b) = (metrics(&k, OURS, "ours")?, metrics(&k, PEER, "peer")?);
    ensure!(!b.is_empty(), "containerd has no metrics");
    wrong.extend(missing("/metrics/cadvisor", a.keys(), b.keys()));
    for (of, theirs) in &b {
        let lacking: Vec<_> = a
            .get(of)
            .map_or_else(Vec::new, |ours| theirs.difference(ours).collect());
        if !lacking.is_empty() {
            wrong.push(format!("/metrics/cadvisor {of} has no label {lacking:?}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Reads every number that the summary has of a pod, by its path; things in lists go by their names.
fn field_paths(k: &Kube, node: usize, pod: &str) -> impl Fn() -> Result<BTreeMap<String, f64>> {
    let (k, pod) = (k.clone(), pod.to_owned());
    move || {
        let text = k.ok(&[
            "get",
            "--raw",
            &format!("/api/v1/nodes/node{node}/proxy/stats/summary"),
        ])?;
        let all: Value = serde_json::from_str(&text)?;
        let pods = all["pods"].as_array().context("pods")?;
        let mut found = BTreeMap::new();
        let mine = |p: &&Value| p["podRef"]["namespace"] == k.space && p["podRef"]["name"] == pod;
        if let Some(p) = pods.iter().find(mine) {
            numbers("", p, &mut found);
        }
        Ok(found)
    }
}

fn numbers(path: &str, value: &Value, found: &mut BTreeMap<String, f64>) {
    match value {
        Value::Object(o) => {
            for (key, v) in o {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                numbers(&path, v, found);
            }
        }
        Value::Array(list) => {
            for v in list {
                let name = v["name"].as_str().unwrap_or("?");
                // The token's volume has a name of its own in each pod.
                let name = name.split("access-").next().unwrap_or(name);
                numbers(&format!("{path}[{name}]"), v, found);
            }
        }
        Value::Number(n) => {
            found.insert(path.to_owned(), n.as_f64().unwrap_or(0.0));
        }
        _ => {}
    }
}

/// The metrics of a pod: what each is of, with the names of its labels.
fn metrics(k: &Kube, node: usize, pod: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let text = k.ok(&[
        "get",
        "--raw",
        &format!("/api/v1/nodes/node{node}/proxy/metrics/cadvisor"),
    ])?;
    let (space, pod) = (format!("namespace=\"{}\"", k.space), format!("pod=\"{pod}\""));
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|l| l.contains(&space) && l.contains(&pod)) {
        let (name, rest) = line.split_once('{').with_context(|| line.to_owned())?;
        let labels = rest.rsplit_once('}').with_context(|| line.to_owned())?.0;
        let (mut of, mut names) = (name.to_owned(), BTreeSet::new());
        for l in labels.split("\",") {
            let (label, value) = l.split_once("=\"").with_context(|| line.to_owned())?;
            // The container's or the pod's; and kinds are the same everywhere, as names of the machine's devices are not.
            if ["container", "failure_type", "scope", "state"].contains(&label) {
                of = format!("{of} {label}={}", value.trim_end_matches('"'));
            }
            names.insert(label.to_owned());
        }
        found.entry(of).or_default().extend(names);
    }
    Ok(found)
}

fn missing<'a>(
    what: &str,
    ours: impl Iterator<Item = &'a String>,
    theirs: impl Iterator<Item = &'a String>,
) -> Vec<String> {
    let (a, b): (BTreeSet<_>, BTreeSet<_>) = (ours.collect(), theirs.collect());
    println!(
        "{what}: {} fields, {} of them not containerd's, which has {}",
        a.len(),
        a.difference(&b).count(),
        b.len()
    );
    b.difference(&a)
        .map(|f| format!("{what}: containerd has {f}, and we do not"))
        .collect()
}
