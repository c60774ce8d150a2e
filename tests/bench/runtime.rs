//! Pods and containers: one at a time in turn on both runtimes, then twenty at once.

use std::time::{Duration, Instant};

use anyhow::Result;
use harness::Lab;
use harness::cri::{container_config, pod_config};
use harness::image::BUSYBOX;

use crate::peers::Peer;
use crate::table::{Table, median};

const RUNS: usize = 30;

#[derive(Default)]
struct Times {
    run_cni: Vec<Duration>,
    run_host: Vec<Duration>,
    create: Vec<Duration>,
    start: Vec<Duration>,
    both: Vec<Duration>,
    exec: Vec<Duration>,
    streamed: Vec<Duration>,
    down: Vec<Duration>,
}

/// Fills the runtime rows.
pub async fn measure(table: &mut Table, lab: &Lab, ours: &Peer, theirs: &Peer) -> Result<()> {
    let (mut a, mut b) = (Times::default(), Times::default());
    for n in 0..RUNS + 2 {
        // Two rounds to warm up; then in turn, so that the machine's drift meets both.
        let (mut warm_a, mut warm_b) = (Times::default(), Times::default());
        let (ta, tb) = if n < 2 {
            (&mut warm_a, &mut warm_b)
        } else {
            (&mut a, &mut b)
        };
        one_life(lab, ours, &format!("s{n}"), ta).await?;
        one_life(lab, theirs, &format!("c{n}"), tb).await?;
    }
    table.times("RunPodSandbox with CNI", &a.run_cni, &b.run_cni);
    table.times("RunPodSandbox, host network", &a.run_host, &b.run_host);
    table.times("CreateContainer", &a.create, &b.create);
    table.times("StartContainer", &a.start, &b.start);
    table.times("Create + Start", &a.both, &b.both);
    table.times("ExecSync true", &a.exec, &b.exec);
    table.times("Exec true, over WebSocket", &a.streamed, &b.streamed);
    table.times("StopPod + RemovePod (CNI)", &a.down, &b.down);
    let idle = (ours.pss().0, theirs.pss().0);
    table.row("PSS of the idle daemon", idle.0 / 1024.0, idle.1 / 1024.0, "MiB");
    let (up_a, down_a, pss_a) = twenty(lab, ours, "ts").await?;
    let (up_b, down_b, pss_b) = twenty(lab, theirs, "tc").await?;
    table.times("20 pods at once, up", &[up_a], &[up_b]);
    table.times("20 pods at once, down", &[down_a], &[down_b]);
    table.row(
        "PSS of the daemon, 20 pods",
        pss_a.0 / 1024.0,
        pss_b.0 / 1024.0,
        "MiB",
    );
    table.row(
        "PSS of a shim, 20 pods",
        median(&pss_a.1) / 1024.0,
        median(&pss_b.1) / 1024.0,
        "MiB",
    );
    let all = |p: &(f64, Vec<f64>)| (p.0 + p.1.iter().sum::<f64>()) / 1024.0;
    table.row("PSS of everything, 20 pods", all(&pss_a), all(&pss_b), "MiB");
    Ok(())
}

async fn one_life(lab: &Lab, p: &Peer, name: &str, t: &mut Times) -> Result<()> {
    let host = pod_config(&format!("{name}-host"), lab, true);
    let began = Instant::now();
    let pod = p.cri.run_pod(host).await?;
    t.run_host.push(began.elapsed());
    p.cri.remove_pod(&pod).await?;

    let config = pod_config(name, lab, false);
    let began = Instant::now();
    let pod = p.cri.run_pod(config.clone()).await?;
    t.run_cni.push(began.elapsed());
    let container = container_config("main", BUSYBOX, &["sleep", "1000"]);
    let began = Instant::now();
    let id = p.cri.create(&pod, container, config).await?;
    t.create.push(began.elapsed());
    let start = Instant::now();
    p.cri.start(&id).await?;
    t.start.push(start.elapsed());
    t.both.push(began.elapsed());
    for _ in 0..2 {
        let began = Instant::now();
        p.cri.exec(&id, &["true"], 10).await?;
        t.exec.push(began.elapsed());
        let began = Instant::now();
        harness::websocket::exec(&p.cri, &id, &["true"]).await?;
        t.streamed.push(began.elapsed());
    }
    p.cri.stop(&id, 0).await?;
    let began = Instant::now();
    p.cri.remove_pod(&pod).await?;
    t.down.push(began.elapsed());
    Ok(())
}

type Twenty = (Duration, Duration, (f64, Vec<f64>));

async fn twenty(lab: &Lab, p: &Peer, tag: &str) -> Result<Twenty> {
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..20 {
        let (cri, config) = (p.cri.clone(), pod_config(&format!("{tag}{n}"), lab, false));
        tasks.spawn(async move {
            let pod = cri.run_pod(config.clone()).await?;
            cri.run(
                &pod,
                container_config("main", BUSYBOX, &["sleep", "1000"]),
                config,
            )
            .await?;
            anyhow::Ok(pod)
        });
    }
    let mut pods = Vec::new();
    while let Some(r) = tasks.join_next().await {
        pods.push(r??);
    }
    let up = began.elapsed();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let pss = p.pss();
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for pod in pods {
        let cri = p.cri.clone();
        tasks.spawn(async move { cri.remove_pod(&pod).await });
    }
    while let Some(r) = tasks.join_next().await {
        r??;
    }
    Ok((up, began.elapsed(), pss))
}
