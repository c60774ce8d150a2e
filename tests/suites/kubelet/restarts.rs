//! kubelet and slipwayd start again under running pods.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::kube::Kube;

const COUNT: &str = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.05; done";

pub async fn a_running_container_never_notices_restarts_of_kubelet_and_slipwayd(k: Kube) -> Result<()> {
    k.pod("steady", COUNT, json!({ "restartPolicy": "Always" }), json!({}))?;
    k.ready("steady").await?;
    let state = |k: &Kube| -> Result<(String, String, String)> {
        let c = ".status.containerStatuses[0]";
        Ok((
            k.field("pod/steady", &format!("{c}.containerID"))?,
            k.field("pod/steady", &format!("{c}.restartCount"))?,
            k.field("pod/steady", ".status.podIP")?,
        ))
    };
    let before = state(&k)?;
    let p = k.cluster.processes();

    p.end("kubelet1", Duration::from_secs(10))?;
    k.cluster.start_kubelet(1)?;
    k.cluster.wait_ready(1, Duration::from_secs(30)).await?;

    p.signal("slipwayd1", Signal::KILL);
    p.end("slipwayd1", Duration::from_secs(5))?;
    k.cluster.start_runtime(1)?;
    k.cluster.wait_ready(1, Duration::from_secs(30)).await?;

    p.end("slipwayd1", Duration::from_secs(10))?;
    p.end("kubelet1", Duration::from_secs(10))?;
    k.cluster.start_runtime(1)?;
    k.cluster.wait_runtime(1).await?;
    k.cluster.start_kubelet(1)?;
    k.cluster.wait_ready(1, Duration::from_secs(30)).await?;

    // A pod made now proves that kubelet has taken up its work, and has looked at every pod.
    k.pod("after", "exec sleep 1000", json!({}), json!({}))?;
    k.ready("after").await?;
    k.ready("steady").await?;
    let after = state(&k)?;
    ensure!(before == after, "the container was {before:?} and is {after:?}");
    let numbers = |k: &Kube| -> Result<Vec<u32>> {
        Ok(k.logs("steady")?.lines().filter_map(|l| l.parse().ok()).collect())
    };
    // It goes on: half of what is looked at is written from now on.
    let so_far = numbers(&k)?.len();
    k.until_true("the log to go on", |k| Ok(numbers(k)?.len() > so_far * 2))
        .await?;
    let numbers = numbers(&k)?;
    let gap = numbers.windows(2).find(|w| w[1] != w[0] + 1);
    ensure!(gap.is_none(), "a gap in the log at {gap:?}");
    ensure!(k.exec("steady", "echo alive")? == "alive\n");
    Ok(())
}

pub async fn the_node_is_ready_soon_after_slipwayd_is_up(k: Kube) -> Result<()> {
    let p = k.cluster.processes();
    p.end("kubelet1", Duration::from_secs(10))?;
    p.end("slipwayd1", Duration::from_secs(10))?;
    let ready = |k: &Kube| {
        let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].lastHeartbeatTime}{.status.conditions[?(@.type==\"Ready\")].status}";
        k.cluster.kubectl(&["get", "node", "node1", "-o", path])
    };
    let before = ready(&k)?;
    let began = Instant::now();
    k.cluster.start_runtime(1)?;
    while k.cluster.cri(1).await.is_err() {
        ensure!(
            began.elapsed() < Duration::from_secs(20),
            "slipwayd does not answer"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let up = Instant::now();
    ensure!(
        up - began < Duration::from_secs(2),
        "slipwayd took {:?} to answer",
        up - began
    );
    k.cluster.start_kubelet(1)?;
    loop {
        let now = ready(&k)?;
        if now != before && now.ends_with("True") {
            break;
        }
        ensure!(
            up.elapsed() < Duration::from_secs(20),
            "the node is not Ready: {now}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!(
        "the node was Ready {:?} after slipwayd answered, which took {:?}",
        up.elapsed(),
        up - began
    );
    // kubelet's own start is part of it, on a machine with other tests: two seconds where it is quiet.
    ensure!(
        up.elapsed() < Duration::from_secs(8),
        "Ready after {:?}",
        up.elapsed()
    );
    Ok(())
}
