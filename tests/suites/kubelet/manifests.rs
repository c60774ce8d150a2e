//! manifests/: every overlay and every example is one that the API server takes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::{cmd, lab};
use serde_json::json;

use crate::daemonset::SPACE;
use crate::kube::Kube;

/// What a Prometheus operator brings: the API server knows no ServiceMonitor by itself.
const SERVICE_MONITOR: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: servicemonitors.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  names: {kind: ServiceMonitor, plural: servicemonitors, singular: servicemonitor, listKind: ServiceMonitorList}
  scope: Namespaced
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema: {type: object, properties: {spec: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
";

fn entries(dir: &str) -> Result<Vec<PathBuf>> {
    let dir = lab::repo().join("manifests").join(dir);
    let read = std::fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut all: Vec<PathBuf> = read.flatten().map(|e| e.path()).collect();
    all.sort();
    Ok(all)
}

fn dry_run(k: &Kube, flag: &str, path: &Path) -> Result<String> {
    let path = path.display().to_string();
    k.cluster
        .kubectl(&["apply", "--dry-run=server", "--validate=strict", flag, &path])
}

/// Has the API server take ServiceMonitors from now on.
pub fn servicemonitors_are_known(k: &Kube) -> Result<()> {
    k.cluster.apply(SERVICE_MONITOR)?;
    k.cluster.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd/servicemonitors.monitoring.coreos.com",
        "--timeout=30s",
    ])?;
    Ok(())
}

pub async fn the_api_server_takes_every_overlay_and_example(k: Kube) -> Result<()> {
    servicemonitors_are_known(&k)?;
    let base = lab::repo().join("manifests/base");
    k.cluster
        .apply(&std::fs::read_to_string(base.join("namespace.yaml"))?)?;
    let mut overlays = entries("overlays")?;
    overlays.push(base);
    for overlay in &overlays {
        let said = dry_run(&k, "-k", overlay)?;
        let has_agent = said.contains("daemonset.apps/slipway-agent");
        ensure!(
            has_agent != overlay.ends_with("no-gpu"),
            "{}: {said}",
            overlay.display()
        );
        ensure!(said.contains("daemonset.apps/slipway-node-setup"), "{said}");
    }
    let examples = entries("examples")?;
    let manifests = examples
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"));
    for example in manifests {
        dry_run(&k, "-f", example)?;
    }
    the_agent_can_read_its_configurations(&overlays)
}

/// Says no to what an agent's account asks about another node, by the node's name in its token.
pub async fn an_agents_account_is_of_its_own_node(k: Kube) -> Result<()> {
    let policy = lab::repo()
        .join("manifests/base/admission.yaml")
        .display()
        .to_string();
    k.cluster.kubectl(&["apply", "-f", &policy])?;
    // Nobody runs them: there are no such nodes.
    for node in ["here", "there"] {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("of-{node}") },
            "spec": { "nodeName": node, "containers": [{ "name": "main", "image": "slipway.local/none:1" }] },
        });
        k.apply(&pod.to_string())?;
    }
    // What it may by its role is another test's: here it may everything that admission lets it.
    let account = format!("--as=system:serviceaccount:{SPACE}:slipway-agent");
    let rights = "--as-group=system:masters";
    let node = |name: &str| format!("--as-user-extra=authentication.kubernetes.io/node-name={name}");
    let delete = |pod: &str, more: &[&str]| {
        let args = ["delete", "pod", pod, "--dry-run=server", &account, rights];
        k.ok(&[&args, more].concat()).map_err(|e| format!("{e:#}"))
    };
    let refused = |said: &std::result::Result<String, String>| {
        said.as_ref()
            .is_err_and(|e| e.contains("may only do this on its own node"))
    };
    // So it is where kustomize has put it into another namespace; an account of another name is nobody's agent.
    let as_another = |account: &str| {
        let account = format!("--as=system:serviceaccount:{account}");
        let args = ["delete", "pod", "of-there", "--dry-run=server", &account, rights];
        let node_name = node("here");
        k.ok(&[&args[..], &[&node_name]].concat())
            .map_err(|e| format!("{e:#}"))
    };
    // A policy is in force a moment after it is made.
    k.until_true("another node's pod to be kept", |_| {
        Ok(refused(&delete("of-there", &[&node("here")])))
    })
    .await?;
    let own = delete("of-here", &[&node("here")]);
    ensure!(own.is_ok(), "{own:?}");
    let nameless = delete("of-here", &[]);
    ensure!(refused(&nameless), "{nameless:?}");
    let moved = as_another("gpu-operators:slipway-agent");
    ensure!(refused(&moved), "{moved:?}");
    for free in ["slipway-system:not-slipway-agent", "slipway-agent:default"] {
        let other = as_another(free);
        ensure!(other.is_ok(), "{free}: {other:?}");
    }
    let label = |name: &str| {
        let node_name = node("node1");
        let args = [
            "label",
            "node",
            name,
            "a=b",
            "--dry-run=server",
            &account,
            rights,
            &node_name,
        ];
        k.ok(&args).map_err(|e| format!("{e:#}"))
    };
    let (own, other) = (label("node1"), label("node2"));
    ensure!(own.is_ok() && refused(&other), "{own:?} {other:?}");
    k.ok(&[
        "delete",
        "pod",
        "of-here",
        "of-there",
        "--force",
        "--grace-period=0",
    ])?;
    Ok(())
}

fn the_agent_can_read_its_configurations(overlays: &[PathBuf]) -> Result<()> {
    for file in overlays
        .iter()
        .map(|o| o.join("agent.toml"))
        .filter(|f| f.exists())
    {
        let mut check = cmd::command(lab::bin("slipway-agent"), ["--config"]);
        check.arg(&file).args(["config", "check"]);
        check
            .env("KUBERNETES_SERVICE_HOST", "127.0.0.1")
            .env("KUBERNETES_SERVICE_PORT", "1");
        cmd::run(&mut check, Duration::from_secs(10))?
            .ok()
            .with_context(|| file.display().to_string())?;
    }
    Ok(())
}
