//! Whose a GPU is, from a kubelet that tells of its pods by itself: it is asked for what has changed, and nothing stays that is
//! gone.

use std::time::Duration;

use slipway_fake_gpu::Topology;

use crate::kubelet::ready;
use crate::metrics::get;
use crate::node::{Node, root};
use crate::who::{Pod, Serves, Who};

fn pod(topology: &Topology, n: usize) -> Pod {
    const NAMES: [(&str, &str); 3] = [
        ("one", "0b1c4f6e-2a35-4d7e-9f10-8a6b5c4d3e2f"),
        ("two", "7c2d5a7f-3b46-4e8f-a021-9b7c6d5e4f30"),
        ("three", "8d3e6b80-4c57-4f90-b132-ac8d7e6f5041"),
    ];
    let (name, uid) = NAMES[n];
    Pod {
        name,
        uid,
        container: "3f1e0d9c8b7a",
        devices: vec![topology.gpus[n].uuid.clone()],
    }
}

/// Who has which GPU, as a page of metrics says it that is made now.
async fn holders(node: &Node) -> Vec<(String, String)> {
    // A page is good for a second.
    tokio::time::sleep(Duration::from_millis(1050)).await;
    let page = tokio::task::block_in_place(|| get(node, "/metrics")).1;
    let value = |line: &str, label: &str| {
        let rest = line.split_once(&format!("{label}=\"")).unwrap().1;
        rest.split_once('"').unwrap().0.to_owned()
    };
    let lines = page.lines().filter(|l| l.starts_with("slipway_gpu_allocated{"));
    lines.map(|l| (value(l, "pod"), value(l, "uuid"))).collect()
}

fn expected(topology: &Topology, which: &[usize]) -> Vec<(String, String)> {
    let one = |n: &usize| (pod(topology, *n).name.to_owned(), topology.gpus[*n].uuid.clone());
    which.iter().map(one).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_kubelet_that_tells_of_its_pods_is_asked_for_changes_only() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let (node, _kubelet, _) = ready(&topology, "", 8).await;
    let all = |which: &[usize]| which.iter().map(|n| pod(&topology, *n)).collect::<Vec<_>>();
    let who = Who::serve_as(&node.pod_resources(), &node.pods(), Serves::Everything);
    who.set(all(&[0, 1]));
    node.wait("it to be watched", || who.asked("watch") == 1).await;
    assert_eq!(holders(&node).await, expected(&topology, &[0, 1]));
    let gets = who.asked("get");
    assert_eq!(gets, 2, "each pod once");
    // Nothing changes: nothing is asked, however often a page is.
    for _ in 0..3 {
        assert_eq!(holders(&node).await, expected(&topology, &[0, 1]));
    }
    // One goes, one comes.
    who.set(all(&[1, 2]));
    assert_eq!(holders(&node).await, expected(&topology, &[1, 2]));
    assert_eq!((who.asked("list"), who.asked("pods")), (0, 0));
    assert_eq!(who.asked("get"), gets + 2, "those that changed, as it says");
    who.set(all(&[]));
    assert_eq!(holders(&node).await, []);
    assert_eq!(who.asked("get"), gets + 2);

    // Another kubelet in its place, which does not tell: everything is asked for. And one that tells again.
    who.end();
    drop(who);
    let who = Who::serve_as(&node.pod_resources(), &node.pods(), Serves::Pods);
    who.set(all(&[0]));
    node.wait("it to be asked", || who.asked("watch") > 0).await;
    assert_eq!(holders(&node).await, expected(&topology, &[0]));
    assert!(who.asked("list") > 0 && who.asked("pods") > 0);
    who.end();
    drop(who);
    let who = Who::serve_as(&node.pod_resources(), &node.pods(), Serves::Everything);
    who.set(all(&[2]));
    node.wait("it to be watched", || who.asked("watch") == 1).await;
    assert_eq!(holders(&node).await, expected(&topology, &[2]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_kubelet_that_is_gone_has_no_pods() {
    if !root() {
        return;
    }
    let topology = Topology::named("h100x8").unwrap();
    let (node, _kubelet, _) = ready(&topology, "", 8).await;
    let who = Who::serve_as(&node.pod_resources(), &node.pods(), Serves::Everything);
    who.set((0..3).map(|n| pod(&topology, n)).collect());
    node.wait("it to be watched", || who.asked("watch") == 1).await;
    assert_eq!(holders(&node).await, expected(&topology, &[0, 1, 2]));
    who.end();
    std::fs::remove_file(node.pod_resources()).unwrap();
    std::fs::remove_file(node.pods()).unwrap();
    // What was known is not said any more: nobody knows whether it is so.
    let mut said = holders(&node).await;
    for _ in 0..5 {
        if said.is_empty() {
            break;
        }
        said = holders(&node).await;
    }
    assert_eq!(said, []);
}
