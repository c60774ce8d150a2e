//! A GPU that falls sick in the middle of a training: who has it is ended with the XID as the reason, and the Job trains on
//! from its checkpoint on a GPU that is well, with nobody touching it.

use std::fs::File;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use slipway_fake_gpu::{Driver, Topology};

use crate::OURS;
use crate::kube::Kube;

const GPU: &str = "nvidia.com/gpu";
const SOON: Duration = Duration::from_secs(60);
const STEPS: u32 = 60;
const SOURCE: &str = "tests/fixtures/train-resume/train.py";
const XID: &str = "GpuXid79";

/// What the API server has said of pods: a line each time that one changed.
struct Watched {
    child: Child,
    file: std::path::PathBuf,
}

impl Watched {
    fn of(k: &Kube, label: &str) -> Result<Watched> {
        let file = k.cluster.dir().join(format!("watched-{label}"));
        let ended = ".status.containerStatuses[0].state.terminated";
        let line = format!(
            "jsonpath={{.metadata.name}}|{{.status.phase}}|{{{ended}.exitCode}}|{{{ended}.reason}}|{{{ended}.message}}|\
             {{.status.containerStatuses[0].restartCount}}|{{\"\\n\"}}"
        );
        let of = format!("job-name={label}");
        let child = k
            .command(&["get", "pods", "-w", "-l", &of, "-o", &line])
            .stdin(Stdio::null())
            .stdout(File::create(&file)?)
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Watched { child, file })
    }

    fn lines(&self) -> Result<Vec<Vec<String>>> {
        let text = std::fs::read_to_string(&self.file)?;
        let fields = |l: &str| l.split('|').map(str::to_owned).collect();
        Ok(text.lines().map(fields).collect())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What may be different about a training.
#[derive(Debug, Clone, Copy)]
struct Case {
    name: &'static str,
    policy: &'static str,
    /// Whether another GPU is free.
    spare: bool,
}

pub async fn a_training_goes_on_on_another_gpu_when_its_own_falls_sick(k: Kube) -> Result<()> {
    let (never, on_failure) = (
        Case {
            name: "never-spare",
            policy: "Never",
            spare: true,
        },
        Case {
            name: "again-spare",
            policy: "OnFailure",
            spare: true,
        },
    );
    each(&k, [never, on_failure]).await
}

pub async fn a_training_without_a_spare_gpu_waits_until_its_own_is_well(k: Kube) -> Result<()> {
    let (never, on_failure) = (
        Case {
            name: "never-alone",
            policy: "Never",
            spare: false,
        },
        Case {
            name: "again-alone",
            policy: "OnFailure",
            spare: false,
        },
    );
    each(&k, [never, on_failure]).await
}

async fn each(k: &Kube, cases: [Case; 2]) -> Result<()> {
    k.cluster.prepare_examples()?;
    let source = harness::lab::repo().join(SOURCE).display().to_string();
    k.ok(&["create", "configmap", "train", &format!("--from-file={source}")])?;
    // What an uninterrupted training comes to.
    let whole = harness::cmd::sh(&format!("python3 '{source}' --any_device --steps {STEPS}"))?;
    let whole = whole.lines().last().context("no accuracy")?.to_owned();
    let mut topology = Topology::named("h100x8")?;
    topology.gpus.truncate(2);
    let driver = k.cluster.start_gpus(OURS, &topology)?;
    for case in cases {
        k.cluster.wait_allocatable(OURS, GPU, 2, SOON).await?;
        let done = one(k, &driver, &topology, case, &whole).await;
        done.with_context(|| {
            let agent = k.cluster.processes().tail(&format!("agent{OURS}"), 40);
            format!("{case:?}; the agent's log:\n{agent}")
        })?;
    }
    k.cluster
        .processes()
        .end(&format!("agent{OURS}"), Duration::from_secs(5))
}

/// The node's folder for the checkpoint; a training comes to its end when there is a file `end` in it.
fn kept(k: &Kube, case: Case) -> std::path::PathBuf {
    k.cluster.node_dir(OURS).join(format!("checkpoint-{}", case.name))
}

fn train(k: &Kube, case: Case) -> Result<()> {
    let kept = kept(k, case);
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": case.name },
        "spec": { "backoffLimit": 1, "template": { "spec": {
            "restartPolicy": case.policy, "terminationGracePeriodSeconds": 30,
            "nodeSelector": { "kubernetes.io/hostname": format!("node{OURS}") },
            "containers": [{
                "name": "main", "image": "slipway.local/python:3", "imagePullPolicy": "Never",
                "command": ["python3", "-u", "/train/train.py", "--steps", STEPS.to_string(), "--step_seconds", "0.25",
                            "--checkpoint", "/checkpoint/state.json", "--end_after", "/checkpoint/end"],
                "resources": { "limits": { GPU: 1 } },
                "volumeMounts": [{ "name": "train", "mountPath": "/train" }, { "name": "kept", "mountPath": "/checkpoint" }],
            }],
            "volumes": [
                { "name": "train", "configMap": { "name": "train" } },
                { "name": "kept", "hostPath": { "path": kept, "type": "DirectoryOrCreate" } },
            ],
        } } },
    });
    k.apply(&job.to_string())
}

/// The job's pods that are not `other`.
fn pods(k: &Kube, case: Case, other: &str) -> Result<Vec<String>> {
    let of = format!("job-name={}", case.name);
    let names = k.ok(&[
        "get",
        "pods",
        "-l",
        &of,
        "-o",
        "jsonpath={.items[*].metadata.name}",
    ])?;
    let names = names.split_whitespace().filter(|n| *n != other);
    Ok(names.map(str::to_owned).collect())
}

/// Waits until the pod has come to a step; the step it is at.
async fn trains(k: &Kube, pod: &str, beyond: u32) -> Result<u32> {
    let began = Instant::now();
    loop {
        // A pod that is not started yet has no log.
        let log = k.logs(pod).unwrap_or_default();
        let steps = log
            .lines()
            .filter_map(|l| l.strip_prefix("step ")?.split('/').next()?.parse().ok());
        match steps.max() {
            Some(step) if step > beyond => return Ok(step),
            _ if began.elapsed() > SOON => bail!("{pod} does not come beyond step {beyond}:\n{log}"),
            _ => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// The GPU that a pod has, as its training says.
fn gpu_of(k: &Kube, pod: &str) -> Result<usize> {
    let log = k.logs(pod)?;
    let number = log.lines().find_map(|l| l.strip_prefix("on nvidia"));
    number.and_then(|n| n.parse().ok()).with_context(|| log.clone())
}

fn events(k: &Kube, pod: &str) -> Result<String> {
    let of = format!("involvedObject.name={pod}");
    let said = "jsonpath={range .items[*]}{.reason}: {.message}{\"\\n\"}{end}";
    k.ok(&["get", "events", "--field-selector", &of, "-o", said])
}

fn identity(k: &Kube, pod: &str) -> Result<String> {
    k.field(
        &format!("pod/{pod}"),
        ".status.containerStatuses[0]['containerID','restartCount']",
    )
}

async fn one(k: &Kube, driver: &Driver, topology: &Topology, case: Case, whole: &str) -> Result<()> {
    if !case.spare {
        let limits = json!({ "resources": { "limits": { GPU: 1 } } });
        k.pod("occupant", "exec sleep 1000", json!({}), limits)?;
        k.ready("occupant").await?;
    }
    train(k, case)?;
    k.until_true("its pod", |k| Ok(pods(k, case, "")?.len() == 1))
        .await?;
    let first = pods(k, case, "")?.remove(0);
    let at = trains(k, &first, 4).await?;
    let sick = gpu_of(k, &first)?;
    let uuid = &topology.gpus[sick].uuid;
    let before = identity(k, &first)?;

    // An error of the application's, on its GPU: nothing happens.
    driver.raise(&format!("{sick} 31"))?;
    let at = trains(k, &first, at + 8).await?;
    ensure!(identity(k, &first)? == before, "it is another container");
    k.cluster.wait_allocatable(OURS, GPU, 2, SOON).await?;

    let watched = Watched::of(k, case.name)?;
    let raised = Instant::now();
    driver.raise(&format!("{sick} 79"))?;
    k.cluster.wait_allocatable(OURS, GPU, 1, SOON).await?;
    k.until_true("the container to have ended for the XID", |_| {
        let is_it = |l: &Vec<String>| {
            let field = |n: usize| l.get(n).map_or("", String::as_str);
            field(0) == first
                && (field(2), field(3)) == ("137", XID)
                && field(4).contains("XID 79")
                && field(4).contains(uuid.as_str())
        };
        Ok(watched.lines()?.iter().any(is_it))
    })
    .await?;
    println!(
        "{}: XID to the container's termination in its status: {:?}",
        case.name,
        raised.elapsed()
    );
    File::create(kept(k, case).join("end"))?;
    let evicted = case.policy != "Never";
    k.until_true("its Events", |k| {
        let said = events(k, &first)?;
        let told = |reason: &str| {
            said.lines()
                .any(|l| l.starts_with(reason) && l.contains("XID 79"))
        };
        Ok(told("GpuUnhealthy") && told("GpuFaultFailed") && told("GpuFaultEvicted") == evicted)
    })
    .await?;
    if evicted {
        k.until_true("the pod to be gone", |k| Ok(!pods(k, case, "")?.contains(&first)))
            .await?;
    } else {
        k.phase(&first, "Failed").await?;
        let reason = ".status.containerStatuses[0].state.terminated.reason";
        ensure!(k.field(&format!("pod/{first}"), reason)? == XID);
    }
    k.until_true("a replacement", |k| Ok(pods(k, case, &first)?.len() == 1))
        .await?;
    let second = pods(k, case, &first)?.remove(0);
    if !case.spare {
        let why = ".status.conditions[?(@.type==\"PodScheduled\")].reason";
        k.until(&format!("pod/{second}"), why, "Unschedulable").await?;
        driver.raise(&format!("{sick} reset"))?;
    }
    k.complete(case.name, SOON).await?;
    println!(
        "{}: XID to the Job's completion: {:?}",
        case.name,
        raised.elapsed()
    );
    ensure!(
        (gpu_of(k, &second)? == sick) != case.spare,
        "the second pod had GPU {}",
        gpu_of(k, &second)?
    );
    let log = k.logs(&second)?;
    let resumed = log.lines().find_map(|l| l.strip_prefix("resumes after step "));
    let resumed: u32 = resumed
        .and_then(|n| n.parse().ok())
        .with_context(|| log.clone())?;
    ensure!(
        resumed >= at && resumed < STEPS,
        "it resumed after step {resumed}, and was at {at}"
    );
    let said = log.lines().last().context("no log")?;
    ensure!(said == whole, "it came to {said}, and uninterrupted to {whole}");
    let counts = k.field(&format!("job/{}", case.name), ".status['succeeded','failed']")?;
    ensure!(counts == "1 1", "one pod succeeded and one failed: {counts}");
    let lines = watched.lines()?;
    let again = |l: &&Vec<String>| l.get(5).is_some_and(|n| !n.is_empty() && n != "0");
    ensure!(
        lines.iter().find(again).is_none(),
        "a container was started again on the sick GPU: {lines:?}"
    );
    if case.spare {
        driver.raise(&format!("{sick} reset"))?;
    } else {
        k.ok(&["delete", "pod", "occupant", "--wait"])?;
    }
    k.ok(&["delete", "job", case.name, "--wait"])?;
    Ok(())
}

pub async fn a_sick_gpu_ends_all_who_have_a_slice_of_it(k: Kube) -> Result<()> {
    let mut topology = Topology::named("a100x4-mig")?;
    topology.gpus.truncate(2);
    // One profile a pod, and the third on the other GPU.
    for (gpu, profiles) in topology
        .gpus
        .iter_mut()
        .zip([&["1g.5gb", "2g.10gb"][..], &["3g.20gb"]])
    {
        let mig = gpu.mig.as_mut().context("no MIG")?;
        let mut left = profiles.to_vec();
        mig.devices.retain(|d| {
            let wanted = left.iter().position(|p| *p == d.profile);
            wanted.map(|n| left.remove(n)).is_some()
        });
        ensure!(left.is_empty(), "the topology has no {left:?}");
    }
    let more = "[resources]\nmig_strategy = \"mixed\"\n";
    let driver = k.cluster.start_gpus_with(OURS, &topology, more)?;
    let profiles = ["1g.5gb", "2g.10gb", "3g.20gb"].map(|p| format!("nvidia.com/mig-{p}"));
    let names = ["one", "two", "other"];
    for (name, resource) in names.iter().zip(&profiles) {
        k.cluster.wait_allocatable(OURS, resource, 1, SOON).await?;
        let limits = json!({ "resources": { "limits": { resource: 1 } } });
        k.pod(name, "exec sleep 1000", json!({}), limits)?;
    }
    for name in names {
        k.ready(name).await?;
    }
    let before = identity(&k, "other")?;
    driver.raise("0 79")?;
    for name in ["one", "two"] {
        let ended = ".status.containerStatuses[0].state.terminated";
        k.until(&format!("pod/{name}"), &format!("{ended}.reason"), XID)
            .await?;
        let message = k.field(&format!("pod/{name}"), &format!("{ended}.message"))?;
        ensure!(message.contains(&topology.gpus[0].uuid), "{message}");
        k.phase(name, "Failed").await?;
    }
    ensure!(identity(&k, "other")? == before && k.field("pod/other", ".status.phase")? == "Running");
    k.ok(&["delete", "pods", "--all", "--wait"])?;
    k.cluster
        .processes()
        .end(&format!("agent{OURS}"), Duration::from_secs(5))
}
