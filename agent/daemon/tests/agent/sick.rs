//! GPUs that fall sick, and a driver that hangs.

use std::time::{Duration, Instant};

use slipway_fake_gpu::Topology;

use crate::kubelet::Kubelet;
use crate::node::{Node, root};

const GPU: &str = "nvidia.com/gpu";

#[tokio::test]
async fn root_an_xid_79_is_kubelets_within_milliseconds_and_an_xid_31_condemns_nothing() {
    if !root() {
        return;
    }
    // A driver that does not tell what is to be done.
    let mut topology = Topology::named("h100x8").unwrap();
    topology.gpus.iter_mut().for_each(|g| g.recovery_action = None);
    let mut node = Node::of(&topology, "");
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    node.wait("all watched", || node.log().contains("registered"))
        .await;
    node.driver.raise("3 31").unwrap();
    node.wait("word of the XID", || node.log().contains("xid=31"))
        .await;
    assert_eq!(kubelet.ids(GPU, true).len(), 8);

    let lists = kubelet.known(GPU).unwrap().lists;
    let raised = Instant::now();
    node.driver.raise("3 79").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    let took = kubelet.known(GPU).unwrap().at - raised;
    eprintln!("XID to kubelet's stream: {took:?}");
    // A few milliseconds where the machine is not busy with other tests.
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(kubelet.known(GPU).unwrap().lists, lists + 1);
    assert_eq!(kubelet.ids(GPU, false), [topology.gpus[3].uuid.clone()]);
    // Its loss is its own: the others are still heard.
    node.driver.raise("4 48").unwrap();
    node.wait("two unhealthy", || kubelet.ids(GPU, false).len() == 2)
        .await;
}

#[tokio::test]
async fn root_the_drivers_word_decides_and_a_reset_gpu_is_well_again() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("h100x8").unwrap();
    let mut node = Node::of(&topology, "[health]\nprobe_seconds = 1\n");
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    node.driver.raise("1 79").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    // It does not answer, and stays in the list for that.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(kubelet.known(GPU).unwrap().devices.len(), 8);
    assert_eq!(kubelet.ids(GPU, false), [topology.gpus[1].uuid.clone()]);
    node.driver.raise("1 reset").unwrap();
    node.wait("all healthy", || kubelet.ids(GPU, true).len() == 8)
        .await;

    // The driver asks for a reset without an XID that would condemn.
    topology.gpus[6].recovery_action = Some(1);
    node.driver.set_topology(&topology).unwrap();
    node.driver.raise("6 31").unwrap();
    node.wait("one unhealthy", || {
        kubelet.ids(GPU, false) == [topology.gpus[6].uuid.clone()]
    })
    .await;
    topology.gpus[6].recovery_action = Some(0);
    node.driver.set_topology(&topology).unwrap();
    node.wait("all healthy", || kubelet.ids(GPU, true).len() == 8)
        .await;
    // After a reset it is watched again.
    node.driver.raise("1 79").unwrap();
    node.wait("one unhealthy", || {
        kubelet.ids(GPU, false) == [topology.gpus[1].uuid.clone()]
    })
    .await;
}

#[tokio::test]
async fn root_an_xid_on_a_mig_gpu_condemns_all_its_slices_and_no_others() {
    if !root() {
        return;
    }
    let mut node = Node::new("a100x4-mig", "[resources]\nmig_strategy = \"mixed\"\n");
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("four resources", || kubelet.resources().len() == 4)
        .await;
    node.driver.raise("0 79 3 0").unwrap();
    let sick = |profile: &str| kubelet.ids(&format!("nvidia.com/mig-{profile}"), false).len();
    node.wait("four sick slices", || {
        sick("1g.5gb") + sick("2g.10gb") + sick("3g.20gb") == 4
    })
    .await;
    assert_eq!((sick("1g.5gb"), sick("2g.10gb"), sick("3g.20gb")), (2, 1, 1));
    assert_eq!(kubelet.ids(GPU, true).len(), 2);
}

#[tokio::test]
async fn root_a_driver_that_hangs_is_asked_by_another_process_and_no_device_is_lost() {
    if !root() {
        return;
    }
    let mut node = Node::new("h100x8", "[health]\nprobe_seconds = 1\n");
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    node.driver
        .override_with(&["nvmlDeviceGetMemoryInfo_v2 hang 2"])
        .unwrap();
    node.wait("a replacement", || node.log().contains("its process is replaced"))
        .await;
    assert!(node.runs());
    assert_eq!(kubelet.ids(GPU, true).len(), 8, "what was known stays");
    node.driver.override_with(&[]).unwrap();
    // The new process hears of XIDs again.
    node.wait("an XID to be heard", {
        let mut raised = false;
        let (driver, kubelet, node) = (&node.driver, &kubelet, &node);
        move || {
            let back = node.log().matches("its process is replaced").count() >= 1;
            if back && !raised {
                driver.raise("7 79").unwrap();
                raised = true;
            }
            kubelet.ids(GPU, false).len() == 1
        }
    })
    .await;
    assert!(node.runs());
}
