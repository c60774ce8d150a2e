//! What is done about those who have a sick GPU, where it does not go as it should: refused, unanswered, told late, about another.

use crate::api::Evicts;
use crate::faults::{IDS, NAMES, UIDS, pod, world, world_of};
use crate::kubelet::GPU;
use crate::node::root;
use crate::who::{Pod, Serves};
use slipway_kubelet_api::v1beta1::PreStartContainerRequest;

#[tokio::test]
async fn root_a_kill_that_did_not_happen_is_tried_again_until_it_has() {
    if !root() {
        return;
    }
    // It ends by its container alone: nobody else would end it.
    let w = world("Never", "", true).await;
    w.says().broken = 3;
    w.api.allocatable(GPU, 7);
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("it to be ended", || {
            w.asked() == ["announce a", "kill a", "kill a", "kill a", "kill a"]
        })
        .await;
    w.done().await;
    assert!(w.api.taken().is_empty());
}

#[tokio::test]
async fn root_a_deletion_that_did_not_happen_is_tried_again_and_two_budgets_are_a_budget() {
    if !root() {
        return;
    }
    let w = world("OnFailure", "evict_seconds = 1\n", true).await;
    w.api.allocatable(GPU, 7);
    w.api.evicts(Evicts::TwoBudgets);
    w.api.keep(Some(500));
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("a deletion that is refused", || {
            w.node.log().contains("DELETE") && w.node.log().contains("500")
        })
        .await;
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
    assert!(!w.has_event("train-0", "GpuFaultEvicted"));
    w.api.keep(None);
    w.node
        .wait("the pod to be deleted", || !w.api.taken().is_empty())
        .await;
    assert_eq!(w.api.taken(), [format!("delete train-0 {}", UIDS[0])]);
    w.done().await;
}

#[tokio::test]
async fn root_a_server_that_is_busy_is_no_budget() {
    if !root() {
        return;
    }
    let w = world("OnFailure", "evict_seconds = 1\n", true).await;
    w.api.allocatable(GPU, 7);
    w.api.evicts(Evicts::Busy);
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("word of it", || w.node.log().contains("too many requests"))
        .await;
    w.a_moment().await;
    w.a_moment().await;
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
    w.api.evicts(Evicts::Always);
    w.node
        .wait("the pod to be evicted", || !w.api.taken().is_empty())
        .await;
    assert_eq!(w.api.taken(), [format!("evict train-0 {}", UIDS[0])]);
}

#[tokio::test]
async fn root_without_uids_from_kubelet_the_pod_of_the_moment_is_ended_and_none_that_has_its_name_later() {
    if !root() {
        return;
    }
    let mut w = world_of("OnFailure", "wait_seconds = 600\n", true, Serves::Devices).await;
    w.node.driver.raise("3 79").unwrap();
    w.node.wait("it to be announced", || !w.asked().is_empty()).await;
    assert_eq!(w.asked(), ["announce a"]);
    assert_eq!(w.runtime.as_ref().unwrap().last().pod_uid, UIDS[0]);
    w.node.kill();
    w.api.pod(NAMES[0], UIDS[2], "OnFailure", IDS[2]);
    w.api.allocatable(GPU, 7);
    w.node.start();
    w.done().await;
    assert!(!w.asked().iter().any(|a| a.ends_with('c')), "{:?}", w.asked());
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());

    // Nor is one that came while the API server was away; the one that was there is.
    let w = world_of("OnFailure", "wait_seconds = 1\n", true, Serves::Devices).await;
    w.api.allocatable(GPU, 6);
    w.api.refuse(Some(503));
    w.node.driver.raise("3 79").unwrap();
    w.node.driver.raise("4 79").unwrap();
    w.node
        .wait("word of its id", || {
            w.node.log().contains("its id is not known yet")
        })
        .await;
    w.api.pod(NAMES[1], UIDS[2], "OnFailure", IDS[2]);
    w.api.change(NAMES[1], |p| {
        p["status"]["startTime"] = "2999-01-01T00:00:00Z".into()
    });
    w.api.refuse(None);
    w.node
        .wait("the container to be ended", || w.asked() == ["kill a"])
        .await;
    w.a_moment().await;
    assert_eq!(w.api.taken(), [format!("evict train-0 {}", UIDS[0])]);
    assert_eq!(w.asked(), ["kill a"]);
}

#[tokio::test]
async fn root_a_pod_whose_gpu_is_well_again_and_whose_container_has_ended_is_left_alone() {
    if !root() {
        return;
    }
    let mut w = world("OnFailure", "wait_seconds = 600\n", true).await;
    w.node.driver.raise("3 79").unwrap();
    w.node.wait("it to be announced", || !w.asked().is_empty()).await;
    w.a_moment().await;
    w.node.kill();
    w.says().gone = "a".into();
    w.node.start();
    w.node
        .wait("it to be asked about", || {
            w.asked() == ["announce a", "announce a"]
        })
        .await;
    w.node.driver.raise("3 reset").unwrap();
    w.node
        .wait("it to be well", || w.kubelet.ids(GPU, true).len() == 8)
        .await;
    // Nothing of it is kept.
    let book = w.node.dir.path().join("state/faults.json");
    let forgotten = || !std::fs::read_to_string(&book).unwrap().contains(UIDS[0]);
    w.node.wait("it to be forgotten", forgotten).await;
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
    assert_eq!(w.asked().len(), 2);
}

#[tokio::test]
async fn root_a_pod_from_a_file_of_the_node_is_ended_by_its_container() {
    if !root() {
        return;
    }
    let w = world("Always", "", true).await;
    w.api.change(NAMES[0], |pod| {
        pod["metadata"]["uid"] = UIDS[2].into();
        pod["metadata"]["annotations"]["kubernetes.io/config.mirror"] = UIDS[0].into();
    });
    w.api.allocatable(GPU, 7);
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("the container to be ended", || {
            w.asked() == ["announce a", "kill a"]
        })
        .await;
    w.done().await;
    assert_eq!(w.runtime.as_ref().unwrap().last().pod_uid, UIDS[0]);
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
}

#[tokio::test]
async fn root_a_pod_that_kubelet_was_placing_when_the_gpu_fell_sick_is_ended_too() {
    if !root() {
        return;
    }
    let w = world_of("OnFailure", "wait_seconds = 600\n", true, Serves::Everything).await;
    let gpu = &w.topology.gpus[3].uuid;
    w.api.pod(NAMES[2], UIDS[2], "OnFailure", IDS[2]);
    // Kubelet has given it the GPU, and tells of it later.
    let placed = vec![pod(1, &[gpu])];
    w.who.set_untold(placed.clone());
    w.node.driver.raise("3 79").unwrap();
    w.node.wait("it to be announced", || !w.asked().is_empty()).await;
    assert_eq!(w.asked(), ["announce b"]);
    w.who.set_untold([placed, vec![pod(2, &[gpu])]].concat());
    w.a_moment().await;
    w.api.allocatable(GPU, 7);
    w.node.wait("both to be ended", || w.api.taken().len() == 2).await;
    w.node
        .wait("both containers to be ended", || w.asked().len() == 4)
        .await;
    let mut asked = w.asked();
    asked.sort();
    assert_eq!(asked, ["announce b", "announce c", "kill b", "kill c"]);
}

#[tokio::test]
async fn root_a_pod_whose_container_had_succeeded_is_left_alone() {
    if !root() {
        return;
    }
    let w = world("OnFailure", "", true).await;
    w.says().gone = "a".into();
    w.api.change(NAMES[0], |pod| {
        pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = 0.into();
    });
    w.api.allocatable(GPU, 7);
    w.node.driver.raise("3 79").unwrap();
    w.done().await;
    assert_eq!(w.asked(), ["announce a"]);
    assert!(w.api.taken().is_empty(), "{:?}", w.api.taken());
}

#[tokio::test]
async fn root_an_agent_that_is_started_while_the_driver_hangs_goes_on() {
    if !root() {
        return;
    }
    let mut w = world("OnFailure", "wait_seconds = 5\n", true).await;
    w.api.evicts(Evicts::Blocked);
    w.node.driver.raise("3 79").unwrap();
    w.node
        .wait("its container to be ended", || {
            w.asked() == ["announce a", "kill a"]
        })
        .await;
    w.node.kill();
    w.node
        .driver
        .override_with(&["nvmlSystemGetDriverVersion hang"])
        .unwrap();
    w.api.evicts(Evicts::Always);
    w.node.start();
    w.node
        .wait("the pod to be evicted", || !w.api.taken().is_empty())
        .await;
    assert_eq!(w.api.taken(), [format!("evict train-0 {}", UIDS[0])]);
    w.done().await;
}

#[tokio::test]
async fn root_a_container_that_is_kept_from_a_gpu_that_is_to_be_drained_has_its_pod_evicted() {
    if !root() {
        return;
    }
    let mut w = world("OnFailure", "", true).await;
    let gpu = w.topology.gpus[4].uuid.clone();
    // Another shares it, and runs.
    w.who.set(vec![pod(1, &[&gpu]), pod(2, &[&gpu])]);
    w.api.pod(NAMES[2], UIDS[2], "OnFailure", IDS[2]);
    w.api.change(NAMES[2], |pod| {
        pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] =
            "2026-01-01T00:00:00Z".into();
    });
    w.topology.gpus[4].recovery_action = Some(4);
    w.node.driver.set_topology(&w.topology).unwrap();
    w.node.driver.raise("4 63").unwrap();
    w.node
        .wait("one unhealthy", || w.kubelet.ids(GPU, false).len() == 1)
        .await;
    w.api.allocatable(GPU, 7);
    w.a_moment().await;
    assert!(w.asked().is_empty() && w.api.taken().is_empty());
    w.says().gone = "b".into();
    let request = PreStartContainerRequest {
        devices_ids: vec![gpu.clone()],
    };
    let answer = w.kubelet.plugin(GPU).await.pre_start_container(request).await;
    assert!(answer.is_err());
    w.node
        .wait("its pod to be evicted", || !w.api.taken().is_empty())
        .await;
    w.done().await;
    assert_eq!(w.api.taken(), [format!("evict train-1 {}", UIDS[1])]);
    // Its work may be over after all.
    w.topology.gpus[4].recovery_action = None;
    w.node.driver.set_topology(&w.topology).unwrap();
    w.node.driver.raise("4 79").unwrap();
    w.node
        .wait("the other to be ended", || {
            w.asked().contains(&"kill c".to_owned())
        })
        .await;
    assert!(w.asked().contains(&"announce c".to_owned()), "{:?}", w.asked());
}

#[tokio::test]
async fn root_a_pod_of_another_runtime_beside_slipwayd_is_evicted_whatever_its_policy() {
    if !root() {
        return;
    }
    let elsewhere = "containerd://af1e0d9c8b7a69584736251403f2e1d0c9b8a7968574635241302f1e0d9c8b7a";
    // Whether kubelet tells whose it is, or the API server.
    for serves in [Serves::Pods, Serves::Devices] {
        let w = world_of("Never", "", true, serves).await;
        w.says().unknown = "a".into();
        w.who.set(vec![Pod {
            container: elsewhere,
            ..pod(0, &[&w.topology.gpus[3].uuid])
        }]);
        w.api.change(NAMES[0], |pod| {
            pod["status"]["containerStatuses"][0]["containerID"] = elsewhere.into();
            pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] =
                "2026-01-01T00:00:00Z".into();
        });
        w.api.allocatable(GPU, 7);
        w.node.driver.raise("3 79").unwrap();
        w.node
            .wait("the pod to be evicted", || !w.api.taken().is_empty())
            .await;
        assert_eq!(w.api.taken(), [format!("evict train-0 {}", UIDS[0])]);
        // It counts as done when the pod is gone, and not before.
        w.a_moment().await;
        assert!(!w.is_done());
        w.api.change(NAMES[0], |pod| *pod = ().into());
        w.done().await;
        assert!(w.asked().is_empty(), "{:?}", w.asked());
        assert_eq!(w.node.log().matches("another runtime has it").count(), 1);
    }
}

#[tokio::test]
async fn root_who_runs_on_a_gpu_that_is_to_be_drained_is_ended_when_it_dies_before_the_node_has_fallen() {
    if !root() {
        return;
    }
    let mut w = world("OnFailure", "wait_seconds = 600\n", true).await;
    let gpu = w.topology.gpus[4].uuid.clone();
    w.who.set(vec![pod(1, &[&gpu])]);
    w.api.change(NAMES[1], |pod| {
        pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] =
            "2026-01-01T00:00:00Z".into();
    });
    w.topology.gpus[4].recovery_action = Some(4);
    w.node.driver.set_topology(&w.topology).unwrap();
    w.node.driver.raise("4 63").unwrap();
    w.node
        .wait("one unhealthy", || w.kubelet.ids(GPU, false).len() == 1)
        .await;
    let request = PreStartContainerRequest {
        devices_ids: vec![gpu.clone()],
    };
    let answer = w.kubelet.plugin(GPU).await.pre_start_container(request).await;
    assert!(answer.is_err());
    let book = w.node.dir.path().join("state/faults.json");
    let has = |what: &str| std::fs::read_to_string(&book).is_ok_and(|t| t.contains(what));
    w.node.wait("who has it", || has(UIDS[1])).await;
    assert!(has("\"only_waiting\":true") && w.asked().is_empty());
    // While it is waited for the node, work on it is over.
    w.topology.gpus[4].recovery_action = None;
    w.node.driver.set_topology(&w.topology).unwrap();
    w.node.driver.raise("4 79").unwrap();
    w.node.wait("it to be announced", || !w.asked().is_empty()).await;
    assert!(w.api.taken().is_empty());
    w.api.allocatable(GPU, 7);
    w.node
        .wait("it to be ended", || w.asked() == ["announce b", "kill b"])
        .await;
    w.done().await;
    assert_eq!(w.api.taken(), [format!("evict train-1 {}", UIDS[1])]);
    assert_eq!(w.runtime.as_ref().unwrap().last().reason, "GpuXid79");
}

#[tokio::test]
async fn root_a_container_of_which_kubelet_tells_late_is_announced_and_ended_without_an_api_server() {
    if !root() {
        return;
    }
    let w = world("OnFailure", "wait_seconds = 1\n", true).await;
    w.api.refuse(Some(503));
    w.who.mute(true);
    w.node.driver.raise("3 79").unwrap();
    // It is looked for when the GPU falls sick, and when it has been waited for the node.
    let looks = || w.node.log().matches("those who have the GPU are ended").count();
    w.node.wait("both looks", || looks() == 2).await;
    assert!(w.asked().is_empty());
    w.who.mute(false);
    w.node
        .wait("it to be ended", || w.asked() == ["announce a", "kill a"])
        .await;
    assert!(w.api.taken().is_empty());
    w.api.refuse(None);
    w.node
        .wait("the pod to be evicted", || !w.api.taken().is_empty())
        .await;
    w.done().await;
}
