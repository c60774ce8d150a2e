//! Restarts of everything around running GPU pods: none of them notices, no GPU is handed out twice, and kubelet has the right
//! list again within two seconds.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use slipway_fake_gpu::Topology;

use crate::OURS;
use crate::devices::Devices;
use crate::gpu::{GPU, SOON, container, gpu_of, metrics, pod};
use crate::kube::Kube;

/// How soon the list has to be right again.
const LIMIT: Duration = Duration::from_secs(2);
const PODS: [&str; 2] = ["one", "two"];

struct Node<'a> {
    k: &'a Kube,
    devices: Devices,
    /// Every device.
    all: BTreeSet<String>,
    /// What must not change: each pod's container, how often it was started, its GPU; and who has which.
    before: Vec<(String, String, usize)>,
    holders: std::collections::BTreeMap<String, String>,
}

impl Node<'_> {
    fn state(k: &Kube) -> Result<Vec<(String, String, usize)>> {
        PODS.iter()
            .map(|name| {
                let (id, restarts) = container(k, name)?;
                Ok((id, restarts, gpu_of(k, name)?))
            })
            .collect()
    }

    /// Waits for the right list and sees that nothing else has changed.
    async fn is_right(&self, what: &str, limit: Duration) -> Result<()> {
        let took = self
            .devices
            .until(GPU, &self.all, limit)
            .await
            .with_context(|| what.to_owned())?;
        println!("{what}: the list is right after {took:?}");
        self.k
            .until_true("kubelet to answer for its pods", |k| Ok(Node::state(k).is_ok()))
            .await?;
        let after = Node::state(self.k)?;
        ensure!(
            self.before == after,
            "{what}: the pods were {:?} and are {after:?}",
            self.before
        );
        let holders = self.devices.holders(GPU).await?;
        ensure!(
            self.holders == holders,
            "{what}: who has which was {:?} and is {holders:?}",
            self.holders
        );
        Ok(())
    }

    async fn until(&self, what: &str, there: impl Fn() -> bool) -> Result<()> {
        let began = Instant::now();
        while !there() {
            ensure!(began.elapsed() < SOON, "waited {SOON:?} for {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.k.cluster.node_dir(OURS).join("kubelet/device-plugins")
    }

    /// The plugin's sockets.
    fn sockets(&self) -> Vec<PathBuf> {
        let all = std::fs::read_dir(self.folder()).into_iter().flatten().flatten();
        let ours = |p: &PathBuf| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("slipway-"))
        };
        all.map(|e| e.path()).filter(ours).collect()
    }

    fn kill(&self, name: &str) -> Result<()> {
        let p = self.k.cluster.processes();
        p.signal(name, Signal::KILL);
        p.end(name, Duration::from_secs(5))
    }

    /// Starts kubelet, and waits until it takes registrations: it has had no list since.
    async fn kubelet(&self) -> Result<()> {
        let socket = self.folder().join("kubelet.sock");
        let which = || {
            std::fs::metadata(&socket)
                .map(|m| (m.ino(), m.ctime(), m.ctime_nsec()))
                .ok()
        };
        let before = which();
        self.k.cluster.start_kubelet(OURS)?;
        self.until("kubelet's socket", || {
            which().is_some_and(|now| Some(now) != before)
        })
        .await
    }
}

pub async fn no_restart_costs_a_gpu_pod_anything_or_hands_a_gpu_out_twice(k: Kube) -> Result<()> {
    let mut topology = Topology::named("h100x8")?;
    topology.gpus.truncate(3);
    k.cluster.start_gpus(OURS, &topology)?;
    k.cluster.wait_allocatable(OURS, GPU, 3, SOON).await?;
    for name in PODS {
        pod(&k, name)?;
    }
    for name in PODS {
        k.ready(name).await?;
    }
    let devices = Devices::of(&k, OURS);
    let node = Node {
        k: &k,
        before: Node::state(&k)?,
        holders: devices.holders(GPU).await?,
        all: topology.gpus.iter().map(|g| g.uuid.clone()).collect(),
        devices,
    };
    ensure!(node.holders.len() == 2, "{:?}", node.holders);
    node.is_right("before anything", LIMIT).await?;
    let none = BTreeSet::new();

    node.kill("kubelet1")?;
    node.kubelet().await?;
    node.is_right("kubelet restarted", LIMIT).await?;

    node.kill("agent1")?;
    node.devices
        .until(GPU, &none, SOON)
        .await
        .context("kubelet to see the agent's end")?;
    k.cluster.start_agent(OURS)?;
    node.is_right("agent restarted", LIMIT).await?;

    node.kill("slipwayd1")?;
    k.cluster.start_runtime(OURS)?;
    node.is_right("slipwayd restarted", LIMIT).await?;
    k.cluster.wait_ready(OURS, SOON).await?;

    // The plugin's socket is deleted under a live kubelet: another comes, and kubelet is never without a list.
    node.until("what the killed agent left to be removed", || {
        node.sockets().len() == 1
    })
    .await?;
    let old = node.sockets();
    std::fs::remove_file(&old[0])?;
    node.until("another socket", || node.sockets().iter().any(|s| *s != old[0]))
        .await?;
    node.is_right("its socket deleted", LIMIT).await?;
    node.until("one socket", || node.sockets().len() == 1).await?;
    // Kubelet hears the new one: it sees its end, and the next one's beginning.
    node.kill("agent1")?;
    node.devices
        .until(GPU, &none, SOON)
        .await
        .context("kubelet to see the end of the agent whose socket was deleted")?;
    k.cluster.start_agent(OURS)?;
    node.is_right("agent restarted after that", LIMIT).await?;

    // All of it at once.
    for name in ["kubelet1", "agent1", "slipwayd1"] {
        node.kill(name)?;
    }
    k.cluster.start_runtime(OURS)?;
    k.cluster.wait_runtime(OURS).await?;
    k.cluster.start_agent(OURS)?;
    node.kubelet().await?;
    node.is_right("everything restarted", LIMIT).await?;
    k.cluster.wait_ready(OURS, SOON).await?;

    // The agent hears of this kubelet's pods, and says whose each GPU is.
    k.until_true("the pods in the agent's metrics", |k| {
        let page = metrics(k)?;
        let has = |(uuid, pod): (&String, &String)| {
            let pod = pod.rsplit('/').next().unwrap_or_default();
            let mut lines = page.lines().filter(|l| l.starts_with("slipway_gpu_allocated{"));
            lines.any(|l| l.contains(uuid.as_str()) && l.contains(&format!("pod=\"{pod}\"")))
        };
        Ok(node.holders.iter().all(has))
    })
    .await?;

    // The third GPU is the one that is left, and a fourth pod waits.
    k.cluster.wait_allocatable(OURS, GPU, 3, SOON).await?;
    pod(&k, "three")?;
    k.ready("three").await?;
    pod(&k, "four")?;
    let reason = ".status.conditions[?(@.type==\"PodScheduled\")].reason";
    k.until("pod/four", reason, "Unschedulable").await?;
    ensure!(node.devices.holders(GPU).await?.len() == 3);
    let third = gpu_of(&k, "three")?;
    ensure!(
        node.before.iter().all(|(_, _, gpu)| *gpu != third),
        "it has {third}"
    );
    k.cluster.processes().end("agent1", Duration::from_secs(5))?;
    Ok(())
}
