//! From an XID until the node says that it has a GPU less: the agent's list to kubelet, kubelet's next report to the API server, and
//! the API server's word to who watches the node. Nothing else does it in one piece, so there is no other side.

use std::io::BufReader;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::cluster::Cluster;
use serde_json::Value;
use slipway_fake_gpu::Topology;

use crate::table::Table;

const GPU: &str = "nvidia.com/gpu";
/// The node: slipwayd's.
const NODE: usize = 1;
const ROUNDS: u32 = 8;
/// The clusters' `nodeStatusUpdateFrequency`; a kubelet that is not told otherwise has 10 s.
const REPORTED: Duration = Duration::from_secs(2);
/// An agent sees a moment after its reset that a GPU may be watched again.
const WATCHED: Duration = Duration::from_millis(100);
const SOON: Duration = Duration::from_secs(60);

/// Fills the row.
pub async fn measure(table: &mut Table, cluster: &Cluster) -> Result<()> {
    let topology = Topology::named("h100x8")?;
    let all = topology.gpus.len();
    let watch = Watch::start(cluster)?;
    let driver = cluster.start_gpus(NODE, &topology)?;
    watch.says(all)?;
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        // Kubelet has just reported. What is wanted is the middle of all times at which an XID may come between two reports.
        tokio::time::sleep(WATCHED + REPORTED * round / ROUNDS).await;
        let gpu = usize::try_from(round)? % all;
        let began = Instant::now();
        driver.raise(&format!("{gpu} 79"))?;
        times.push(watch.says(all - 1)?.saturating_duration_since(began));
        driver.raise(&format!("{gpu} reset"))?;
        watch.says(all)?;
    }
    let what = format!(
        "XID → node allocatable, of a kubelet that reports every {} s",
        REPORTED.as_secs()
    );
    table.times(&what, &times, &[]);
    cluster
        .processes()
        .end(&format!("agent{NODE}"), Duration::from_secs(5))
}

/// What the API server tells of the node, as it tells it.
struct Watch {
    child: Child,
    told: Receiver<(Instant, usize)>,
}

impl Watch {
    fn start(cluster: &Cluster) -> Result<Watch> {
        let node = format!("node{NODE}");
        let mut child = cluster
            .kubectl_command(&["get", "node", &node, "-o", "json", "--watch"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting kubectl")?;
        let out = BufReader::new(child.stdout.take().context("piped")?);
        let (to, told) = channel();
        std::thread::spawn(move || {
            for node in serde_json::Deserializer::from_reader(out).into_iter::<Value>() {
                let Ok(node) = node else { break };
                let count = node["status"]["allocatable"][GPU].as_str();
                let count = count.and_then(|c| c.parse().ok()).unwrap_or(0);
                if to.send((Instant::now(), count)).is_err() {
                    break;
                }
            }
        });
        Ok(Watch { child, told })
    }

    /// When the node has said that it may hand out `count`.
    fn says(&self, count: usize) -> Result<Instant> {
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (at, has) = self
                .told
                .recv_timeout(left)
                .with_context(|| format!("node{NODE} does not say that it has {count} GPUs"))?;
            if has == count {
                return Ok(at);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
