//! `make bench`: Slipway beside containerd + runc (and BuildKit) in the same run, on the same machine.
//!
//! Prints a table of medians and ratios. Nothing here asserts a time: a noisy machine is no failure.
#![forbid(unsafe_code)]

mod builds;
mod peers;
mod pull;
mod runtime;
mod table;

use anyhow::Result;

#[tokio::main]
async fn main() -> Result<()> {
    let only: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |part: &str| only.is_empty() || only.iter().any(|o| o == part);
    let lab = harness::Lab::new("bench")?;
    let outcome = async {
        harness::image::busybox(&lab)?;
        let mut slipway = peers::slipway(&lab).await?;
        let mut containerd = peers::containerd(&lab).await?;
        let mut table = table::Table::new("slipway", "containerd + runc");
        if wanted("runtime") {
            runtime::measure(&mut table, &lab, &slipway, &containerd).await?;
        }
        if wanted("pull") {
            pull::measure(&mut table, &lab, &slipway, &containerd).await?;
        }
        table.print();
        if wanted("build") {
            let mut table = table::Table::new("slipway", "BuildKit");
            builds::measure(&mut table, &lab, &containerd)?;
            table.print();
        }
        slipway.stop().await?;
        containerd.stop().await
    }
    .await;
    for bridge in peers::bridges(&lab) {
        harness::leftovers::remove_bridge(&bridge);
    }
    outcome?;
    // containerd leaves the cgroups of its pods to the kubelet, which made them in its life.
    for parent in harness::leftovers::cgroups_named(lab.cgroup().trim_start_matches('/')) {
        for pod in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(pod.path());
        }
    }
    lab.finish()
}
