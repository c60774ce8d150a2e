//! The CDI file over time, and what is handed out while a device is not in it.

use std::time::Duration;

use slipway_fake_gpu::Topology;

use crate::kubelet::{GPU, Kubelet, ready, ready_with};
use crate::node::{Node, root};

/// A look a second.
const QUICK: &str = "[health]\nprobe_seconds = 1\n";

fn listed(node: &Node) -> String {
    node.ok(&["cdi", "list", "--spec-dir", &node.cdi().display().to_string()])
}

#[tokio::test]
async fn root_a_device_without_a_node_costs_only_itself_and_comes_when_the_node_does() {
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
    let uuid = &topology.gpus[3].uuid;
    assert_eq!(kubelet.ids(GPU, false), std::slice::from_ref(uuid));
    assert!(node.log().contains("nvidia3") && !listed(&node).contains(uuid));
    node.driver.set_topology(&topology).unwrap();
    node.wait("all eight", || kubelet.ids(GPU, true).len() == 8).await;
    assert!(listed(&node).contains(uuid));
}

#[tokio::test]
async fn root_what_no_container_could_be_given_is_handed_out_when_it_can() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let mut node = Node::of(&topology, QUICK);
    let kubelet = Kubelet::start(&node.kubelet());
    let file = node.cdi().join("slipway-gpu.json");
    // A file where the folder should be.
    std::fs::write(node.cdi(), "").unwrap();
    node.start();
    node.wait("a list of none", || kubelet.ids(GPU, false).len() == 8)
        .await;
    assert!(node.log().contains("cannot be written"));
    std::fs::remove_file(node.cdi()).unwrap();
    node.wait("all eight", || kubelet.ids(GPU, true).len() == 8).await;
    assert!(file.exists());
    // What every device needs goes, and comes back.
    std::fs::remove_file(node.driver.dev().join("nvidiactl")).unwrap();
    node.wait("none again", || kubelet.ids(GPU, false).len() == 8)
        .await;
    assert!(!file.exists());
    node.driver.set_topology(&topology).unwrap();
    node.wait("all eight", || kubelet.ids(GPU, true).len() == 8).await;
    // Somebody takes the file away.
    std::fs::remove_file(&file).unwrap();
    node.wait("the file", || file.exists()).await;
    // Another has the same devices.
    let other = format!(
        r#"{{"cdiVersion":"0.5.0","kind":"nvidia.com/gpu","devices":[{{"name":"{}","containerEdits":{{"env":["A=b"]}}}}]}}"#,
        topology.gpus[6].uuid
    );
    std::fs::write(node.cdi().join("nvidia.json"), other).unwrap();
    node.wait("one less", || {
        kubelet.ids(GPU, false) == [topology.gpus[6].uuid.clone()]
    })
    .await;
}

#[tokio::test]
async fn root_the_file_is_of_the_driver_that_runs_and_follows_it() {
    if !root() {
        return;
    }
    let (node, kubelet) = ready_with("h200", QUICK, 1).await;
    let file = node.cdi().join("slipway-gpu.json");
    // Another driver is installed, and the old one still runs.
    node.driver.install("590.10").unwrap();
    node.wait("none", || kubelet.ids(GPU, false).len() == 1).await;
    assert!(node.log().contains("of the running driver, 580.95.05"));
    assert!(!file.exists());
    // It is loaded.
    let mut topology = Topology::named("h200").unwrap();
    topology.driver_version = "590.10".into();
    node.driver.set_topology(&topology).unwrap();
    node.driver.raise("reload").unwrap();
    node.wait("the GPU", || kubelet.ids(GPU, true).len() == 1).await;
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(
        text.contains("libcuda.so.590.10") && !text.contains("580"),
        "{text}"
    );
    drop((node, kubelet));

    // Left over libraries of another version, which come first by name, do not count.
    let topology = Topology::named("h200").unwrap();
    let (node, _kubelet, _) = ready(&topology, "", 1).await;
    let libraries = node.driver.root().join(slipway_fake_gpu::driver::LIBRARIES);
    std::fs::write(libraries.join("libcuda.so.470.1.2"), "").unwrap();
    let text = node.ok(&["cdi", "generate"]);
    assert!(
        text.contains("libcuda.so.580.95.05") && !text.contains("470"),
        "{text}"
    );
}

#[tokio::test]
async fn root_an_agent_whose_file_is_replaced_goes_on_and_its_hooks_keep_their_program() {
    if !root() {
        return;
    }
    let replace = |node: &Node| {
        let other = node.dir.path().join("slipway-agent.part");
        std::fs::copy("/bin/false", &other).unwrap();
        std::fs::rename(&other, &node.program).unwrap();
    };
    let installed = || {
        let mut node = Node::new("h200", QUICK);
        let program = node.dir.path().join("slipway-agent");
        if std::fs::hard_link(&node.program, &program).is_err() {
            std::fs::copy(&node.program, &program).unwrap();
        }
        node.program = program;
        node
    };
    let mut node = installed();
    let kubelet = Kubelet::start(&node.kubelet());
    let file = node.cdi().join("slipway-gpu.json");
    node.start();
    node.wait("a list of one", || kubelet.ids(GPU, true).len() == 1)
        .await;
    let before = std::fs::read_to_string(&file).unwrap();
    assert!(before.contains(&format!("{:?}", node.program.display().to_string())));
    replace(&node);
    // A look makes the file anew, and another process talks to the driver.
    std::fs::remove_file(&file).unwrap();
    node.wait("the file", || file.exists()).await;
    assert_eq!(std::fs::read_to_string(&file).unwrap(), before);
    node.driver.log_calls().unwrap();
    node.driver.raise("reload").unwrap();
    node.wait("another process", || {
        node.driver.calls().iter().any(|c| c == "nvmlInit_v2")
    })
    .await;
    node.driver.raise("0 79").unwrap();
    node.wait("an XID to be heard", || kubelet.ids(GPU, false).len() == 1)
        .await;

    // One that waits for its driver meanwhile is there when that comes.
    let mut node = installed();
    let kubelet = Kubelet::start(&node.kubelet());
    let away = node.dir.path().join("away");
    std::fs::rename(node.driver.root(), &away).unwrap();
    node.start();
    node.wait("word of it", || node.log().contains("waiting for the driver"))
        .await;
    replace(&node);
    std::fs::rename(&away, node.driver.root()).unwrap();
    node.wait("a list of one", || kubelet.ids(GPU, true).len() == 1)
        .await;
    let text = std::fs::read_to_string(node.cdi().join("slipway-gpu.json")).unwrap();
    assert!(!text.contains("deleted"), "{text}");
}

/// Holds up whoever reads the file, until [`let_go`].
fn hold(file: &std::path::Path) {
    let new = file.with_extension("fifo");
    let (mode, fifo) = (rustix::fs::Mode::RWXU, rustix::fs::FileType::Fifo);
    rustix::fs::mknodat(rustix::fs::CWD, &new, fifo, mode, 0).unwrap();
    std::fs::rename(new, file).unwrap();
}

fn let_go(file: &std::path::Path) {
    drop(std::fs::OpenOptions::new().write(true).open(file).unwrap());
}

#[tokio::test]
async fn root_the_first_list_is_of_everything_and_of_nothing_that_the_file_has_not() {
    if !root() {
        return;
    }
    let mut node = Node::new("h100x8", "");
    let kubelet = Kubelet::start(&node.kubelet());
    let file = node.cdi().join("slipway-gpu.json");
    std::fs::create_dir(node.cdi()).unwrap();
    hold(&file);
    // One after the other is found to have links that it had not.
    let slow = ["nvmlDeviceRegisterEvents sleep 100"];
    node.driver.override_with(&slow).unwrap();
    node.start();
    node.wait("the look", || node.log().contains("the node's GPUs"))
        .await;
    node.driver.raise("3 79").unwrap();
    node.wait("word of it", || node.log().contains("xid=79")).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(kubelet.resources().is_empty(), "{:?}", kubelet.known(GPU));
    let_go(&file);
    node.wait("a list", || !kubelet.resources().is_empty()).await;
    let first = kubelet.first(GPU);
    let sick = first.iter().filter(|d| d.health == "Unhealthy").count();
    assert_eq!((first.len(), sick), (8, 1));
    node.kill();

    // What is found later is not told of either before it is in the file.
    let mut topology = Topology::named("a100x4-mig").unwrap();
    let all = topology.clone();
    let slices = &mut topology.gpus[0].mig.as_mut().unwrap().devices;
    slices.retain(|d| d.profile != "2g.10gb");
    let more = "[resources]\nmig_strategy = \"mixed\"\n[health]\nprobe_seconds = 3\n";
    let mut node = Node::of(&topology, more);
    let kubelet = Kubelet::start(&node.kubelet());
    let file = node.cdi().join("slipway-gpu.json");
    node.start();
    node.wait("three resources", || kubelet.resources().len() == 3)
        .await;
    // Between two looks.
    std::fs::remove_file(&file).unwrap();
    node.wait("the end of a look", || file.exists()).await;
    hold(&file);
    node.driver.set_topology(&all).unwrap();
    let looks = || node.log().matches("the node's GPUs").count();
    node.wait("the look", || looks() == 2).await;
    node.driver.raise("3 79").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(kubelet.resources().len(), 3);
    let_go(&file);
    node.wait("four resources", || kubelet.resources().len() == 4)
        .await;
    assert_eq!(kubelet.first("nvidia.com/mig-2g.10gb").len(), 1);
}
