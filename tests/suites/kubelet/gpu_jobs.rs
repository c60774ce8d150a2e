//! Jobs with GPUs through the real kubelet, as people write them: what one sees and may open, and a training on two nodes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use slipway_fake_gpu::Topology;

use crate::gpu::{GPU, SOON};
use crate::kube::{Kube, merge};

/// Everything that a program finds of GPUs, line by line. The devices have no driver: opening one that is allowed says so.
const LOOK: &str = r#"
import ctypes, mmap, os, stat
def opens(path):
    try:
        os.close(os.open(path, os.O_RDWR))
        return "opens"
    except OSError as e:
        return e.strerror
nodes = sorted(n for n in os.listdir("/dev") if n.startswith("nvidia"))
own = [n for n in nodes if n[6:].isdigit()]
print("nodes:", *nodes)
print("libcuda:", ctypes.CDLL("libcuda.so.1").libcuda_fake())
print("own:", *(opens("/dev/" + n) for n in own))
for minor in range(4):
    if f"nvidia{minor}" not in own:
        try:
            os.mknod(f"/dev/other{minor}", stat.S_IFCHR | 0o666, os.makedev(195, minor))
            print("other:", opens(f"/dev/other{minor}"))
        except OSError as e:
            print("other: cannot be made:", e.strerror)
size = os.statvfs("/dev/shm")
print("shm:", size.f_frsize * size.f_blocks >> 20)
with open("/dev/shm/batch", "wb") as f:
    f.truncate(64 << 20)
batch = mmap.mmap(os.open("/dev/shm/batch", os.O_RDWR), 64 << 20)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(batch)))
print("locked:", ctypes.CDLL(None).mlock(address, ctypes.c_size_t(64 << 20)) == 0)
print("nccl:", *(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NCCL_")))
print("visible:", os.environ.get("NVIDIA_VISIBLE_DEVICES"))
"#;

/// A Job of one pod with one GPU, which looks around; `spec` and `container` are put into its pod's.
fn job(k: &Kube, name: &str, spec: Value, security: Value) -> Result<()> {
    let mut context = json!({ "privileged": false, "capabilities": { "add": ["IPC_LOCK", "MKNOD"] } });
    merge(&mut context, security);
    let mut pod = json!({
        "restartPolicy": "Never",
        "nodeSelector": { "kubernetes.io/hostname": "node1" },
        "volumes": [{ "name": "shm", "emptyDir": { "medium": "Memory", "sizeLimit": "128Mi" } }],
        "containers": [{
            "name": "train", "image": "slipway.local/python:3", "imagePullPolicy": "Never",
            // A program that uses deep stacks, and locks what its card reads.
            "command": ["sh", "-ec", "ulimit -s unlimited; exec python3 -c \"$LOOK\""],
            "env": [
                { "name": "LOOK", "value": LOOK },
                { "name": "NCCL_DEBUG", "value": "WARN" },
                { "name": "NCCL_SOCKET_IFNAME", "value": "eth0" },
            ],
            "resources": { "limits": { "memory": "512Mi", GPU: 1 } },
            "volumeMounts": [{ "name": "shm", "mountPath": "/dev/shm" }],
            "securityContext": context,
        }],
    });
    merge(&mut pod, spec);
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": name },
        "spec": { "backoffLimit": 0, "template": { "spec": pod } },
    });
    k.apply(&job.to_string())
}

pub async fn a_job_sees_its_own_gpu_alone_and_finds_the_driver_on_any_root(k: Kube) -> Result<()> {
    let mut topology = Topology::named("h100x8")?;
    topology.gpus.truncate(4);
    k.cluster.prepare_examples()?;
    k.cluster.start_gpus(1, &topology)?;
    k.cluster.wait_allocatable(1, GPU, 4, SOON).await?;
    job(&k, "plain", json!({}), json!({}))?;
    job(
        &k,
        "read-only",
        json!({}),
        json!({ "readOnlyRootFilesystem": true }),
    )?;
    job(&k, "own-users", json!({ "hostUsers": false }), json!({}))?;
    for (name, other) in [
        ("plain", "other: Operation not permitted"),
        ("read-only", "other: Operation not permitted"),
        ("own-users", "other: cannot be made: Operation not permitted"),
    ] {
        k.complete(name, Duration::from_secs(90)).await?;
        let log = k.ok(&["logs", &format!("job/{name}")])?;
        let lines: Vec<&str> = log.lines().collect();
        let nodes = lines.first().context("it says nothing")?;
        let nodes: Vec<&str> = nodes.split(' ').skip(1).collect();
        let (cards, common): (Vec<&str>, Vec<&str>) = nodes
            .into_iter()
            .partition(|n| n.trim_start_matches("nvidia").parse::<u32>().is_ok());
        ensure!(cards.len() == 1, "{name}:\n{log}");
        ensure!(
            common == ["nvidia-modeset", "nvidia-uvm", "nvidia-uvm-tools", "nvidiactl"],
            "{name}:\n{log}"
        );
        // What may be locked is a right of the host's users: a limit is what others have.
        let locked = if name == "own-users" {
            "locked: False"
        } else {
            "locked: True"
        };
        let expected = [
            "libcuda: 580",
            "own: No such device or address",
            other,
            other,
            other,
            "shm: 128",
            locked,
            "nccl: NCCL_DEBUG=WARN NCCL_SOCKET_IFNAME=eth0",
            "visible: void",
        ];
        ensure!(lines[1..] == expected, "{name}:\n{log}");
    }
    k.cluster.processes().end("agent1", Duration::from_secs(5))?;
    Ok(())
}

/// manifests/examples/gpu-train-job.yaml.
pub async fn a_training_has_one_gpu_on_each_of_two_nodes(k: Kube) -> Result<()> {
    const IMAGE: &str = "registry.slipway.local:5000/train-digits:1";
    let source = harness::lab::repo().join("tests/fixtures/train-digits");
    let base = harness::lab::cache().join("demo/base");
    k.cluster.prepare_examples()?;
    let mut uuids = Vec::new();
    for n in [1, 2] {
        for (name, context) in [("slipway.local/python:3", &base), (IMAGE, &source)] {
            let context = context.display().to_string();
            // Packages are installed from the node's network, as manifests/examples/build-job.yaml does it.
            let args = ["build", "-q", "--network", "host", "-t", name, &context];
            let mut build = k.cluster.slipway(n, &args);
            harness::cmd::run(&mut build, Duration::from_secs(200))?.ok()?;
        }
        let mut topology = Topology::named("h200")?;
        topology.gpus[0].uuid = format!("GPU-{n:08}-0000-0000-0000-000000000000");
        uuids.push(topology.gpus[0].uuid.clone());
        k.cluster.start_gpus(n, &topology)?;
    }
    for n in [1, 2] {
        k.cluster.wait_allocatable(n, GPU, 1, SOON).await?;
    }
    k.example("gpu-train-job.yaml", &[])?;
    let field = |n: usize, path: &str| {
        let worker = format!("job-name=train-gpus,batch.kubernetes.io/job-completion-index={n}");
        k.ok(&[
            "get",
            "pods",
            "-l",
            &worker,
            "-o",
            &format!("jsonpath={{.items[0].{path}}}"),
        ])
    };
    k.until_true("both workers to run", |_| {
        let runs = |n| field(n, "status.phase").is_ok_and(|p| p == "Running");
        Ok(runs(0) && runs(1))
    })
    .await?;
    let mut nodes = Vec::new();
    for n in 0..2 {
        let look = "ls /dev | grep -c 'nvidia[0-9]'; python3 -c 'import ctypes; print(ctypes.CDLL(\"libcuda.so.1\").libcuda_fake())'; df -m /dev/shm | tail -1 | awk '{print $2}'";
        let said = k.exec(&field(n, "metadata.name")?, look)?;
        ensure!(said == "1\n580\n256\n", "worker {n}: {said}");
        nodes.push(field(n, "spec.nodeName")?);
    }
    nodes.sort();
    ensure!(nodes == ["node1", "node2"], "both have a worker: {nodes:?}");
    for (n, uuid) in [1, 2].into_iter().zip(&uuids) {
        let holders = crate::devices::Devices::of(&k, n).holders(GPU).await?;
        ensure!(
            holders.len() == 1 && holders.contains_key(uuid),
            "node {n}: {holders:?}"
        );
    }
    k.complete("train-gpus", Duration::from_secs(150)).await?;
    let leader = "job-name=train-gpus,batch.kubernetes.io/job-completion-index=0";
    let log = k.ok(&["logs", "-l", leader, "--tail=-1"])?;
    let accuracy = log.lines().find_map(|l| l.strip_prefix("accuracy "));
    let accuracy: f64 = accuracy.with_context(|| log.clone())?.parse()?;
    ensure!(accuracy > 0.85 && log.contains("worker 1 joins"), "{log}");
    for n in [1, 2] {
        k.cluster
            .processes()
            .end(&format!("agent{n}"), Duration::from_secs(5))?;
    }
    Ok(())
}
