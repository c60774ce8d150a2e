//! The agent's HTTP server, and whose GPUs and XIDs are.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use slipway_fake_gpu::Topology;
use slipway_fake_gpu::topology::Process;

use crate::kubelet::{GPU, Kubelet, ready};
use crate::node::{Node, root};
use crate::who::{Pod, Who};

const QUICK: &str = "[health]\nprobe_seconds = 1\n";
const UID: [&str; 2] = [
    "0b1c4f6e-2a35-4d7e-9f10-8a6b5c4d3e2f",
    "7c2d5a7f-3b46-4e8f-a021-9b7c6d5e4f30",
];
const ID: [&str; 2] = [
    "3f1e0d9c8b7a69584736251403f2e1d0c9b8a7968574635241302f1e0d9c8b7a",
    "a7b8c9d0e1f203142536475869708192a3b4c5d6e7f8091a2b3c4d5e6f708192",
];

/// The address that the agent serves on.
fn address(node: &Node) -> Option<String> {
    let log = node.log();
    let line = log.lines().find(|l| l.contains("HTTP is served"))?;
    Some(line.split_once("address=")?.1.trim().to_owned())
}

/// Code and body.
pub fn get(node: &Node, path: &str) -> (u16, String) {
    let mut stream = std::net::TcpStream::connect(address(node).unwrap()).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// The page, once it has been seen to be one: each family is told once, before its series, and they stand together.
async fn page(node: &Node) -> String {
    // A page is good for a second.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let (code, page) = tokio::task::block_in_place(|| get(node, "/metrics"));
    assert_eq!(code, 200);
    let (mut told, mut current) = (BTreeSet::new(), String::new());
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            current = rest.split(' ').next().unwrap().to_owned();
            assert!(told.insert(current.clone()), "{current} is told twice");
        } else if !line.starts_with("# TYPE ") {
            let (name, value) = (
                line.split(['{', ' ']).next().unwrap(),
                line.rsplit(' ').next().unwrap(),
            );
            assert_eq!(name, current, "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    let series = page.lines().filter(|l| !l.starts_with('#'));
    let names: Vec<&str> = series.map(|l| l.rsplit_once(' ').unwrap().0).collect();
    assert_eq!(
        names.iter().collect::<BTreeSet<_>>().len(),
        names.len(),
        "each series once"
    );
    page
}

/// The value of the one series of a family with all of these in its labels.
fn value(page: &str, family: &str, labels: &[&str]) -> Option<f64> {
    let mut lines = page
        .lines()
        .filter(|l| l.starts_with(&format!("{family}{{")) && labels.iter().all(|w| l.contains(w)));
    let line = lines.next()?;
    assert!(lines.next().is_none(), "{family} {labels:?} is several");
    line.rsplit(' ').next()?.parse().ok()
}

fn process(pid: u32, used_mib: u64, utilization: u32) -> Process {
    Process {
        pid,
        used_mib,
        instance: None,
        utilization,
    }
}

/// Puts a process into a cgroup.
fn in_cgroup(node: &Node, pid: u32, path: &str) {
    let dir = node.driver.proc().join(pid.to_string());
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("cgroup"), format!("0::{path}\n")).unwrap();
}

fn pods(topology: &Topology) -> Vec<Pod> {
    let pod = |n: usize, name| Pod {
        name,
        uid: UID[n],
        container: ID[n],
        devices: vec![topology.gpus[n].uuid.clone()],
    };
    vec![pod(0, "one"), pod(1, "two")]
}

/// Two GPUs with a pod each and their processes, one on cgroupfs' path and one on systemd's; a process of the host's on a
/// third.
fn busy() -> Topology {
    let mut topology = Topology::named("h100x8").unwrap();
    topology.gpus[0].utilization = (97, 40);
    topology.gpus[0].power_mw = (650_500, 700_000);
    topology.gpus[0].ecc = Some((3, 1));
    topology.gpus[0].link_kib = Some((2048, 1));
    topology.gpus[0].processes = vec![process(1001, 1000, 90), process(1004, 10, 1)];
    topology.gpus[1].processes = vec![process(1002, 2000, 0)];
    topology.gpus[2].processes = vec![process(1003, 3000, 0)];
    topology
}

fn place(node: &Node) {
    in_cgroup(
        node,
        1001,
        &format!("/kubepods/burstable/pod{}/{}", UID[0], ID[0]),
    );
    in_cgroup(
        node,
        1004,
        &format!("/kubepods/burstable/pod{}/{}/inner", UID[0], ID[0]),
    );
    let under = UID[1].replace('-', "_");
    in_cgroup(
        node,
        1002,
        &format!(
            "/kubepods.slice/kubepods-pod{under}.slice/cri-containerd-{}.scope",
            ID[1]
        ),
    );
    in_cgroup(node, 1003, "/system.slice/x.service");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_metrics_tell_whose_a_gpu_is_and_nothing_of_pods_that_are_gone() {
    if !root() {
        return;
    }
    let topology = busy();
    let (node, _kubelet, _) = ready(&topology, QUICK, 8).await;
    place(&node);
    let page_without = page(&node).await;
    assert!(!page_without.contains("pod="), "kubelet has told nothing yet");
    let who = Who::serve(&node.pod_resources(), &node.pods(), true);
    who.set(pods(&topology));
    let text = page(&node).await;
    let one = [
        topology.gpus[0].uuid.as_str(),
        "namespace=\"jobs\"",
        "pod=\"one\"",
        "container=\"main\"",
    ];
    for (family, more, expected) in [
        ("slipway_gpu_utilization_ratio", "part=\"cores\"", 0.97),
        ("slipway_gpu_utilization_ratio", "part=\"memory\"", 0.4),
        ("slipway_gpu_memory_used_bytes", "", 1010.0 * 1048576.0),
        ("slipway_gpu_memory_total_bytes", "", 81559.0 * 1048576.0),
        ("slipway_gpu_power_watts", "", 650.5),
        ("slipway_gpu_power_limit_watts", "", 700.0),
        ("slipway_gpu_temperature_celsius", "", 38.0),
        ("slipway_gpu_clock_hertz", "part=\"cores\"", 1.98e9),
        ("slipway_gpu_ecc_errors_total", "kind=\"corrected\"", 3.0),
        ("slipway_gpu_ecc_errors_total", "kind=\"uncorrected\"", 1.0),
        ("slipway_gpu_nvlinks_up", "", 18.0),
        (
            "slipway_gpu_nvlink_bytes_total",
            "direction=\"sent\"",
            2048.0 * 1024.0,
        ),
        ("slipway_gpu_row_remap_failed", "", 0.0),
        ("slipway_gpu_healthy", "", 1.0),
        ("slipway_gpu_allocated", "resource=\"nvidia.com/gpu\"", 1.0),
        (
            "slipway_gpu_process_memory_bytes",
            "pid=\"1001\"",
            1000.0 * 1048576.0,
        ),
        (
            "slipway_gpu_process_memory_bytes",
            "pid=\"1004\"",
            10.0 * 1048576.0,
        ),
        ("slipway_gpu_process_utilization_ratio", "pid=\"1001\"", 0.9),
    ] {
        let labels: Vec<&str> = one.iter().copied().chain([more]).collect();
        let got = value(&text, family, &labels);
        assert!(
            got.is_some_and(|v| (v - expected).abs() < 1e-6),
            "{family} {more}: {got:?}\n{text}"
        );
    }
    let got = value(
        &text,
        "slipway_gpu_process_memory_bytes",
        &["pid=\"1002\"", "pod=\"two\"", "container=\"main\""],
    );
    assert_eq!(got, Some(2000.0 * 1048576.0));
    let host = text.lines().find(|l| l.contains("pid=\"1003\"")).unwrap();
    assert!(!host.contains("pod="), "{host}");

    // A pod ends, with its process.
    who.set(pods(&topology).split_off(1));
    let mut after = topology.clone();
    after.gpus[0].processes.clear();
    node.driver.set_topology(&after).unwrap();
    place(&node);
    let text = page(&node).await;
    assert!(!text.contains("pod=\"one\"") && !text.contains("1001"), "{text}");
    assert!(text.contains("pod=\"two\""));
    assert_eq!(
        value(
            &text,
            "slipway_gpu_temperature_celsius",
            &[&topology.gpus[0].uuid]
        ),
        Some(38.0)
    );
    // A GPU that hangs costs its own figures only.
    node.driver
        .override_with(&["nvmlDeviceGetMemoryInfo_v2 hang 2"])
        .unwrap();
    let text = page(&node).await;
    assert_eq!(
        value(
            &text,
            "slipway_gpu_temperature_celsius",
            &[&topology.gpus[2].uuid]
        ),
        None
    );
    assert_eq!(
        value(
            &text,
            "slipway_gpu_temperature_celsius",
            &[&topology.gpus[7].uuid]
        ),
        Some(topology.gpus[7].temperature.into())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_shared_and_sliced_gpus_are_told_by_their_holders() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("a100x4-mig").unwrap();
    let slice = topology.gpus[0].mig.as_ref().unwrap().devices[1].clone();
    topology.gpus[0].processes = vec![Process {
        instance: Some((slice.gi, slice.ci)),
        ..process(1001, 500, 0)
    }];
    let more = "[resources]\nmig_strategy = \"mixed\"\n";
    let mut node = Node::of(&topology, more);
    let kubelet = Kubelet::start(&node.kubelet());
    let who = Who::serve(&node.pod_resources(), &node.pods(), false);
    let mut all = pods(&topology);
    all[0].devices = vec![slice.uuid.clone()];
    all[1].devices = vec![format!("{}::0", topology.gpus[2].uuid)];
    let third = Pod {
        name: "three",
        devices: vec![format!("{}::1", topology.gpus[2].uuid)],
        ..all[1].clone()
    };
    all.push(third);
    who.set(all);
    node.start();
    node.wait("four resources", || kubelet.resources().len() == 4)
        .await;
    place(&node);
    let text = page(&node).await;
    let used = value(
        &text,
        "slipway_gpu_memory_used_bytes",
        &[&slice.uuid, "mig=\"2g.10gb\"", "pod=\"one\""],
    );
    assert_eq!(used, Some(500.0 * 1048576.0));
    // Without UIDs: the only one that has the device.
    let process = value(
        &text,
        "slipway_gpu_process_memory_bytes",
        &["pid=\"1001\"", &slice.uuid, "pod=\"one\""],
    );
    assert_eq!(process, used);
    let shared = topology.gpus[2].uuid.as_str();
    for pod in ["pod=\"two\"", "pod=\"three\""] {
        assert_eq!(value(&text, "slipway_gpu_allocated", &[shared, pod]), Some(1.0));
    }
    let line = text
        .lines()
        .find(|l| l.starts_with("slipway_gpu_power_watts") && l.contains(shared));
    assert!(!line.unwrap().contains("pod="), "two have it: {line:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_health_and_readiness_are_told() {
    if !root() {
        return;
    }
    let mut node = Node::new("h200", "");
    let away = node.dir.path().join("away");
    std::fs::rename(node.driver.root(), &away).unwrap();
    node.start();
    node.wait("the server", || address(&node).is_some()).await;
    node.wait("the driver to be waited for", || {
        get(&node, "/readyz").1.contains("libnvidia-ml.so.1")
    })
    .await;
    assert_eq!(
        (get(&node, "/healthz").0, get(&node, "/readyz").0),
        (200, 200),
        "a node without a driver has no GPUs that kubelet could lack"
    );
    std::fs::rename(&away, node.driver.root()).unwrap();
    node.wait("kubelet to be waited for", || {
        get(&node, "/readyz")
            .1
            .contains("kubelet does not have nvidia.com/gpu")
    })
    .await;
    assert_eq!(get(&node, "/readyz").0, 503);
    let kubelet = Kubelet::start(&node.kubelet());
    node.wait("a list", || kubelet.ids(GPU, true).len() == 1).await;
    node.wait("to be ready", || get(&node, "/readyz").0 == 200).await;
    assert_eq!(get(&node, "/nothing").0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_clients_that_say_nothing_keep_nobody_out() {
    if !root() {
        return;
    }
    let mut node = Node::new("h200", "");
    node.start();
    node.wait("the server", || address(&node).is_some()).await;
    let address = address(&node).unwrap();
    let idle: Vec<_> = (0..64)
        .map(|_| std::net::TcpStream::connect(&address).unwrap())
        .collect();
    let began = std::time::Instant::now();
    assert_eq!(get(&node, "/healthz").0, 200);
    // Each of them may be silent for five seconds.
    assert!(began.elapsed() < std::time::Duration::from_secs(4));
    drop(idle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_an_xid_is_told_with_its_process_and_pod() {
    if !root() {
        return;
    }
    let topology = busy();
    let mut node = Node::of(&topology, QUICK);
    let kubelet = Kubelet::start(&node.kubelet());
    let kernel = node.kernel_log();
    let who = Who::serve(&node.pod_resources(), &node.pods(), true);
    who.set(pods(&topology));
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    place(&node);
    let line = |words: &[&str]| {
        let log = node.log();
        log.lines().any(|l| words.iter().all(|w| l.contains(w)))
    };
    let say = |gpu: usize, rest: &str| {
        let pci = topology.gpus[gpu].pci.trim_end_matches(".0");
        let mut kernel = &kernel;
        kernel
            .write_all(format!("4,1,2,-;NVRM: Xid (PCI:{pci}): {rest}\n").as_bytes())
            .unwrap();
    };
    // An application's error, of a process that is there.
    say(0, "31, pid=1001, name=python3, Ch 8");
    node.driver.raise("0 31").unwrap();
    let told = [
        "XID of a container's process",
        "xid=31",
        "pid=1001",
        "process=\"python3\"",
        "namespace=\"jobs\"",
        "pod=\"one\"",
        "container=\"main\"",
        UID[0],
    ];
    node.wait("whose it was", || line(&told)).await;

    // One that condemns: the process is not known, and who has the GPU is told.
    say(
        1,
        "79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    );
    node.driver.raise("1 79").unwrap();
    node.wait("who is hit", || {
        line(&[
            "XID of a GPU that a container has",
            "xid=79",
            "pod=\"two\"",
            "condemned=\"",
        ])
    })
    .await;

    // A process that is gone when it is looked for, but was seen.
    let text = page(&node).await;
    assert_eq!(
        value(
            &text,
            "slipway_gpu_xid_errors_total",
            &[&topology.gpus[0].uuid, "xid=\"31\""]
        ),
        Some(1.0)
    );
    assert_eq!(
        value(
            &text,
            "slipway_gpu_healthy",
            &[&topology.gpus[1].uuid, "xid=\"79\""]
        ),
        Some(0.0)
    );
    std::fs::remove_dir_all(node.driver.proc().join("1004")).unwrap();
    node.driver.raise("0 43").unwrap();
    say(0, "43, pid=1004, name=worker, Ch 8");
    node.wait("whose it was", || {
        line(&["XID of a container's process", "pid=1004", "pod=\"one\""])
    })
    .await;

    // A process of the host's.
    say(2, "13, pid=1003, name=x, Graphics Exception");
    node.driver.raise("2 13").unwrap();
    node.wait("that it is no pod's", || {
        line(&["XID of a process in no pod", "pid=1003"])
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_gpu_that_no_container_could_be_given_counts_as_kept_back() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let mut node = Node::of(&topology, QUICK);
    let kubelet = Kubelet::start(&node.kubelet());
    std::fs::remove_file(node.driver.dev().join("nvidia3")).unwrap();
    node.start();
    node.wait("a list of seven", || kubelet.ids(GPU, true).len() == 7)
        .await;
    let text = page(&node).await;
    let healthy = |n: usize| value(&text, "slipway_gpu_healthy", &[&topology.gpus[n].uuid]);
    assert_eq!((healthy(3), healthy(4)), (Some(0.0), Some(1.0)));
}
