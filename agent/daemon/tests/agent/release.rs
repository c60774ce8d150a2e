//! Letting go of NVML, for whoever divides a GPU or unloads the driver.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use slipway_fake_gpu::Topology;

use crate::kubelet::{GPU, ready, ready_with};
use crate::metrics::get;
use crate::node::{Node, root};

/// A look a second.
const QUICK: &str = "[health]\nprobe_seconds = 1\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_released_driver_is_not_in_use_and_the_gpus_stay_as_they_are() {
    if !root() {
        return;
    }
    let (mut node, kubelet) = ready_with("h100x8", QUICK, 8).await;
    node.driver.raise("2 79").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    assert!(node.driver.in_use().unwrap());
    assert!(node.ok(&["gpu", "status"]).contains("in use"));

    let said = node.ok(&["gpu", "release"]);
    assert!(said.contains("released for 3600 s"), "{said}");
    assert!(!node.driver.in_use().unwrap(), "it returns when it is so");
    // Nobody asks, whatever comes: three looks, a page of metrics, an XID; the driver's nodes go with it.
    let lists = kubelet.known(GPU).unwrap().lists;
    node.driver.log_calls().unwrap();
    std::fs::remove_dir_all(node.driver.dev()).unwrap();
    node.driver.raise("4 79").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(3300)).await;
    let page = get(&node, "/metrics").1;
    assert!(page.contains("slipway_gpu_driver_released 1"), "{page}");
    assert!(!page.contains("slipway_gpu_temperature_celsius{"), "{page}");
    assert!(page.contains("slipway_gpu_healthy{"), "{page}");
    assert!(node.driver.calls().is_empty(), "{:?}", node.driver.calls());
    assert_eq!(kubelet.known(GPU).unwrap().lists, lists, "kubelet hears nothing");
    assert_eq!(kubelet.ids(GPU, true).len(), 7);
    assert_eq!((get(&node, "/healthz").0, get(&node, "/readyz").0), (200, 200));
    assert!(node.ok(&["gpu", "status"]).contains("released"));

    // Another driver is loaded, with a GPU that was divided; what was not heard is seen.
    let mut topology = Topology::named("h100x8").unwrap();
    topology.gpus[6].recovery_action = Some(1);
    node.driver.set_topology(&topology).unwrap();
    node.driver.raise("reload").unwrap();
    node.ok(&["gpu", "resume"]);
    node.wait("what happened meanwhile", || kubelet.ids(GPU, false).len() == 3)
        .await;
    assert!(node.driver.in_use().unwrap());
    let sick = [2, 4, 6].map(|n| topology.gpus[n].uuid.clone());
    assert_eq!(kubelet.ids(GPU, false), sick);
    // And what happens is heard again.
    node.driver.raise("7 79").unwrap();
    node.wait("an XID to be heard", || kubelet.ids(GPU, false).len() == 4)
        .await;
    assert!(node.runs());
}

#[tokio::test]
async fn root_a_release_that_is_forgotten_ends_by_itself() {
    if !root() {
        return;
    }
    let (node, _kubelet) = ready_with("h200", "", 1).await;
    node.ok(&["gpu", "release", "--for", "5"]);
    assert!(!node.driver.in_use().unwrap());
    node.wait("its end", || node.driver.in_use().unwrap()).await;
    assert!(node.log().contains("not taken up again in time"));
    let out = node.run(&["gpu", "release", "--for", "0"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("from 1 to"), "{said}");
}

#[tokio::test]
async fn root_an_agent_that_is_started_meanwhile_leaves_the_driver_alone() {
    if !root() {
        return;
    }
    let (mut node, kubelet) = ready_with("h200", "", 1).await;
    node.ok(&["gpu", "release", "--for", "600"]);
    node.kill();
    node.driver.log_calls().unwrap();
    node.start();
    node.wait("word of it", || node.log().matches("it is released").count() == 1)
        .await;
    assert!(node.driver.calls().is_empty(), "{:?}", node.driver.calls());
    assert!(node.ok(&["gpu", "status"]).contains("released"));
    node.ok(&["gpu", "resume"]);
    node.wait("the GPU", || kubelet.ids(GPU, true).len() == 1).await;
    // What was taken up again stays so; what is over, too.
    for record in [None, Some("{\"boot_id\":\"another\",\"until\":9999999999}")] {
        node.kill();
        if let Some(record) = record {
            std::fs::write(node.dir.path().join("state/released.json"), record).unwrap();
        }
        node.start();
        node.wait("it in use", || {
            let out = node.run(&["gpu", "status"]);
            String::from_utf8_lossy(&out.stdout).contains("in use")
        })
        .await;
    }
}

#[tokio::test]
async fn root_a_divided_gpu_is_handed_out_after_a_release() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("a100x4-mig").unwrap();
    topology.gpus.truncate(1);
    let mig = topology.gpus[0].mig.as_mut().unwrap();
    let devices = std::mem::take(&mut mig.devices);
    mig.enabled = false;
    // Looks are rare: resuming is what has it looked at.
    let more = "[resources]\nmig_strategy = \"mixed\"\n[health]\nprobe_seconds = 3600\n";
    let (node, kubelet, _) = ready(&topology, more, 1).await;
    node.ok(&["gpu", "release"]);
    let mig = topology.gpus[0].mig.as_mut().unwrap();
    (mig.enabled, mig.devices) = (true, devices);
    node.driver.set_topology(&topology).unwrap();
    node.ok(&["gpu", "resume"]);
    node.wait("the slices", || {
        kubelet.ids("nvidia.com/mig-1g.5gb", true).len() == 2
            && kubelet.known(GPU).is_some_and(|k| k.devices.is_empty())
    })
    .await;
}

#[tokio::test]
async fn root_the_control_socket_is_roots_and_takes_any_words() {
    if !root() {
        return;
    }
    let mut node = Node::new("h200", "");
    let out = node.run(&["gpu", "release"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("is it running"), "{said}");

    // A driver that is not there is not in use.
    let away = node.dir.path().join("away");
    std::fs::rename(node.driver.root(), &away).unwrap();
    node.start();
    let socket = node.dir.path().join("state/control.sock");
    node.wait("the socket", || socket.exists()).await;
    assert!(node.ok(&["gpu", "release"]).contains("no driver yet"));
    std::fs::rename(&away, node.driver.root()).unwrap();
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for line in [
        "",
        "release\n",
        "release now\n",
        "release -1\n",
        &"x".repeat(4096),
    ] {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        let _ = stream.write_all(line.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        assert!(said.is_empty() || said.starts_with("error "), "{line:?}: {said}");
    }
    // The socket of an agent that was killed is no obstacle to the next.
    node.kill();
    node.start();
    node.wait("an answer", || node.run(&["gpu", "status"]).status.success())
        .await;
}
