//! `make cluster` and `make cluster-down`: a Kubernetes cluster on this machine with slipwayd under it.
//!
//! `CLUSTER_NAME` names its links, network namespaces and cgroups otherwise than "slipplay" (8 characters at most).
//!
//! `cluster up DIR NODES [GPUS]`, `cluster examples DIR`, `cluster down DIR`, `cluster dns ADDRESS KUBECTL KUBECONFIG` (the DNS server of one, run by `up`).
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use harness::cluster::{Cluster, Net, Options, dns};
use tokio::signal::unix::{SignalKind, signal};

/// Neither the cgroup of a slipwayd with its defaults nor the beginning of another's names.
const NAME: &str = "slipplay";

#[tokio::main]
async fn main() -> std::process::ExitCode {
    match run().await {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("cluster: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["up", dir, nodes] => up_or_down(Path::new(dir), nodes, "0").await,
        ["up", dir, nodes, gpus] => up_or_down(Path::new(dir), nodes, gpus).await,
        ["examples", dir] => examples(Path::new(dir)),
        ["down", dir] => down(Path::new(dir)).await,
        ["dns", listen, kubectl, kubeconfig] => dns::serve(
            listen
                .parse()
                .with_context(|| format!("{listen:?} is no address"))?,
            Path::new(kubectl),
            Path::new(kubeconfig),
            dns::upstream(),
        ),
        _ => bail!(
            "usage: cluster up DIR NODES [GPUS] | cluster examples DIR | cluster down DIR | cluster dns ADDRESS KUBECTL KUBECONFIG"
        ),
    }
}

/// Its processes outlive this one: who is interrupted before they are all there takes down those that are.
async fn up_or_down(dir: &Path, nodes: &str, gpus: &str) -> Result<()> {
    let there = Cluster::find(dir)?.is_some();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let heard = tokio::select! {
        biased;
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        _ = hangup.recv() => "SIGHUP",
        r = up(dir, nodes, gpus) => return r,
    };
    if !there && let Some(cluster) = Cluster::find(dir)? {
        let _ = writeln!(
            std::io::stderr(),
            "interrupted by {heard}: taking down what is up already"
        );
        cluster
            .down()
            .await
            .context("interrupted; `make cluster-down` tries again to take it down")?;
    }
    bail!("interrupted by {heard}; nothing is left of it")
}

async fn up(dir: &Path, nodes: &str, gpus: &str) -> Result<()> {
    let count: usize = nodes
        .parse()
        .ok()
        .filter(|n| (1..=3).contains(n))
        .with_context(|| format!("NODES is 1, 2 or 3, not {nodes:?}"))?;
    let gpus: usize = gpus
        .parse()
        .ok()
        .filter(|n| (0..=8).contains(n))
        .with_context(|| format!("GPUS is from 0 to 8, not {gpus:?}"))?;
    let name = std::env::var("CLUSTER_NAME").unwrap_or_else(|_| NAME.into());
    if !(1..=8).contains(&name.len()) || !name.bytes().all(|b| b.is_ascii_alphanumeric()) {
        bail!("CLUSTER_NAME is up to 8 letters and digits, not {name:?}");
    }
    if Cluster::find(dir)?.is_some() {
        bail!(
            "a cluster is up already, in {}: `make cluster-down` takes it down",
            dir.display()
        );
    }
    let (cluster, took) = Cluster::up(Options {
        dir: dir.to_owned(),
        net: Net {
            name,
            base: (244, 0),
            count,
        },
        program: std::env::current_exe().context("where this program is")?,
        slipwayd: String::new(),
        kubelet: String::new(),
        gates: Vec::new(),
        containerd: Vec::new(),
    })
    .await?;
    println!(
        "API server ready after {:.1} s, {count} node{} Ready after {:.1} s; logs in {}",
        took.api.as_secs_f64(),
        if count == 1 { "" } else { "s" },
        took.ready.as_secs_f64(),
        dir.join("log").display()
    );
    if gpus > 0 {
        give_gpus(&cluster, gpus)
            .await
            .context("the cluster is up but for its GPUs; `make cluster-down` takes it down")?;
        println!(
            "each node has {gpus} GPUs that are not real; `echo 0 79 >> {}/nvml/events` makes the first fall off its bus",
            cluster.node_dir(1).join("driver").display()
        );
        for n in cluster.nodes() {
            if let Some(address) = cluster.agent_address(n) {
                println!("node{n}'s metrics: curl http://{address}/metrics");
            }
            println!("what its agent sees: {} list", cluster.agent_command(n));
        }
    }
    let bin: PathBuf = harness::lab::tool("kubectl");
    println!("\nexport KUBECONFIG={}", cluster.kubeconfig().display());
    println!(
        "export PATH=$PATH:{}   # kubectl, crictl",
        bin.parent().unwrap_or(Path::new("/")).display()
    );
    println!("\n`make cluster-down` removes every trace of it.");
    Ok(())
}

async fn give_gpus(cluster: &Cluster, count: usize) -> Result<()> {
    let mut topology = slipway_fake_gpu::Topology::named("h100x8")?;
    topology.gpus.truncate(count);
    for n in cluster.nodes() {
        cluster.start_gpus(n, &topology)?;
        cluster
            .wait_allocatable(n, "nvidia.com/gpu", count, std::time::Duration::from_secs(60))
            .await?;
    }
    Ok(())
}

fn examples(dir: &Path) -> Result<()> {
    let Some(cluster) = Cluster::find(dir)? else {
        bail!(
            "no cluster is up in {}: `make cluster NODES=2` brings one up",
            dir.display()
        );
    };
    let at = cluster.prepare_examples()?;
    let source = harness::lab::repo().join("tests/fixtures/train-digits");
    let kubectl = |line: &str| println!("  kubectl {line}");
    println!(
        "The examples, with this cluster's places, are in {}. To build in the cluster and train on two nodes:",
        at.display()
    );
    kubectl(&format!("apply -f {}/registry.yaml", at.display()));
    kubectl(&format!(
        "create configmap digits-source --from-file={}",
        source.display()
    ));
    println!(
        "  sed 's/MORE, value: \"\"/MORE, value: \"--push\"/' {}/build-job.yaml | kubectl apply -f -",
        at.display()
    );
    kubectl("wait --for=condition=complete --timeout=300s job/build-digits");
    kubectl(&format!("apply -f {}/train-job.yaml", at.display()));
    kubectl("logs -f -l job-name=train-digits --prefix");
    println!("And where the cluster has GPUs, with the image that was built:");
    for (file, job) in [("gpu-job", "train-gpu"), ("gpu-train-job", "train-gpus")] {
        kubectl(&format!("apply -f {}/{file}.yaml", at.display()));
        kubectl(&format!("wait --for=condition=complete --timeout=300s job/{job}"));
    }
    kubectl("logs -l job-name=train-gpus --prefix");
    Ok(())
}

async fn down(dir: &Path) -> Result<()> {
    let Some(cluster) = Cluster::find(dir)? else {
        println!("no cluster is up in {}", dir.display());
        return Ok(());
    };
    cluster.down().await?;
    println!(
        "nothing is left: no process, mount, link, network namespace, firewall rule, cgroup, file or changed setting of the machine"
    );
    Ok(())
}
