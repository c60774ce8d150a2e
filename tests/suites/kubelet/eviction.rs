//! Pressure on the disk, as kubelet concludes it from the runtime's figures, and what it does about it.

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
    let path = k.cluster.node_dir(1).join("kubelet.yaml");
    let before = std::fs::read_to_string(&path)?;
    let calm = "nodefs.available: \"1%\", imagefs.available: \"1%\"";
    ensure!(before.contains(calm), "{before}");
    let strict = before.replace(calm, "nodefs.available: \"99%\"") + "imageMinimumGCAge: 1s\n";
    restart_kubelet(&k, &path, &strict)?;
    let gone = collected(&k, &image).await;
    restart_kubelet(&k, &path, &before)?;
    k.cluster.wait_ready(1, Duration::from_secs(30)).await?;
    let pressure = ".status.conditions[?(@.type==\"DiskPressure\")].status";
    k.until("node/node1", pressure, "False").await?;
    k.until("node/node1", ".spec.taints", "").await?;
    drop(registry);
    lab.finish()?;
    gone
}

fn restart_kubelet(k: &Kube, path: &std::path::Path, configuration: &str) -> Result<()> {
    std::fs::write(path, configuration)?;
    k.cluster.processes().end("kubelet1", Duration::from_secs(10))?;
    k.cluster.start_kubelet(1)
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
