//! Exec, attach and port-forward, with the real crictl over both transports, and with clients that behave badly.
#![forbid(unsafe_code)]

mod abuse;
mod attach;
mod exec;
mod forward;
mod slow;
mod tls;

use std::time::Duration;

use anyhow::{Context, Result};
use harness::World;

/// crictl's `--transport`.
const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];
/// Sleeps, and reaps what is left to it, so that what is counted is what runs.
const SLEEP: &[&str] = &["sh", "-c", "sleep 100000 & wait"];
/// How long something may take that takes no time.
const SOON: Duration = Duration::from_secs(15);

/// The pid of the world's only shim.
fn shim(w: &World) -> Result<u32> {
    let found = harness::leftovers::processes_naming(w.daemon.state());
    let mut shims = found
        .into_iter()
        .filter(|(_, c)| c.contains("containerd-shim-slipway-v1"));
    let (pid, _) = shims.next().context("no shim")?;
    anyhow::ensure!(shims.next().is_none(), "more than one shim");
    Ok(pid)
}

/// How many processes a container has, by its own count.
async fn processes(w: &World, id: &str) -> Result<usize> {
    let (code, out, err) = w.cri.exec(id, &["sh", "-c", "echo /proc/[0-9]*"], 10).await?;
    anyhow::ensure!(code == 0, "{err}");
    // Without the shell that counts.
    Ok(out.split_whitespace().count() - 1)
}

/// As [`processes`], of a container that runs [`SLEEP`], when both of it are there.
async fn at_rest(w: &World, id: &str) -> Result<usize> {
    until("the container sleeps", async || Ok(processes(w, id).await? >= 2)).await?;
    processes(w, id).await
}

/// Waits until `holds`, looking every few milliseconds.
async fn until<F: Future<Output = Result<bool>>>(what: &str, mut holds: impl FnMut() -> F) -> Result<()> {
    let began = std::time::Instant::now();
    while !holds().await? {
        anyhow::ensure!(began.elapsed() < SOON, "{what}: not within {SOON:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
