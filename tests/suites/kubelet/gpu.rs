//! GPUs through the real kubelet: slipway-agent hands them out, slipwayd gives them to containers.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use slipway_fake_gpu::Topology;

use crate::kube::Kube;

const GPU: &str = "nvidia.com/gpu";
const SOON: Duration = Duration::from_secs(30);

/// A pod that asks for one GPU and stays.
fn pod(k: &Kube, name: &str) -> Result<()> {
    let resources = json!({ "limits": { GPU: 1 } });
    k.pod(
        name,
        "exec sleep 1000",
        json!({ "restartPolicy": "Always" }),
        json!({ "resources": resources }),
    )
}

/// The GPU of a running pod: the minor number of the one node that it has.
fn gpu_of(k: &Kube, pod: &str) -> Result<usize> {
    let nodes = k.exec(pod, "ls /dev | grep 'nvidia[0-9]'")?;
    let number = nodes.trim().strip_prefix("nvidia").and_then(|n| n.parse().ok());
    number.with_context(|| format!("{pod} has {nodes:?}"))
}

fn container(k: &Kube, pod: &str) -> Result<(String, String)> {
    let of = |field: &str| {
        k.field(
            &format!("pod/{pod}"),
            &format!(".status.containerStatuses[0].{field}"),
        )
    };
    Ok((of("containerID")?, of("restartCount")?))
}

pub async fn pods_get_gpus_of_their_own_and_a_sick_one_is_not_given_again(k: Kube) -> Result<()> {
    let mut topology = Topology::named("h100x8")?;
    topology.gpus.truncate(2);
    let driver = k.cluster.start_gpus(1, &topology)?;
    let took = k.cluster.wait_allocatable(1, GPU, 2, SOON).await?;
    println!("agent's start to the node's allocatable: {took:?}");

    for name in ["one", "two"] {
        pod(&k, name)?;
    }
    for name in ["one", "two"] {
        k.ready(name).await?;
    }
    let (one, two) = (gpu_of(&k, "one")?, gpu_of(&k, "two")?);
    ensure!(one != two, "both have GPU {one}");
    ensure!(
        k.exec(
            "one",
            "echo $NVIDIA_VISIBLE_DEVICES; ls /usr/lib/x86_64-linux-gnu/libcuda.so.1"
        )? == "void\n/usr/lib/x86_64-linux-gnu/libcuda.so.1\n"
    );
    let before = (container(&k, "one")?, container(&k, "two")?);

    driver.raise(&format!("{one} 79"))?;
    let took = k.cluster.wait_allocatable(1, GPU, 1, SOON).await?;
    println!("XID to the node's allocatable: {took:?}");

    // The agent dies and comes back, then kubelet, then slipwayd: no pod notices, and the sick GPU stays sick.
    let p = k.cluster.processes();
    p.signal("agent1", Signal::KILL);
    p.end("agent1", Duration::from_secs(5))?;
    k.cluster.wait_allocatable(1, GPU, 0, SOON).await?;
    k.cluster.start_agent(1)?;
    k.cluster.wait_allocatable(1, GPU, 1, SOON).await?;
    p.end("kubelet1", Duration::from_secs(10))?;
    k.cluster.start_kubelet(1)?;
    // What the API server says is the last kubelet's for a while: this one is asked itself.
    k.until_true("kubelet to know its pods", |k| {
        let pods = k
            .cluster
            .kubectl(&["get", "--raw", "/api/v1/nodes/node1/proxy/pods"])?;
        Ok(["one", "two"]
            .iter()
            .all(|p| pods.contains(&format!("\"name\":\"{p}\""))))
    })
    .await?;
    k.cluster.wait_allocatable(1, GPU, 1, SOON).await?;
    p.signal("slipwayd1", Signal::KILL);
    p.end("slipwayd1", Duration::from_secs(5))?;
    k.cluster.start_runtime(1)?;
    k.cluster.wait_ready(1, SOON).await?;
    for name in ["one", "two"] {
        k.ready(name).await?;
    }
    let after = (container(&k, "one")?, container(&k, "two")?);
    ensure!(
        before == after,
        "the containers were {before:?} and are {after:?}"
    );

    // No GPU is left: the sick one is not handed out, the other is taken.
    pod(&k, "three")?;
    k.until(
        "pod/three",
        ".status.conditions[?(@.type==\"PodScheduled\")].reason",
        "Unschedulable",
    )
    .await?;
    for name in ["one", "two"] {
        k.ok(&["delete", "pod", name, "--wait"])?;
    }
    k.ready("three").await?;
    ensure!(gpu_of(&k, "three")? == two, "it has the sick GPU");

    // A reset GPU is handed out again.
    driver.raise(&format!("{one} reset"))?;
    k.cluster.wait_allocatable(1, GPU, 2, SOON).await?;
    k.ok(&["delete", "pod", "three", "--wait"])?;
    the_examples_job_has_one(&k).await?;
    p.end("agent1", Duration::from_secs(5))?;
    Ok(())
}

/// manifests/examples/gpu-job.yaml, on an image without the trainer.
async fn the_examples_job_has_one(k: &Kube) -> Result<()> {
    k.cluster.prepare_examples()?;
    k.example(
        "gpu-job.yaml",
        &[
            (
                "registry.slipway.local:5000/train-digits:1",
                "slipway.local/python:3",
            ),
            (
                "exec python3 -u train.py --max_steps 100",
                "df /dev/shm | tail -1",
            ),
        ],
    )?;
    k.complete("train-gpu", Duration::from_secs(60)).await?;
    let log = k.ok(&["logs", "job/train-gpu"])?;
    let cards = log
        .lines()
        .filter(|l| l.starts_with("nvidia") && l.ends_with(|c: char| c.is_ascii_digit()));
    ensure!(cards.count() == 1, "{log}");
    ensure!(
        log.contains("libcuda is there") && log.contains(" 262144 "),
        "{log}"
    );
    Ok(())
}
