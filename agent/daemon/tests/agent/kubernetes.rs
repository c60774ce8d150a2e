//! What Kubernetes is told: labels, the node's condition, Events; and what an API server that is gone costs: nothing.

use std::io::Write;
use std::time::Duration;

use slipway_fake_gpu::Topology;

use crate::api::{Api, NODE};
use crate::kubelet::{GPU, Kubelet};
use crate::node::{Node, root};
use crate::who::{Pod, Who};

const UID: &str = "0b1c4f6e-2a35-4d7e-9f10-8a6b5c4d3e2f";
const ID: &str = "3f1e0d9c8b7a69584736251403f2e1d0c9b8a7968574635241302f1e0d9c8b7a";

/// A node that tells the API server of this port.
pub fn telling(topology: &Topology, port: u16, more: &str) -> Node {
    let node = Node::of(topology, "");
    let file = node.dir.path().join("kubeconfig");
    Api::kubeconfig(&file, port);
    let config = std::fs::read_to_string(node.config()).unwrap();
    let api = file.display().to_string();
    let config = format!("{config}[kubernetes]\napi = {api:?}\nnode = \"{NODE}\"\n{more}");
    std::fs::write(node.config(), config).unwrap();
    node
}

fn pod(topology: &Topology, gpu: usize) -> Pod {
    Pod {
        name: "train-0",
        uid: UID,
        container: ID,
        devices: vec![topology.gpus[gpu].uuid.clone()],
    }
}

#[tokio::test]
async fn root_the_node_is_labelled_and_its_condition_and_events_tell_of_sick_gpus() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let api = Api::serve(0).await;
    let mut node = telling(&topology, api.port, "[health]\nprobe_seconds = 1\n");
    let kubelet = Kubelet::start(&node.kubelet());
    let kernel = node.kernel_log();
    let who = Who::serve(&node.pod_resources(), &node.pods(), true);
    who.set(vec![pod(&topology, 3)]);
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    node.wait("the labels", || api.label("nvidia.com/gpu.count").is_some())
        .await;
    for (name, value) in [
        ("nvidia.com/gpu.product", Some("NVIDIA-H100-80GB-HBM3")),
        ("nvidia.com/gpu.count", Some("8")),
        ("nvidia.com/gpu.memory", Some("81559")),
        ("nvidia.com/gpu.compute.major", Some("9")),
        ("nvidia.com/gpu.nvlink", Some("18")),
        ("nvidia.com/cuda.driver-version.full", Some("580.95.05")),
        ("nvidia.com/cuda.runtime-version.full", Some("13.0")),
        ("nvidia.com/mig.capable", Some("true")),
        ("nvidia.com/mig-9g.count", None),
        ("nvidia.com/gpu.machine", Some("stays")),
        ("mine", Some("stays")),
    ] {
        assert_eq!(api.label(name).as_deref(), value, "{name}");
    }
    node.wait("the condition", || {
        api.condition("status").as_deref() == Some("False")
    })
    .await;
    assert!(api.events(NODE).is_empty());
    let well_since = api.condition("lastTransitionTime").unwrap();

    // An application's error, and one that condemns, of the same pod's GPU.
    let dir = node.driver.proc().join("1001");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("cgroup"), format!("0::/kubepods/pod{UID}/{ID}\n")).unwrap();
    let pci = topology.gpus[3].pci.trim_end_matches(".0");
    let say = |text: &str| {
        let mut kernel = &kernel;
        kernel
            .write_all(format!("4,1,2,-;NVRM: Xid (PCI:{pci}): {text}\n").as_bytes())
            .unwrap();
    };
    say("31, pid=1001, name=python3, Ch 8");
    node.driver.raise("3 31").unwrap();
    node.wait("the pod's Event", || api.events("train-0").len() == 1)
        .await;
    let (reason, message) = api.events("train-0").remove(0);
    assert!(
        reason == "GpuXid" && message.contains("XID 31") && message.contains("python3"),
        "{message}"
    );
    let event = api.event("train-0");
    assert_eq!(event["involvedObject"]["uid"], UID);
    assert_eq!(event["involvedObject"]["fieldPath"], "spec.containers{main}");
    assert_eq!(event["type"], "Warning");

    say("79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.");
    node.driver.raise("3 79").unwrap();
    node.wait("the pod's second Event", || {
        api.events("train-0")
            .iter()
            .any(|(r, m)| r == "GpuUnhealthy" && m.contains("XID 79"))
    })
    .await;
    node.wait("the node's Event", || {
        api.events(NODE)
            .iter()
            .any(|(r, m)| r == "GpuUnhealthy" && m.contains(&topology.gpus[3].uuid))
    })
    .await;
    node.wait("the condition", || {
        api.condition("status").as_deref() == Some("True")
    })
    .await;
    assert!(api.condition("message").unwrap().contains("GPU 3 ("));
    node.driver.raise("3 reset").unwrap();
    node.wait("the condition", || {
        api.condition("status").as_deref() == Some("False")
    })
    .await;
    node.wait("the node's second Event", || {
        api.events(NODE).iter().any(|(r, _)| r == "GpuHealthy")
    })
    .await;
    assert!(api.condition("lastTransitionTime").unwrap() >= well_since);

    // An illness without an XID: the pod that has the GPU is told too, once.
    node.driver.raise("3 set remap_failed 1").unwrap();
    let told = || {
        let all = api.events("train-0");
        all.iter()
            .filter(|(_, m)| m.contains("could not be remapped"))
            .count()
    };
    node.wait("the pod's third Event", || told() == 1).await;
    node.driver.raise("3 set remap_failed 0").unwrap();
    node.wait("the node's Event of its end", || {
        let all = api.events(NODE);
        all.iter().filter(|(r, _)| r == "GpuHealthy").count() == 2
    })
    .await;
    // What is on disk is what the next agent goes on with.
    let record = node.dir.path().join("state/health.json");
    node.wait("the record of its end", || {
        std::fs::read_to_string(&record).is_ok_and(|t| !t.contains("remapped"))
    })
    .await;
    assert_eq!(told(), 1);

    // Another agent goes on with what was said, and says nothing twice.
    let (told, since) = (api.events(NODE).len(), api.condition("lastTransitionTime"));
    node.kill();
    let before = api.requests();
    node.start();
    node.wait("it to tell", || api.requests() >= before + 2).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(
        (api.events(NODE).len(), api.condition("lastTransitionTime")),
        (told, since)
    );
}

#[tokio::test]
async fn root_pods_are_told_of_sick_and_lost_gpus_though_kubelet_does_not_answer_at_once() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("h100x8").unwrap();
    let api = Api::serve(0).await;
    let mut node = telling(&topology, api.port, "[health]\nprobe_seconds = 1\n");
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    let devices = [3, 7].map(|n: usize| topology.gpus[n].uuid.clone());
    node.driver.raise("3 set remap_failed 1").unwrap();
    topology.gpus.pop();
    node.driver.set_topology(&topology).unwrap();
    node.wait("one sick and one gone", || {
        (kubelet.ids(GPU, true).len(), kubelet.ids(GPU, false).len()) == (6, 1)
    })
    .await;
    let who = Who::serve(&node.pod_resources(), &node.pods(), true);
    let mut holder = pod(&topology, 3);
    holder.devices = devices.to_vec();
    who.set(vec![holder]);
    let told = |reason: &str, said: &str| {
        let all = api.events("train-0");
        all.iter().any(|(r, m)| r == reason && m.contains(said))
    };
    node.wait("its Events", || {
        told("GpuUnhealthy", &devices[0]) && told("GpuGone", "not in the machine any more")
    })
    .await;
}

#[tokio::test]
async fn root_an_api_server_that_is_gone_holds_up_nothing_and_hears_all_of_it_later() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let port = Api::serve(0).await.port;
    let mut node = telling(&topology, port, "");
    let kubelet = Kubelet::start(&node.kubelet());
    let who = Who::serve(&node.pod_resources(), &node.pods(), false);
    who.set(vec![pod(&topology, 5)]);
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    node.wait("word of it", || node.log().contains("Kubernetes is not told"))
        .await;
    node.driver.raise("5 79").unwrap();
    let took = node
        .wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    node.wait("whose it is", || {
        node.log().contains("XID of a GPU that a container has")
    })
    .await;

    let api = Api::serve(port).await;
    api.refuse(Some(503));
    node.wait("a try", || api.requests() > 0).await;
    api.refuse(None);
    node.wait("the labels", || api.label("nvidia.com/gpu.count").is_some())
        .await;
    node.wait("the condition", || {
        api.condition("status").as_deref() == Some("True")
    })
    .await;
    // Kubelet tells no UIDs here: the API server does.
    node.wait("the pod's Event", || !api.events("train-0").is_empty())
        .await;
    assert_eq!(api.event("train-0")["involvedObject"]["uid"], "uid-of-train-0");
    node.wait("the node's Event", || !api.events(NODE).is_empty())
        .await;
    assert!(node.runs());
    // Once a failure, not once a try.
    assert!(
        node.log().matches("Kubernetes is not told").count() <= 3,
        "{}",
        node.log()
    );
}

#[tokio::test]
async fn root_an_api_server_that_takes_no_labels_takes_the_condition_and_one_without_either_takes_events() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let api = Api::serve(0).await;
    api.deny(Some((NODE, 403)));
    let mut node = telling(&topology, api.port, "");
    let kubelet = Kubelet::start(&node.kubelet());
    let who = Who::serve(&node.pod_resources(), &node.pods(), true);
    who.set(vec![pod(&topology, 3), pod(&topology, 4)]);
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    node.wait("the condition", || {
        api.condition("status").as_deref() == Some("False")
    })
    .await;
    assert!(api.label("nvidia.com/gpu.count").is_none());
    let told = |gpu: usize| {
        let is = |(reason, message): &(String, String)| {
            reason == "GpuUnhealthy" && message.contains(&topology.gpus[gpu].uuid)
        };
        [NODE, "train-0"].map(|of| api.events(of).iter().any(is))
    };
    for (gpu, path) in [(3, NODE), (4, "/status")] {
        api.deny(Some((path, 403)));
        node.driver.raise(&format!("{gpu} 79")).unwrap();
        node.wait("the Events", || told(gpu) == [true, true]).await;
    }
    // Each refusal is told once, and both are heard when they are allowed.
    let tellings = || node.log().matches("are not taken; trying again").count();
    node.wait("word of it", || tellings() == 2).await;
    api.deny(None);
    node.wait("the labels", || api.label("nvidia.com/gpu.count").is_some())
        .await;
    node.wait("the condition", || {
        let message = api.condition("message").unwrap();
        message.contains("GPU 3 (") && message.contains("GPU 4 (")
    })
    .await;
    node.wait("word of its end", || node.log().contains("are taken again"))
        .await;
    assert_eq!(tellings(), 2);
}

#[tokio::test]
async fn root_labels_go_into_a_feature_file_and_follow_the_geometry() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("a100x4-mig").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("features.d/slipway");
    let more = format!(
        "[kubernetes]\nlabels = \"nfd\"\nnfd_file = {:?}\n[resources]\nmig_strategy = \"mixed\"\n[health]\nprobe_seconds = 1\n",
        file.display().to_string()
    );
    let mut node = Node::of(&topology, &more);
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("four resources", || kubelet.resources().len() == 4)
        .await;
    let has = |line: &str| std::fs::read_to_string(&file).is_ok_and(|t| t.lines().any(|l| l == line));
    node.wait("the file", || has("nvidia.com/mig-1g.5gb.count=6"))
        .await;
    assert!(has("nvidia.com/gpu.product=NVIDIA-A100-SXM4-40GB") && has("nvidia.com/mig.strategy=mixed"));
    topology.gpus[0]
        .mig
        .as_mut()
        .unwrap()
        .devices
        .retain(|d| d.profile != "1g.5gb");
    node.driver.set_topology(&topology).unwrap();
    node.wait("the file to follow", || has("nvidia.com/mig-1g.5gb.count=4"))
        .await;
    let left: Vec<_> = std::fs::read_dir(file.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing is left beside it");
}
