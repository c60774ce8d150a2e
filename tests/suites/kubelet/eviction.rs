//! Pressure on the disk, as kubelet concludes it from the runtime's figures, and what it does about it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::kube::{IMAGE, Kube};

/// What each pod writes into its root.
const WRITTEN: u64 = 48 << 20;

pub async fn a_pod_that_uses_more_of_the_disk_than_its_limit_is_evicted(k: Kube) -> Result<()> {
    let write = format!("head -c {WRITTEN} /dev/zero > /written; exec sleep 1000");
    let limit = |bytes: u64| json!({ "resources": { "limits": { "ephemeral-storage": bytes.to_string() } } });
    // What kubelet knows of a container's root it has from the runtime: 4 MiB beside the limit tell.
    k.pod("within", &write, json!({}), limit(WRITTEN + (4 << 20)))?;
    k.pod("over", &write, json!({}), limit(WRITTEN - (4 << 20)))?;
    k.phase("over", "Failed").await?;
    ensure!(k.field("pod/over", ".status.reason")? == "Evicted");
    let message = k.field("pod/over", ".status.message")?;
    ensure!(
        message.contains("ephemeral local storage usage exceeds"),
        "{message}"
    );
    // As many bytes, seen by the same pass.
    let written = || Ok(k.exec("within", "stat -c %s /written")?.trim() == WRITTEN.to_string());
    k.until_true("the other pod to have written as much", |_| written())
        .await?;
    let used = || -> Result<u64> {
        let all: serde_json::Value =
            serde_json::from_str(&k.ok(&["get", "--raw", "/api/v1/nodes/node1/proxy/stats/summary"])?)?;
        let pods = all["pods"].as_array().context("pods")?;
        let pod = pods
            .iter()
            .find(|p| p["podRef"]["namespace"] == k.space && p["podRef"]["name"] == "within");
        Ok(pod.map_or(0, |p| {
            p["containers"][0]["rootfs"]["usedBytes"].as_u64().unwrap_or(0)
        }))
    };
    k.until_true("kubelet to have the figure", |_| Ok(used()? >= WRITTEN))
        .await?;
    ensure!(used()? < WRITTEN + (1 << 20), "{} of {WRITTEN}", used()?);
    ensure!(k.field("pod/within", ".status.phase")? == "Running");
    Ok(())
}

pub async fn unused_images_are_collected_when_the_disk_is_full(k: Kube) -> Result<()> {
    // An image from a registry, which a build's is not: those are pinned.
    let lab = harness::Lab::new("kubelet-gc")?;
    let registry = harness::registry::Registry::start(&lab, None)?;
    let (images, name) = (lab.join("images"), "team/unused:1");
    harness::image::stage(&images, &registry, "marked", &["TEST=unused"], name)?;
    let image = format!("{}/{name}", registry.host());
    k.cluster.cri(1).await?.pull(&image).await?;

    // kubelet is told that any disk is too full: eviction removes what is unused at once, where its own collection of images
    // would come five minutes after its start.
    let calm = "nodefs.available: \"1%\", imagefs.available: \"1%\"";
    let other = Thresholds::change(
        &k,
        1,
        calm,
        "nodefs.available: \"99%\"",
        "imageMinimumGCAge: 1s\n",
    )?;
    let gone = collected(&k, &image).await;
    other.restore().await?;
    drop(registry);
    lab.finish()?;
    gone
}

/// A kubelet that evicts sooner than it did.
struct Thresholds<'a> {
    k: &'a Kube,
    node: usize,
    path: PathBuf,
    before: String,
}

impl<'a> Thresholds<'a> {
    /// Starts node `node`'s kubelet anew with `from` in its configuration replaced by `to`, and with `more` behind it.
    fn change(k: &'a Kube, node: usize, from: &str, to: &str, more: &str) -> Result<Thresholds<'a>> {
        let path = k.cluster.node_dir(node).join("kubelet.yaml");
        let before = std::fs::read_to_string(&path)?;
        ensure!(before.contains(from), "no {from} in\n{before}");
        let changed = before.replace(from, to) + more;
        let thresholds = Thresholds {
            k,
            node,
            path,
            before,
        };
        thresholds.restart(&changed)?;
        Ok(thresholds)
    }

    fn restart(&self, configuration: &str) -> Result<()> {
        std::fs::write(&self.path, configuration)?;
        let name = format!("kubelet{}", self.node);
        self.k.cluster.processes().end(&name, Duration::from_secs(10))?;
        self.k.cluster.start_kubelet(self.node)
    }

    /// The kubelet as it was, and no pressure on its node any more.
    async fn restore(&self) -> Result<()> {
        self.restart(&self.before)?;
        self.calm().await
    }

    /// Waits until the node is Ready, under no pressure, and takes pods.
    async fn calm(&self) -> Result<()> {
        self.k
            .cluster
            .wait_ready(self.node, Duration::from_secs(30))
            .await?;
        let node = format!("node/node{}", self.node);
        for kind in ["DiskPressure", "MemoryPressure"] {
            let path = format!(".status.conditions[?(@.type==\"{kind}\")].status");
            self.k.until(&node, &path, "False").await?;
        }
        self.k.until(&node, ".spec.taints", "").await
    }
}

const MIB: u64 = 1 << 20;

fn on_node2(mut more: serde_json::Value) -> serde_json::Value {
    let place = json!({ "nodeSelector": { "kubernetes.io/hostname": "node2" } });
    crate::kube::merge(&mut more, place);
    more
}

/// Waits until one of the pods is evicted; which, and why.
async fn evicted(k: &Kube, pods: &[&str]) -> Result<(String, String)> {
    let phase = |pod: &str| k.field(&format!("pod/{pod}"), ".status.phase");
    k.until_true("an eviction", |_| {
        Ok(pods.iter().any(|p| phase(p).is_ok_and(|phase| phase == "Failed")))
    })
    .await?;
    let failed = pods
        .iter()
        .filter(|p| phase(p).is_ok_and(|phase| phase == "Failed"));
    let failed: Vec<&str> = failed.copied().collect();
    ensure!(failed.len() == 1, "one is enough, and {failed:?} ended");
    let pod = format!("pod/{}", failed[0]);
    ensure!(
        k.field(&pod, ".status.reason")? == "Evicted",
        "{}",
        k.field(&pod, ".status")?
    );
    Ok((failed[0].to_owned(), k.field(&pod, ".status.message")?))
}

pub async fn memory_pressure_evicts_the_pod_that_holds_most_beyond_its_request(k: Kube) -> Result<()> {
    let capacity = k.field("node/node2", ".status.capacity.memory")?;
    let capacity: u64 = capacity
        .strip_suffix("Ki")
        .and_then(|n| n.parse().ok())
        .with_context(|| capacity.clone())?;
    // The pods together may have 700 MiB, and are under pressure when less than 200 of them are left.
    let reserved = format!("kubeReserved: {{memory: {}Ki}}\n", capacity - 700 * 1024);
    let few = "memory.available: 200Mi,";
    let strict = Thresholds::change(&k, 2, "memory.available: 100Mi,", few, &reserved)?;
    k.cluster.wait_ready(2, Duration::from_secs(30)).await?;
    k.until("node/node2", ".status.allocatable.memory", "500Mi")
        .await?;
    let hold = |mib: u64| {
        let bytes = mib * MIB;
        format!("(head -c {bytes} /dev/zero; echo; echo held >&2; exec sleep 1000) | tail -c {bytes}")
    };
    let asks = |mib: u64| json!({ "resources": { "requests": { "memory": format!("{mib}Mi") } } });
    let pods = [("asked", 240, 260), ("small", 80, 20), ("over", 300, 20)];
    for (name, holds, request) in pods {
        k.pod(name, &hold(holds), on_node2(json!({})), asks(request))?;
        if name != "over" {
            k.until_true("the memory to be held", |k| Ok(k.logs(name)?.contains("held")))
                .await?;
        }
    }
    let (victim, message) = evicted(&k, &["asked", "small", "over"]).await?;
    ensure!(victim == "over", "{victim} was evicted: {message}");
    // "Container main was using 308000Ki, request is 20Mi": the figure is the runtime's.
    let used = message
        .split("was using ")
        .nth(1)
        .and_then(|rest| rest.split("Ki").next()?.parse::<u64>().ok())
        .with_context(|| message.clone())?;
    let most = 300 * 1024;
    ensure!(
        (most * 2 / 3..most + 32 * 1024).contains(&used),
        "the container held {most}Ki, and kubelet says: {message}"
    );
    strict.calm().await?;
    for pod in ["asked", "small"] {
        ensure!(k.field(&format!("pod/{pod}"), ".status.phase")? == "Running");
        ensure!(k.field(&format!("pod/{pod}"), ".status.containerStatuses[0].restartCount")? == "0");
    }
    for (pod, ..) in pods {
        k.ok(&["delete", "pod", pod])?;
    }
    strict.restore().await
}

pub async fn disk_pressure_evicts_the_pod_that_has_written_most_into_its_root(k: Kube) -> Result<()> {
    // The runtime's root gets a file system of its own, so small that pods can fill it.
    let cluster = &k.cluster;
    let processes = cluster.processes();
    let root = cluster.node_dir(2).join("root");
    let swap = async |command: String| -> Result<()> {
        processes.end("kubelet2", Duration::from_secs(10))?;
        cluster.drain(2).await?;
        harness::cmd::sh(&command)?;
        cluster.start_runtime(2)?;
        cluster.wait_runtime(2).await?;
        Ok(())
    };
    let root = root.display();
    swap(format!("mount -t tmpfs -o size=512m,mode=700 tmpfs '{root}'")).await?;
    cluster.build_stage(2, "busybox", IMAGE)?;
    let calm = "imagefs.available: \"1%\"";
    let strict = Thresholds::change(&k, 2, calm, "imagefs.available: 256Mi", "")?;
    cluster.wait_ready(2, Duration::from_secs(30)).await?;
    let write = |mib: u64, file: &str| {
        format!(
            "head -c {} /dev/zero > {file}; echo written; exec sleep 1000",
            mib * MIB
        )
    };
    let volume = || on_node2(json!({ "volumes": [{ "name": "scratch", "emptyDir": {} }] }));
    let mount = || json!({ "volumeMounts": [{ "name": "scratch", "mountPath": "/scratch" }] });
    // What a pod writes into a volume is on another disk.
    let pods = [
        ("elsewhere", 240, "/scratch/x"),
        ("modest", 64, "/x"),
        ("greedy", 180, "/x"),
    ];
    for (name, mib, file) in pods {
        k.pod(name, &write(mib, file), volume(), mount())?;
        if name != "greedy" {
            k.until_true("everything to be written", |k| {
                Ok(k.logs(name)?.contains("written"))
            })
            .await?;
        }
    }
    let (victim, message) = evicted(&k, &["elsewhere", "modest", "greedy"]).await?;
    ensure!(victim == "greedy", "{victim} was evicted: {message}");
    ensure!(message.contains("ephemeral-storage"), "{message}");
    // What it had written is given back, and the pressure goes with it.
    strict.calm().await?;
    let free = rustix::fs::statvfs(&*cluster.node_dir(2).join("root"))?;
    let free = free.f_bavail * free.f_frsize;
    ensure!(free > 400 * MIB, "{free} bytes are free");
    for pod in ["elsewhere", "modest"] {
        ensure!(k.field(&format!("pod/{pod}"), ".status.phase")? == "Running");
    }
    for (pod, ..) in pods {
        k.ok(&["delete", "pod", pod])?;
    }
    swap(format!("umount '{root}'")).await?;
    strict.restore().await
}

/// Waits until the image is gone.
async fn collected(k: &Kube, image: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let images = k.cluster.cri(1).await?.images().await?;
        let names: Vec<String> = images.into_iter().flat_map(|i| i.repo_tags).collect();
        if !names.iter().any(|n| n == image) {
            ensure!(
                names.iter().any(|n| n == IMAGE),
                "a build that is nowhere else is kept: {names:?}"
            );
            return Ok(());
        }
        ensure!(
            began.elapsed() < Duration::from_secs(90),
            "{image} is still there"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
