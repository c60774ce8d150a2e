//! GPUs that fall sick, and a driver that hangs.

use std::time::{Duration, Instant};

use slipway_fake_gpu::Topology;

use crate::kubelet::{GPU, Kubelet, ready, ready_with};
use crate::node::{Node, root};

/// A look a second.
const QUICK: &str = "[health]\nprobe_seconds = 1\n";

#[tokio::test]
async fn root_an_xid_79_is_kubelets_within_milliseconds_and_an_xid_31_condemns_nothing() {
    if !root() {
        return;
    }
    // A driver that does not tell what is to be done.
    let mut topology = Topology::named("h100x8").unwrap();
    topology.gpus.iter_mut().for_each(|g| g.recovery_action = None);
    let (node, kubelet, _) = ready(&topology, "", 8).await;
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
    let (node, kubelet, _) = ready(&topology, QUICK, 8).await;
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
async fn root_a_gpu_that_hangs_is_unhealthy_and_the_others_are_looked_at_and_heard() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("h100x8").unwrap();
    let (mut node, kubelet, _) = ready(&topology, QUICK, 8).await;
    let uuid = |n: usize| Topology::named("h100x8").unwrap().gpus[n].uuid.clone();
    node.driver
        .override_with(&["nvmlDeviceGetMemoryInfo_v2 hang 2"])
        .unwrap();
    node.wait("a replacement", || node.log().contains("its process is replaced"))
        .await;
    node.wait("the one that hangs to be unhealthy", || {
        kubelet.ids(GPU, false) == [uuid(2)]
    })
    .await;
    // What only a look tells of another is found, and what is only heard is heard, by the new process.
    topology.gpus[5].recovery_action = Some(1);
    node.driver.set_topology(&topology).unwrap();
    node.wait("the look at another", || {
        kubelet.ids(GPU, false) == [uuid(2), uuid(5)]
    })
    .await;
    node.driver.raise("7 79").unwrap();
    node.wait("an XID to be heard", || {
        kubelet.ids(GPU, false) == [uuid(2), uuid(5), uuid(7)]
    })
    .await;
    assert!(node.runs());
    assert_eq!(kubelet.known(GPU).unwrap().devices.len(), 8);
    // It answers again, and is asked again by and by.
    node.driver.override_with(&[]).unwrap();
    node.wait("it to be healthy", || !kubelet.ids(GPU, false).contains(&uuid(2)))
        .await;
}

#[tokio::test]
async fn root_a_gpu_that_answers_and_cannot_be_watched_is_never_well_in_between() {
    if !root() {
        return;
    }
    let mut node = Node::new("h100x8", QUICK);
    let kubelet = Kubelet::start(&node.kubelet());
    let uuid = Topology::named("h100x8").unwrap().gpus[2].uuid.clone();
    let hangs = ["nvmlDeviceRegisterEvents hang 2"];
    node.driver.override_with(&hangs).unwrap();
    node.start();
    node.wait("the others", || kubelet.ids(GPU, true).len() == 7)
        .await;
    // It is asked again, after a pause.
    let asked = || node.log().matches("its process is replaced").count();
    node.wait("another attempt", || asked() >= 2).await;
    assert_eq!(kubelet.ids(GPU, false), std::slice::from_ref(&uuid));
    let log = node.log();
    assert!(!log.contains("healthy again"), "{log}");
    assert_eq!(log.matches("it does not answer").count(), 1, "{log}");
    node.driver.override_with(&[]).unwrap();
    node.wait("it to be healthy", || kubelet.ids(GPU, true).contains(&uuid))
        .await;
}

#[tokio::test]
async fn root_an_xid_that_comes_in_the_middle_of_a_look_is_not_taken_back_by_it() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("h100x8").unwrap();
    let (node, kubelet, _) = ready(&topology, QUICK, 8).await;
    let slow = "nvmlDeviceGetMemoryInfo_v2";
    node.driver
        .override_with(&[&format!("{slow} sleep 1000 7")])
        .unwrap();
    node.driver.log_calls().unwrap();
    // The first one has answered that it is well.
    let last = format!("{slow} 7");
    node.wait("the look at the last", || node.driver.calls().contains(&last))
        .await;
    topology.gpus[0].recovery_action = Some(1);
    node.driver.set_topology(&topology).unwrap();
    node.driver.raise("0 48").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    let looks = || node.driver.calls().iter().filter(|c| **c == last).count();
    node.wait("two more looks", || looks() >= 3).await;
    assert!(!node.log().contains("healthy again"), "{}", node.log());
    topology.gpus[0].recovery_action = Some(0);
    node.driver.set_topology(&topology).unwrap();
    node.wait("all healthy", || kubelet.ids(GPU, true).len() == 8)
        .await;
}

#[tokio::test]
async fn root_gpus_that_take_long_to_wake_are_all_there_in_the_end() {
    if !root() {
        return;
    }
    // Each takes a fifth of the deadline and all of them longer than it.
    let mut node = Node::new("h100x8", "");
    let kubelet = Kubelet::start(&node.kubelet());
    node.driver
        .override_with(&["nvmlDeviceGetHandleByIndex_v2 sleep 300"])
        .unwrap();
    node.start();
    let took = node
        .wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    assert!(took > Duration::from_millis(8 * 300) && !node.log().contains("replaced"));
}

#[tokio::test]
async fn root_kubelet_hears_of_a_sick_gpu_though_the_disk_does_not_answer() {
    if !root() {
        return;
    }
    let (node, kubelet) = ready_with("h100x8", QUICK, 8).await;
    // Whoever opens this for writing waits until somebody reads.
    let pipe = node.dir.path().join("state/health.new");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    for (gpu, sick) in [("3 79", 1), ("4 79", 2)] {
        node.driver.raise(gpu).unwrap();
        node.wait("another unhealthy", || kubelet.ids(GPU, false).len() == sick)
            .await;
    }
    // And what is looked at from time to time goes on.
    node.driver
        .override_with(&["nvmlDeviceGetMemoryInfo_v2 15 6"])
        .unwrap();
    node.wait("a third", || kubelet.ids(GPU, false).len() == 3).await;
}

#[tokio::test]
async fn root_a_gpu_of_which_only_a_part_answers_is_unhealthy_and_does_not_flap() {
    if !root() {
        return;
    }
    let (node, kubelet) = ready_with("h100x8", QUICK, 8).await;
    node.driver.override_with(&["nvmlDeviceGetName 999 3"]).unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    let lists = kubelet.known(GPU).unwrap().lists;
    node.driver.log_calls().unwrap();
    let asked = |n| {
        let calls = node.driver.calls();
        calls.iter().filter(|c| *c == "nvmlDeviceGetName 3").count() >= n
    };
    node.wait("three more looks", || asked(3)).await;
    assert_eq!(kubelet.known(GPU).unwrap().lists, lists);
    node.driver.override_with(&[]).unwrap();
    node.wait("all healthy", || kubelet.ids(GPU, true).len() == 8)
        .await;
}

#[tokio::test]
async fn root_a_driver_that_was_loaded_anew_has_a_new_process() {
    if !root() {
        return;
    }
    let (node, kubelet) = ready_with("h100x8", QUICK, 8).await;
    let lists = kubelet.known(GPU).unwrap().lists;
    node.driver.log_calls().unwrap();
    node.driver.raise("reload").unwrap();
    let count = |call: &str| node.driver.calls().iter().filter(|c| *c == call).count();
    node.wait("another process", || count("nvmlInit_v2") == 1).await;
    node.wait("a look", || count("nvmlDeviceGetName 7") > 0).await;
    assert_eq!(kubelet.known(GPU).unwrap().lists, lists, "no GPU was sick");
    node.wait("all to be watched", || count("nvmlDeviceRegisterEvents 7") > 0)
        .await;
    node.driver.raise("7 79").unwrap();
    node.wait("an XID to be heard", || kubelet.ids(GPU, false).len() == 1)
        .await;
    // A GPU that was taken in again is there for a new process only.
    node.driver.raise("7 reattach").unwrap();
    node.wait("all healthy", || kubelet.ids(GPU, true).len() == 8)
        .await;
}

#[tokio::test]
async fn root_when_the_driver_is_gone_no_gpu_is_handed_out() {
    if !root() {
        return;
    }
    let (node, kubelet) = ready_with("h100x8", QUICK, 8).await;
    node.driver.override_with(&["* 999"]).unwrap();
    node.wait("none healthy", || kubelet.ids(GPU, false).len() == 8)
        .await;
    node.driver.override_with(&[]).unwrap();
    node.wait("all healthy", || kubelet.ids(GPU, true).len() == 8)
        .await;
}

#[tokio::test]
async fn root_a_gpu_that_could_be_watched_no_longer_is_watched_again_at_once() {
    if !root() {
        return;
    }
    // A look in ten seconds.
    let (node, kubelet) = ready_with("h200", "", 1).await;
    let slow = "nvmlDeviceGetMemoryInfo_v2 sleep 1000";
    node.driver.log_calls().unwrap();
    node.driver
        .override_with(&["nvmlEventSetWait_v2 999", slow])
        .unwrap();
    // Whoever waits waits again after this one.
    node.driver.raise("0 31").unwrap();
    node.wait("word of it", || {
        node.log().contains("the GPU's XIDs are heard no longer")
    })
    .await;
    node.driver.override_with(&[]).unwrap();
    let watched = || {
        let calls = node.driver.calls();
        calls.iter().any(|c| c == "nvmlDeviceRegisterEvents 0")
    };
    let took = node.wait("it to be watched", watched).await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(kubelet.ids(GPU, true).len(), 1);
    node.driver.raise("0 79").unwrap();
    node.wait("an XID to be heard", || kubelet.ids(GPU, false).len() == 1)
        .await;
}
