//! What kubelet sees of the agent.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use slipway_fake_gpu::Topology;
use slipway_kubelet_api::v1beta1::{
    AllocateRequest, ContainerAllocateRequest, ContainerPreferredAllocationRequest, PreStartContainerRequest,
    PreferredAllocationRequest,
};

use crate::kubelet::{GPU, Kubelet, ready, ready_with};
use crate::node::{Node, root, skipped};

fn allocate(ids: &[String]) -> AllocateRequest {
    AllocateRequest {
        container_requests: vec![ContainerAllocateRequest {
            devices_ids: ids.to_vec(),
        }],
    }
}

#[tokio::test]
async fn root_gpus_are_listed_preferred_and_allocated_by_cdi_names() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let (node, kubelet, took) = ready(&topology, "", 8).await;
    eprintln!("start to the first list: {took:?}");
    let known = kubelet.known(GPU).unwrap();
    let numa: Vec<i64> = known
        .devices
        .iter()
        .map(|d| d.topology.as_ref().unwrap().nodes[0].id)
        .collect();
    assert_eq!(numa, [0, 0, 0, 0, 1, 1, 1, 1]);
    assert!(known.devices.iter().all(|d| d.id.len() <= 63));

    let mut plugin = kubelet.plugin(GPU).await;
    let ids: Vec<String> = known.devices.iter().map(|d| d.id.clone()).collect();
    let request = PreferredAllocationRequest {
        container_requests: vec![ContainerPreferredAllocationRequest {
            available_device_i_ds: ids[2..].to_vec(),
            must_include_device_i_ds: vec![],
            allocation_size: 4,
        }],
    };
    let answer = plugin
        .get_preferred_allocation(request)
        .await
        .unwrap()
        .into_inner();
    let mut chosen = answer.container_responses[0].device_i_ds.clone();
    chosen.sort();
    let mut second = ids[4..].to_vec();
    second.sort();
    assert_eq!(chosen, second, "four on one NUMA node");

    let answer = plugin.allocate(allocate(&ids[..2])).await.unwrap().into_inner();
    let container = &answer.container_responses[0];
    let names: Vec<String> = container.cdi_devices.iter().map(|d| d.name.clone()).collect();
    assert_eq!(names, [format!("{GPU}={}", ids[0]), format!("{GPU}={}", ids[1])]);
    assert!(container.devices.is_empty() && container.mounts.is_empty() && container.envs.is_empty());
    // What kubelet hands on can be resolved from the file that was written before.
    let cache = slipway_cdi::Cache::new(vec![node.cdi()]);
    assert!(cache.resolve(&names, &slipway_cdi::host::lookup).is_ok());

    let began = std::time::Instant::now();
    for _ in 0..200 {
        plugin.allocate(allocate(&ids[..1])).await.unwrap();
    }
    eprintln!("Allocate: {:?} each", began.elapsed() / 200);
    let error = plugin
        .allocate(allocate(&["GPU-gone".to_owned()]))
        .await
        .unwrap_err();
    assert!(error.message().contains("GPU-gone"), "{error}");
}

#[tokio::test]
async fn root_runtimes_without_cdi_get_nodes_mounts_and_variables() {
    if !root() {
        return;
    }
    let (_node, kubelet) = ready_with("workstation", "[resources]\nallocate = \"nodes\"\n", 2).await;
    // A NUMA node that is not known is left out: kubelet refuses pods for any number in its place.
    let devices = kubelet.known(GPU).unwrap().devices;
    assert!(devices.iter().all(|d| d.topology.is_none()), "{devices:?}");
    let ids = kubelet.ids(GPU, true);
    let answer = kubelet
        .plugin(GPU)
        .await
        .allocate(allocate(&ids[..1]))
        .await
        .unwrap()
        .into_inner();
    let container = &answer.container_responses[0];
    assert!(container.cdi_devices.is_empty(), "devices are given once");
    let nodes: Vec<&str> = container
        .devices
        .iter()
        .map(|d| d.container_path.as_str())
        .collect();
    assert!(
        nodes.contains(&"/dev/nvidia1") && nodes.contains(&"/dev/nvidiactl"),
        "{nodes:?}"
    );
    assert!(!nodes.contains(&"/dev/nvidia0"));
    assert!(
        container
            .mounts
            .iter()
            .any(|m| m.container_path.ends_with("/libcuda.so.1") && m.read_only)
    );
    assert_eq!(container.envs["NVIDIA_VISIBLE_DEVICES"], "void");
}

#[tokio::test]
async fn root_mig_devices_are_resources_of_their_own_and_follow_the_geometry() {
    if !root() {
        return;
    }
    let mut node = Node::new(
        "a100x4-mig",
        "[resources]\nmig_strategy = \"mixed\"\n[health]\nprobe_seconds = 1\n",
    );
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("four resources", || kubelet.resources().len() == 4)
        .await;
    let count = |profile: &str| kubelet.ids(&format!("nvidia.com/mig-{profile}"), true).len();
    assert_eq!((count("1g.5gb"), count("2g.10gb"), count("3g.20gb")), (6, 1, 2));
    assert_eq!(kubelet.ids(GPU, true).len(), 2);

    let mut topology = Topology::named("a100x4-mig").unwrap();
    topology.gpus[0]
        .mig
        .as_mut()
        .unwrap()
        .devices
        .retain(|d| d.profile != "2g.10gb");
    node.driver.set_topology(&topology).unwrap();
    node.wait("the end of the only 2g.10gb", || {
        kubelet
            .known("nvidia.com/mig-2g.10gb")
            .is_some_and(|k| k.devices.is_empty())
    })
    .await;
    assert_eq!(count("3g.20gb"), 2);
    let listed = node.ok(&["cdi", "list", "--spec-dir", &node.cdi().display().to_string()]);
    assert!(
        !listed.contains("nvidia.com/gpu=0:1\n") && listed.contains("nvidia.com/gpu=0:0\n"),
        "{listed}"
    );
}

#[tokio::test]
async fn root_mig_devices_of_one_profile_are_handed_out_as_gpus() {
    if !root() {
        return;
    }
    let mut topology = Topology::named("a100x4-mig").unwrap();
    topology.gpus.truncate(2);
    for gpu in &mut topology.gpus {
        gpu.mig
            .as_mut()
            .unwrap()
            .devices
            .retain(|d| d.profile == "1g.5gb");
    }
    let (_node, kubelet, _) = ready(&topology, "[resources]\nmig_strategy = \"single\"\n", 6).await;
    let ids = kubelet.ids(GPU, true);
    assert!(ids.iter().all(|id| id.starts_with("MIG-")), "{ids:?}");
    assert_eq!(kubelet.resources(), [GPU]);
    let mut plugin = kubelet.plugin(GPU).await;
    let answer = plugin.allocate(allocate(&ids[..2])).await.unwrap().into_inner();
    let names = &answer.container_responses[0].cdi_devices;
    assert_eq!(names[1].name, format!("{GPU}={}", ids[1]));
}

#[tokio::test]
async fn root_shared_gpus_are_listed_as_replicas_and_one_is_enough_for_a_container() {
    if !root() {
        return;
    }
    let (_node, kubelet) = ready_with("h200", "[resources]\nreplicas = 4\n", 4).await;
    let ids = kubelet.ids(GPU, true);
    let mut plugin = kubelet.plugin(GPU).await;
    let answer = plugin.allocate(allocate(&ids[3..])).await.unwrap().into_inner();
    let uuid = ids[3].split("::").next().unwrap();
    assert_eq!(
        answer.container_responses[0].cdi_devices[0].name,
        format!("{GPU}={uuid}")
    );
    let error = plugin.allocate(allocate(&ids[..2])).await.unwrap_err();
    assert!(error.message().contains("one nvidia.com/gpu only"), "{error}");
    assert!(ids.iter().all(|id| id.len() <= 63));
}

#[tokio::test]
async fn root_a_restarted_kubelet_has_everything_again_with_health_and_a_new_socket() {
    if !root() {
        return;
    }
    let (mut node, kubelet) = ready_with("h100x8", "", 8).await;
    node.driver.raise("5 79").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    let (sick, first) = (kubelet.ids(GPU, false), kubelet.known(GPU).unwrap().endpoint);
    drop(kubelet);

    let kubelet = Kubelet::start(&node.kubelet());
    let took = node
        .wait("a list for the new kubelet", || kubelet.ids(GPU, true).len() == 7)
        .await;
    eprintln!("kubelet's start to the list: {took:?}");
    assert!(took.as_millis() < 2000, "{took:?}");
    assert_eq!(kubelet.ids(GPU, false), sick);
    let second = kubelet.known(GPU).unwrap().endpoint;
    assert_ne!(first, second);

    // The socket is deleted under a live kubelet: a new one, then the old one goes.
    std::fs::remove_file(node.kubelet().join(&second)).unwrap();
    node.wait("another registration", || {
        kubelet.known(GPU).is_some_and(|k| k.endpoint != second)
    })
    .await;
    assert_eq!(kubelet.ids(GPU, true).len(), 7);
    assert!(!kubelet.known(GPU).unwrap().ended);
    // Then the agent is killed: kubelet sees the end of the list.
    node.kill();
    node.wait("the end of the list", || kubelet.known(GPU).unwrap().ended)
        .await;
    // And it comes back, with what it knew.
    node.start();
    node.wait("the restarted agent's list", || {
        kubelet.known(GPU).is_some_and(|k| !k.ended) && kubelet.ids(GPU, true).len() == 7
    })
    .await;
    assert_eq!(kubelet.ids(GPU, false), sick);
    // What the killed one left is gone, and what is not the agent's is let alone.
    let others = node.kubelet().join("other.sock");
    drop(std::os::unix::net::UnixListener::bind(&others).unwrap());
    let sockets = || {
        let all = std::fs::read_dir(node.kubelet()).unwrap().flatten();
        let name = |e: std::fs::DirEntry| e.file_name().into_string().unwrap();
        all.map(name)
            .filter(|n| n.starts_with("slipway-"))
            .collect::<Vec<_>>()
    };
    node.wait("one socket", || {
        sockets() == [kubelet.known(GPU).unwrap().endpoint]
    })
    .await;
    assert!(others.exists());
}

#[tokio::test]
async fn root_a_container_is_not_started_again_on_a_sick_device() {
    if !root() {
        return;
    }
    let (node, kubelet) = ready_with("h100x8", "", 8).await;
    let id = kubelet.known(GPU).unwrap().devices[2].id.clone();
    let mut plugin = kubelet.plugin(GPU).await;
    let start = || PreStartContainerRequest {
        devices_ids: vec![id.clone()],
    };
    plugin.pre_start_container(start()).await.unwrap();
    node.driver.raise("2 79").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    let error = plugin.pre_start_container(start()).await.unwrap_err();
    assert!(error.message().contains("XID 79"), "{error}");
}

#[tokio::test]
async fn root_without_a_driver_or_kubelet_the_agent_waits_and_is_there_when_they_come() {
    if !root() {
        return;
    }
    let mut node = Node::new("h200", "");
    let away = node.dir.path().join("away");
    std::fs::rename(node.driver.root(), &away).unwrap();
    node.start();
    node.wait("word of it", || node.log().contains("waiting for the driver"))
        .await;
    assert!(node.runs());
    std::fs::rename(&away, node.driver.root()).unwrap();
    node.wait("the CDI file", || node.cdi().join("slipway-gpu.json").exists())
        .await;
    node.wait("word of it", || node.log().contains("waiting for kubelet"))
        .await;
    let kubelet = Kubelet::start(&node.kubelet());
    node.wait("a list of one", || kubelet.ids(GPU, true).len() == 1)
        .await;
}

#[tokio::test]
async fn root_another_file_with_the_same_devices_is_told() {
    if !root() {
        return;
    }
    let mut node = Node::new("h200", "");
    std::fs::create_dir_all(node.cdi()).unwrap();
    let other = r#"{"cdiVersion":"0.5.0","kind":"nvidia.com/gpu","devices":[{"name":"0","containerEdits":{"env":["A=b"]}}]}"#;
    std::fs::write(node.cdi().join("nvidia.json"), other).unwrap();
    node.start();
    node.wait("word of it", || {
        node.log().contains("is defined by several files")
    })
    .await;
    assert!(node.log().contains("nvidia.json") && node.runs());
}

#[tokio::test]
async fn root_a_list_that_kubelet_hears_no_longer_is_registered_anew() {
    if !root() {
        return;
    }
    let (node, kubelet) = ready_with("h100x8", "", 8).await;
    let first = kubelet.known(GPU).unwrap().endpoint;
    kubelet.hang_up(GPU);
    node.wait("another registration", || {
        kubelet.known(GPU).is_some_and(|k| k.endpoint != first)
    })
    .await;
    assert_eq!(kubelet.ids(GPU, true).len(), 8);
    node.wait("the end of the old socket", || {
        !node.kubelet().join(&first).exists()
    })
    .await;

    // Another folder in the place of the one that is watched.
    drop(kubelet);
    std::fs::rename(node.kubelet(), node.dir.path().join("before")).unwrap();
    std::fs::create_dir(node.kubelet()).unwrap();
    let kubelet = Kubelet::start(&node.kubelet());
    node.wait("a registration there", || kubelet.ids(GPU, true).len() == 8)
        .await;
}

#[tokio::test]
async fn root_an_agent_that_can_watch_nothing_registers_once_and_still_notices_a_new_kubelet() {
    // In a user namespace of its own there may be none.
    let none = "echo 0 > /proc/sys/user/max_inotify_instances";
    let unshare = ["--user", "--map-root-user", "sh", "-c"];
    let mut allowed = Command::new("unshare");
    let allowed = allowed.args(unshare).arg(none).output();
    if !root() || skipped(!allowed.is_ok_and(|o| o.status.success()), "a user namespace") {
        return;
    }
    let mut node = Node::new("h100x8", "");
    let agent = node.program.display().to_string();
    node.program = node.dir.path().join("slipway-agent");
    let text = format!(
        "#!/bin/sh\nexec unshare --user --map-root-user sh -c '{none} && exec {agent} \"$@\"' sh \"$@\"\n"
    );
    std::fs::write(&node.program, text).unwrap();
    std::fs::set_permissions(&node.program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let kubelet = Kubelet::start(&node.kubelet());
    node.start();
    node.wait("a list of eight", || kubelet.ids(GPU, true).len() == 8)
        .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(kubelet.registrations(), 1);
    assert_eq!(node.log().matches("cannot be watched").count(), 1);
    // Its socket is deleted, which only a look tells of.
    let first = kubelet.known(GPU).unwrap().endpoint;
    std::fs::remove_file(node.kubelet().join(&first)).unwrap();
    node.wait("another registration", || {
        kubelet.known(GPU).is_some_and(|k| k.endpoint != first)
    })
    .await;
    assert_eq!(kubelet.registrations(), 2);
    drop(kubelet);
    let kubelet = Kubelet::start(&node.kubelet());
    node.wait("a list for the new kubelet", || kubelet.ids(GPU, true).len() == 8)
        .await;
    assert_eq!(kubelet.registrations(), 1);
}
