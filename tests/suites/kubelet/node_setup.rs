//! The DaemonSet that sets a node up, applied through the overlay without GPUs: to a directory in place of the node's root, with a
//! systemctl that only notes what it is told. What systemd makes of it is shown in the guest (tests/vm).

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use harness::{cmd, lab};
use serde_json::json;

use crate::daemonset::{NODE_IMAGE, SPACE, build, change, node_image, overlay};
use crate::kube::Kube;

/// A node's label in place of the one that has the real root set up.
const LABEL: &str = "slipway.test/set-up";
const FAKE: &str = "RUN printf '#!/bin/sh\\necho \"$@\" >> /host/systemctl.log\\n' > /usr/bin/systemctl && chmod 755 /usr/bin/systemctl\n";

struct Node<'a> {
    k: &'a Kube,
    root: PathBuf,
}

impl Node<'_> {
    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.k.cluster.kubectl(&[&["-n", SPACE], args].concat())
    }

    /// Applies the overlay with the image of this tag.
    fn apply(&self, tag: &str) -> Result<()> {
        let mut patch = Vec::new();
        patch.extend(change("volumes/0/hostPath/path", "/", &json!(self.root)));
        patch.push(json!({ "op": "replace", "path": "/spec/template/spec/nodeSelector", "value": { LABEL: "true" } }));
        // Pid 1 is the container's own, and nsenter stays in it.
        patch.push(json!({ "op": "replace", "path": "/spec/template/spec/hostPID", "value": false }));
        let more = json!({ "patches": [{ "target": { "kind": "DaemonSet", "name": "slipway-node-setup" },
            "patch": json!(patch).to_string() }] });
        let at = overlay(
            &self.k.cluster,
            &format!("set-up-{tag}"),
            "overlays/no-gpu",
            tag,
            &more,
        )?;
        let said = self.kubectl(&["apply", "-k", &at.display().to_string()])?;
        ensure!(
            !said.contains("slipway-agent"),
            "without GPUs there is no agent: {said}"
        );
        Ok(())
    }

    fn rolled_out(&self) -> Result<()> {
        let args = [
            "rollout",
            "status",
            "daemonset/slipway-node-setup",
            "--timeout=90s",
        ];
        self.kubectl(&args).with_context(|| self.log()).map(drop)
    }

    fn log(&self) -> String {
        let args = [
            "logs",
            "-l",
            "app.kubernetes.io/name=slipway-node-setup",
            "-c",
            "install",
        ];
        self.kubectl(&args).unwrap_or_else(|e| format!("{e:#}"))
    }

    /// What systemd was told since this was asked last.
    fn told(&self) -> Result<Vec<String>> {
        let log = self.root.join("systemctl.log");
        let text = std::fs::read_to_string(&log).with_context(|| self.log())?;
        std::fs::remove_file(&log)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Another pod of the same image, as after a node's restart.
    fn again(&self) -> Result<()> {
        let of = "app.kubernetes.io/name=slipway-node-setup";
        self.kubectl(&["delete", "pod", "-l", of, "--wait", "--grace-period=1"])?;
        self.rolled_out()
    }

    fn mode(&self, file: &str) -> Result<u32> {
        let meta =
            std::fs::metadata(self.root.join(file)).with_context(|| format!("{file}: {}", self.log()))?;
        Ok(meta.permissions().mode() & 0o7777)
    }
}

/// What programs need to run with `root` as their root: their libraries.
fn libraries(root: &Path) -> Result<()> {
    cmd::sh(&format!(
        "ldd '{}' | grep -o '/[^ ]*' | while read -r f; do mkdir -p \"{1}$(dirname $f)\" && cp -L $f \"{1}$f\"; done",
        lab::bin("slipwayd").display(),
        root.display()
    ))?;
    Ok(())
}

pub async fn the_set_up_daemon_set_installs_upgrades_and_leaves_a_wrong_node_alone(k: Kube) -> Result<()> {
    node_image(&k.cluster)?;
    let image = |tag: &str, more: &str| {
        build(
            &k.cluster,
            &format!("slipway.local/node:{tag}"),
            &format!("FROM {NODE_IMAGE}\n{FAKE}{more}"),
        )
    };
    image("first", "")?;
    image("second", "RUN printf 2 >> /slipway/bin/slipwayd\n")?;
    image("third", "RUN printf 3 >> /slipway/bin/slipwayd\n")?;
    // As a node of today is, as far as is looked at.
    let root = k.cluster.dir().join("host");
    for dir in ["run/systemd/system", "sys/fs/cgroup", "etc", "usr/bin"] {
        std::fs::create_dir_all(root.join(dir))?;
    }
    std::fs::write(root.join("sys/fs/cgroup/cgroup.controllers"), "cpu memory\n")?;
    libraries(&root)?;
    let node = Node { k: &k, root };
    k.cluster
        .kubectl(&["label", "node", "node1", &format!("{LABEL}=true")])?;
    let verdict = on(&node).await.with_context(|| {
        let space = SPACE.to_owned();
        let cluster = k.cluster.clone();
        Kube { cluster, space }.picture()
    });
    k.cluster
        .kubectl(&["label", "node", "node1", &format!("{LABEL}-")])?;
    node.kubectl(&[
        "delete",
        "daemonset/slipway-node-setup",
        "--wait",
        "--cascade=foreground",
    ])?;
    verdict
}

async fn on(node: &Node<'_>) -> Result<()> {
    node.apply("first")?;
    node.rolled_out()?;
    for p in [
        "slipwayd",
        "slipway",
        "slipway-agent",
        "containerd-shim-slipway-v1",
        "slipway-runc",
    ] {
        let file = format!("usr/local/bin/{p}");
        ensure!(
            node.mode(&file)? == 0o755,
            "{file} has mode {:o}",
            node.mode(&file)?
        );
        ensure!(
            std::fs::read(node.root.join(&file))? == std::fs::read(lab::bin(p))?,
            "{file} is another"
        );
    }
    for file in [
        "etc/systemd/system/slipwayd.service",
        "etc/systemd/system/slipway-agent.service",
        "etc/kubernetes/kubelet.conf.d/20-slipway.conf",
        "etc/slipway/config.toml",
    ] {
        ensure!(
            node.mode(file)? == 0o644,
            "{file} has mode {:o}",
            node.mode(file)?
        );
    }
    let unit = std::fs::read_to_string(node.root.join("etc/systemd/system/slipwayd.service"))?;
    ensure!(unit.contains("ExecStart=/usr/local/bin/slipwayd\n"), "{unit}");
    ensure!(node.root.join("etc/slipway/certs.d").is_dir());
    ensure!(!node.root.join("etc/cni").exists(), "the cluster has a network");
    let told = node.told()?;
    ensure!(
        told == [
            "daemon-reload",
            "enable slipwayd.service",
            "restart slipwayd.service"
        ],
        "{told:?}"
    );

    node.again()?;
    let told = node.told()?;
    ensure!(
        told == [
            "daemon-reload",
            "enable slipwayd.service",
            "start slipwayd.service"
        ],
        "{told:?}"
    );
    ensure!(!node.root.join("etc/slipway/config.toml.new").exists());

    // Another version: what the administrator has changed stays, also where it lies elsewhere on the node.
    let site = node.root.join("opt/site");
    std::fs::create_dir_all(&site)?;
    let links = ["slipway/config.toml", "kubernetes/kubelet.conf.d/20-slipway.conf"];
    for link in links {
        let link = node.root.join("etc").join(link);
        let name = link.file_name().context("a file")?;
        std::fs::rename(&link, site.join(name))?;
        std::os::unix::fs::symlink(Path::new("/opt/site").join(name), &link)?;
    }
    let config = site.join("config.toml");
    let mine = "[runtime]\ncgroup_driver = \"systemd\"\ncgroup_root = \"mine.slice\"\n";
    std::fs::write(&config, mine)?;
    node.apply("second")?;
    node.rolled_out()?;
    let told = node.told()?;
    ensure!(
        told.last().is_some_and(|l| l == "restart slipwayd.service"),
        "{told:?}"
    );
    ensure!(std::fs::read_to_string(&config)? == mine);
    for link in links.map(|link| node.root.join("etc").join(link)) {
        ensure!(link.is_symlink(), "{} was replaced", link.display());
        let new = format!("{}.new", link.display());
        ensure!(Path::new(&new).exists(), "no {new}");
    }
    let program = node.root.join("usr/local/bin/slipwayd");
    let second = std::fs::read(&program)?;
    ensure!(second.len() == std::fs::read(lab::bin("slipwayd"))?.len() + 1);

    // A node that could not run it: nothing is replaced, and the pod says why until that has changed.
    std::fs::write(&config, "[runtime]\ncgroup_drivers = \"systemd\"\n")?;
    node.apply("third")?;
    refused(node, "cgroup_drivers").await?;
    std::fs::write(&config, mine)?;
    std::fs::remove_file(node.root.join("sys/fs/cgroup/cgroup.controllers"))?;
    refused(node, "its cgroups are version 1").await?;
    std::fs::remove_dir(node.root.join("run/systemd/system"))?;
    refused(node, "its init is not systemd").await?;
    ensure!(std::fs::read(&program)? == second, "the program was replaced");
    ensure!(!node.root.join("usr/local/bin/slipwayd.try").exists());
    ensure!(
        !node.root.join("systemctl.log").exists(),
        "systemd was told {:?}",
        node.told()?
    );
    std::fs::create_dir(node.root.join("run/systemd/system"))?;
    std::fs::write(node.root.join("sys/fs/cgroup/cgroup.controllers"), "cpu memory\n")?;
    node.again()?;
    // The pod that refused may have tried once more before it was deleted: then the next finds everything done.
    let told = node.told()?;
    let restarts = told.iter().filter(|l| *l == "restart slipwayd.service");
    ensure!(restarts.count() == 1, "{told:?}");
    // What it says there counts.
    std::fs::write(&config, "[runtime]\ncgroup_driver = \"cgroupfs\"\n")?;
    std::fs::remove_file(node.root.join("sys/fs/cgroup/cgroup.controllers"))?;
    node.again()
}

/// Waits until the pod says `why` the node is left as it is.
async fn refused(node: &Node<'_>, why: &str) -> Result<()> {
    // Its next attempt comes later and later.
    node.kubectl(&[
        "delete",
        "pod",
        "-l",
        "app.kubernetes.io/name=slipway-node-setup",
        "--wait",
        "--grace-period=1",
    ])?;
    node.k
        .until_true(&format!("a refusal for {why:?}"), |_| {
            let log = node.log();
            Ok(log.contains("this node is left as it is: ") && log.contains(why))
        })
        .await
        .with_context(|| node.log())
}
