//! kubelet with the gate EventedPLEG, on the second node: it listens to the runtime's events, and looks at a pod as soon as a
//! container of it has ended.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::kube::Kube;
use crate::{OURS, SECOND};

const PODS: usize = 9;

/// What the node's kubelet counts, 0 for what it does not know.
fn counted(k: &Kube, node: usize, name: &str) -> Result<f64> {
    let all = k.ok(&["get", "--raw", &format!("/api/v1/nodes/node{node}/proxy/metrics")])?;
    let name = format!("kubelet_{name}");
    let of = |l: &str| l.strip_prefix(&name)?.strip_prefix(' ')?.parse().ok();
    Ok(all.lines().find_map(of).unwrap_or(0.0))
}

fn on(node: usize) -> serde_json::Value {
    json!({ "nodeSelector": { "kubernetes.io/hostname": format!("node{node}") } })
}

/// Seconds into an hour's quarter, which every time zone has the same: "…T12:34:56.789Z" or klog's "I1130 12:34:56.789 …".
fn seconds(clock: &str) -> Option<f64> {
    let mut parts = clock.split(':').skip(1);
    let minutes: f64 = parts.next()?.parse().ok()?;
    let seconds: f64 = parts.next()?.parse().ok()?;
    Some((minutes * 60.0 + seconds) % 900.0)
}

/// How long after their ends the node's kubelet has heard of the pods' containers: sorted, in seconds.
async fn delays(k: &Kube, node: usize) -> Result<Vec<f64>> {
    let pods: Vec<String> = (0..PODS).map(|n| format!("ends-{node}-{n}")).collect();
    for (n, pod) in pods.iter().enumerate() {
        // Not all in the same part of kubelet's second.
        let script = format!("sleep 0.{n}; exit 3");
        k.pod(pod, &script, on(node), json!({}))?;
    }
    let log = k.cluster.processes().log(&format!("kubelet{node}"));
    let cri = k.cluster.cri(node).await?;
    let mut delays = Vec::new();
    for pod in &pods {
        k.phase(pod, "Failed").await?;
        let id = k.field(&format!("pod/{pod}"), ".status.containerStatuses[0].containerID")?;
        let id = id.strip_prefix("slipway://").context("whose container is it?")?;
        let ended = cri.status(id).await?.finished_at;
        let ended = (ended as f64 / 1e9) % 900.0;
        let log = std::fs::read_to_string(&log)?;
        let heard = log
            .lines()
            .find(|l| l.contains("container finished") && l.contains(id))
            .with_context(|| format!("kubelet does not say when it heard of {id}"))?;
        let heard = heard.split(' ').nth(1).and_then(seconds).context("klog's time")?;
        delays.push((heard - ended).rem_euclid(900.0));
    }
    delays.sort_by(f64::total_cmp);
    Ok(delays)
}

pub async fn kubelet_hears_of_ends_by_the_events_of_the_runtime(k: Kube) -> Result<()> {
    let pleg = |name: &str| counted(&k, SECOND, &format!("evented_pleg_connection_{name}"));
    ensure!(pleg("success_count")? >= 1.0, "kubelet is not connected");
    let relisted = || counted(&k, SECOND, "pleg_pod_relist_duration_seconds_count");
    let (events, late, looks) = (
        pleg("latency_seconds_count")?,
        pleg("latency_seconds_sum")?,
        relisted()?,
    );
    let with = delays(&k, SECOND).await?;
    // The container's three and the pod's own.
    let told = pleg("latency_seconds_count")? - events;
    ensure!(told >= 4.0 * PODS as f64, "{told} events of {PODS} pods");
    ensure!(
        relisted()? >= looks + 1.0,
        "kubelet looked at no pod for the sake of an event"
    );
    let mean = (pleg("latency_seconds_sum")? - late) / told;
    // The other node's kubelet lists everything once a second, which is half a second on average.
    let without = delays(&k, OURS).await?;
    let median = |delays: &[f64]| delays[PODS / 2];
    println!(
        "an event is at kubelet {:.1} ms after what it tells of; kubelet knew of an end {:.0} ms after it (median), {:.0} at most; {:.0} without events",
        mean * 1e3,
        median(&with) * 1e3,
        with[PODS - 1] * 1e3,
        median(&without) * 1e3
    );
    ensure!(
        median(&with) < median(&without),
        "kubelet knew of the ends {with:?} s late, without events {without:?}"
    );
    // Without a time of the runtime's, kubelet looks for the containers itself: what it does otherwise loses the living ones.
    let cri = k.cluster.cri(SECOND).await?;
    let pods = cri.pods().await?;
    let pod = pods.first().context("no pod")?;
    ensure!(cri.pod_status(&pod.id).await?.timestamp == 0);
    Ok(())
}

/// A pod whose init containers count how often they have run, with a sidecar between them, a container that stays and one that
/// fails again and again.
const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: order}
spec:
  restartPolicy: Always
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: node2}
  volumes: [{name: shared, emptyDir: {}}]
  initContainers:
  - {name: first, image: IMAGE, command: [sh, -c, "echo first >> /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - name: sidecar
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "echo sidecar >> /shared/order; touch /shared/up; exec sleep 1000"]
    startupProbe: {exec: {command: [test, -f, /shared/up]}, periodSeconds: 1, timeoutSeconds: 10}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - {name: second, image: IMAGE, command: [sh, -c, "echo second >> /shared/order"], volumeMounts: [{name: shared, mountPath: /shared}]}
  containers:
  - {name: main, image: IMAGE, command: [sh, -c, "exec sleep 1000"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - {name: failing, image: IMAGE, command: [sh, -c, "exit 7"]}
"#;

const JOB: &str = r#"
apiVersion: batch/v1
kind: Job
metadata: {name: retries}
spec:
  completions: 2
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: OnFailure
      nodeSelector: {kubernetes.io/hostname: node2}
      volumes: [{name: shared, emptyDir: {}}]
      initContainers:
      - {name: ready, image: IMAGE, command: [sh, -c, "echo ran >> /shared/init"], volumeMounts: [{name: shared, mountPath: /shared}]}
      containers:
      - name: main
        image: IMAGE
        command: [sh, -c, "cat /shared/init; [ -f /shared/tried ] || { touch /shared/tried; exit 7; }"]
        volumeMounts: [{name: shared, mountPath: /shared}]
"#;

pub async fn pods_go_on_as_they_should_where_kubelet_hears_of_ends_by_events(k: Kube) -> Result<()> {
    k.apply(POD)?;
    k.apply(JOB)?;
    let of = |name: &str| format!(".status.containerStatuses[?(@.name==\"{name}\")]");
    let restarts = |name: &str| -> Result<u32> {
        let count = k.field("pod/order", &format!("{}.restartCount", of(name)))?;
        count.parse().context(count)
    };
    k.until_true("a container to fail twice", |_| Ok(restarts("failing")? >= 2))
        .await?;
    k.until("pod/order", &format!("{}.ready", of("main")), "true")
        .await?;
    let order = || k.ok(&["exec", "order", "-c", "main", "--", "cat", "/shared/order"]);
    ensure!(order()? == "first\nsidecar\nsecond\n", "{}", order()?);
    ensure!(
        k.field(
            "pod/order",
            &format!("{}.lastState.terminated.exitCode", of("failing"))
        )? == "7"
    );
    k.until(
        "job/retries",
        ".status.conditions[?(@.type==\"Complete\")].status",
        "True",
    )
    .await?;
    let logs = k.ok(&["logs", "-l", "job-name=retries", "--tail=-1"])?;
    ensure!(logs == "ran\nran\n", "each init container runs once: {logs:?}");

    // The stream ends with slipwayd. kubelet asks for another five times in all, without a pause, and a slipwayd that is down
    // for a moment costs it all five: it goes on by its lists, once a second, until it starts anew itself.
    let pleg = |name: &str| counted(&k, SECOND, &format!("evented_pleg_connection_{name}_count"));
    ensure!(pleg("success")? >= 1.0, "kubelet is not connected");
    let p = k.cluster.processes();
    p.signal("slipwayd2", Signal::KILL);
    p.end("slipwayd2", Duration::from_secs(5))?;
    k.cluster.start_runtime(SECOND)?;
    k.cluster.wait_ready(SECOND, Duration::from_secs(30)).await?;
    let failed = restarts("failing")?;
    k.until_true("the failing container to be started again", |_| {
        Ok(restarts("failing")? > failed)
    })
    .await?;
    println!(
        "after slipwayd was killed kubelet has had {} streams of events and {} failures",
        pleg("success")?,
        pleg("error")?
    );
    k.pod("later", "exit 0", on(SECOND), json!({}))?;
    k.phase("later", "Succeeded").await?;
    ensure!(order()? == "first\nsidecar\nsecond\n", "{}", order()?);
    ensure!(restarts("main")? == 0, "main was started again");

    p.end("kubelet2", Duration::from_secs(10))?;
    k.cluster.start_kubelet(SECOND)?;
    k.cluster.wait_ready(SECOND, Duration::from_secs(30)).await?;
    k.until_true("kubelet to listen again", |_| Ok(pleg("success")? >= 1.0))
        .await?;
    k.pod("last", "exit 0", on(SECOND), json!({}))?;
    k.phase("last", "Succeeded").await?;
    ensure!(order()? == "first\nsidecar\nsecond\n", "{}", order()?);
    ensure!(restarts("main")? == 0, "main was started again");
    k.ok(&["delete", "pod", "order"]).map(drop)
}
