//! GPUs through the real kubelet: slipway-agent hands them out, slipwayd gives them to containers.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use slipway_fake_gpu::Topology;

use crate::kube::Kube;

pub const GPU: &str = "nvidia.com/gpu";
pub const SOON: Duration = Duration::from_secs(30);

/// The node's condition of its GPUs.
const SICK: &str = ".status.conditions[?(@.type==\"GpuUnhealthy\")].status";

/// What the agent of node 1 tells Prometheus.
pub fn metrics(k: &Kube) -> Result<String> {
    let address = k.cluster.agent_address(1).context("no address")?;
    let mut stream = std::net::TcpStream::connect(address)?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// How long a page of metrics is good.
const A_PAGE: Duration = Duration::from_millis(1100);

/// How often kubelet says that something of its list of pods was called.
fn called(k: &Kube, what: &str) -> Result<usize> {
    let log = std::fs::read_to_string(k.cluster.processes().log("kubelet1"))?;
    Ok(log.matches(&format!("{what} called")).count())
}

/// A process of a pod's container, as the host knows it.
fn process(k: &Kube, pod: &str) -> Result<u32> {
    let uid = k.field(&format!("pod/{pod}"), ".metadata.uid")?;
    let (id, _) = container(k, pod)?;
    let id = id.rsplit('/').next().context("no id")?.to_owned();
    let all = std::fs::read_dir("/proc")?.flatten();
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let there = |pid: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        text.contains(&id) && (text.contains(&uid) || text.contains(&uid.replace('-', "_")))
    };
    pids.into_iter()
        .find(there)
        .with_context(|| format!("no process of {pod}"))
}

/// A pod that asks for one GPU and stays.
pub fn pod(k: &Kube, name: &str) -> Result<()> {
    let resources = json!({ "limits": { GPU: 1 } });
    k.pod(
        name,
        "exec sleep 1000",
        json!({ "restartPolicy": "Always" }),
        json!({ "resources": resources }),
    )
}

/// The GPU of a running pod: the minor number of the one node that it has.
pub fn gpu_of(k: &Kube, pod: &str) -> Result<usize> {
    let nodes = k.exec(pod, "ls /dev | grep 'nvidia[0-9]'")?;
    let number = nodes.trim().strip_prefix("nvidia").and_then(|n| n.parse().ok());
    number.with_context(|| format!("{pod} has {nodes:?}"))
}

pub fn container(k: &Kube, pod: &str) -> Result<(String, String)> {
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
    // What becomes of the pods by kubelet alone.
    let driver = k.cluster.start_gpus_with(1, &topology, "action = \"none\"\n")?;
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

    let uuid = |n: usize| topology.gpus[n].uuid.as_str();
    for (label, value) in [
        ("nvidia\\.com/gpu\\.count", "2"),
        ("nvidia\\.com/gpu\\.product", "NVIDIA-H100-80GB-HBM3"),
        ("nvidia\\.com/gpu\\.nvlink", "18"),
    ] {
        k.until("node/node1", &format!(".metadata.labels.{label}"), value)
            .await?;
    }
    k.until("node/node1", SICK, "False").await?;
    // Kubelet's own lists say whose a GPU is.
    let page = metrics(&k)?;
    for (pod, gpu) in [("one", one), ("two", two)] {
        let has = |l: &str| {
            l.starts_with("slipway_gpu_allocated{")
                && [
                    format!("pod=\"{pod}\""),
                    format!("uuid=\"{}\"", uuid(gpu)),
                    "container=\"main\"".into(),
                ]
                .iter()
                .all(|w| l.contains(w))
        };
        ensure!(page.lines().any(has), "{pod} has not GPU {gpu}:\n{page}");
    }
    // Kubelet tells of its pods by itself: where nothing changes, it is asked nothing, however often somebody wants to know.
    k.until_true("kubelet's pods to be heard of", |k| {
        Ok(called(k, "WatchPods")? > 0)
    })
    .await?;
    metrics(&k)?;
    let lists = called(&k, "ListPods")?;
    for _ in 0..3 {
        tokio::time::sleep(A_PAGE).await;
        ensure!(metrics(&k)?.contains("pod=\"one\""));
    }
    ensure!(called(&k, "ListPods")? == lists, "kubelet was asked for its pods");
    // A process of a container of ours is found by its cgroup.
    let pid = process(&k, "two")?;
    let mut busy = topology.clone();
    busy.gpus[two].processes = vec![slipway_fake_gpu::topology::Process {
        pid,
        used_mib: 1,
        ..Default::default()
    }];
    driver.set_topology(&busy)?;
    std::os::unix::fs::symlink(format!("/proc/{pid}"), driver.proc().join(pid.to_string()))?;
    k.until_true("the process to be two's", |k| {
        let line = format!(
            "slipway_gpu_process_memory_bytes{{gpu=\"{two}\",uuid=\"{}\",pid=\"{pid}\"",
            uuid(two)
        );
        let page = metrics(k)?;
        let mut lines = page.lines().filter(|l| l.starts_with(&line));
        Ok(lines.any(|l| l.contains("pod=\"two\"") && l.contains("container=\"main\"")))
    })
    .await?;

    driver.raise(&format!("{one} 79"))?;
    let took = k.cluster.wait_allocatable(1, GPU, 1, SOON).await?;
    println!("XID to the node's allocatable: {took:?}");

    k.until("node/node1", SICK, "True").await?;
    k.until_true("the Events", |k| {
        let pod = k.ok(&[
            "get",
            "events",
            "--field-selector",
            "reason=GpuUnhealthy,involvedObject.name=one",
        ])?;
        let node = k.cluster.kubectl(&[
            "get",
            "events",
            "-n",
            "default",
            "--field-selector",
            "reason=GpuUnhealthy,involvedObject.name=node1",
        ])?;
        Ok(pod.contains("XID 79") && node.contains(uuid(one)))
    })
    .await?;
    let described = k.ok(&["describe", "pod", "one"])?;
    ensure!(described.contains("GpuUnhealthy"), "{described}");
    ensure!(
        !k.ok(&["get", "events"])?.contains("pod/two")
            || !k.ok(&["describe", "pod", "two"])?.contains("GpuUnhealthy")
    );

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
    k.until_true("nothing to be said of pods that are gone", |k| {
        let page = metrics(k)?;
        Ok(page.contains("pod=\"three\"")
            && ["one", "two"]
                .iter()
                .all(|p| !page.contains(&format!("pod=\"{p}\""))))
    })
    .await?;

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
