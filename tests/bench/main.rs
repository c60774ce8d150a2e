//! `make bench`: Slipway beside containerd + runc (and BuildKit) in the same run, on the same machine.
//!
//! Prints a table of medians and ratios. Nothing here asserts a time: a noisy machine is no failure.
#![forbid(unsafe_code)]

mod agent;
mod allocatable;
mod builds;
mod devices;
mod kubernetes;
mod peers;
mod pull;
mod runtime;
mod streams;
mod table;

use std::path::Path;

use anyhow::Result;
use harness::cluster::dns;

#[tokio::main]
async fn main() -> Result<()> {
    // `bench dns ADDRESS KUBECTL KUBECONFIG`: the name server of the cluster that `kubernetes` brings up.
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, listen, kubectl, kubeconfig] = &args[..]
        && verb == "dns"
    {
        let (kubectl, kubeconfig) = (Path::new(kubectl), Path::new(kubeconfig));
        return dns::serve(listen.parse()?, kubectl, kubeconfig, dns::upstream());
    }
    // `bench [runtime] [streams] [pull] [devices] [build] [kubernetes] [agent] [ROUNDS]`: all parts when none is named.
    let (rounds, only): (Vec<String>, Vec<String>) = args
        .into_iter()
        .partition(|word| word.bytes().all(|b| b.is_ascii_digit()));
    let rounds = rounds.first().map_or(Ok(3), |text| text.parse())?;
    let wanted = |part: &str| only.is_empty() || only.iter().any(|o| o == part);
    if wanted("kubernetes") {
        let mut table = table::Table::new("slipway", "containerd + runc");
        kubernetes::measure(&mut table, rounds).await?;
        table.print();
    }
    if wanted("agent") {
        let mut table = table::Table::new("slipway-agent", "target");
        agent::measure(&mut table).await?;
        table.print();
    }
    if !["runtime", "streams", "pull", "devices", "build"]
        .into_iter()
        .any(wanted)
    {
        return Ok(());
    }
    let lab = harness::Lab::new("bench")?;
    let in_memory = peers::state_in_memory(&lab)?;
    let outcome = async {
        harness::image::busybox(&lab)?;
        let mut containerd = peers::containerd(&lab).await?;
        if ["runtime", "streams", "pull", "devices"].into_iter().any(wanted) {
            let mut slipway = peers::slipway(&lab).await?;
            let mut table = table::Table::new("slipway", "containerd + runc");
            if wanted("runtime") {
                runtime::measure(&mut table, &lab, &slipway, &containerd).await?;
            }
            if wanted("streams") {
                streams::measure(&mut table, &lab, &slipway, &containerd).await?;
            }
            if wanted("pull") {
                pull::measure(&mut table, &lab, &slipway, &containerd, rounds).await?;
            }
            if wanted("devices") {
                devices::measure(&mut table, &lab, &slipway, &containerd).await?;
            }
            table.print();
            slipway.stop().await?;
        }
        if wanted("build") {
            let mut table = table::Table::new("slipway", "BuildKit");
            builds::measure(&mut table, &lab, &containerd, rounds)?;
            table.print();
        }
        containerd.stop().await
    }
    .await;
    for bridge in peers::bridges(&lab) {
        harness::leftovers::remove_bridge(&bridge);
    }
    drop(in_memory);
    outcome?;
    // containerd leaves the cgroups of its pods to the kubelet, which made them in its life.
    for parent in harness::leftovers::cgroups_named(lab.cgroup().trim_start_matches('/')) {
        for pod in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(pod.path());
        }
    }
    lab.finish()
}
