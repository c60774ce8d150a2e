//! Signs of illness that only a look finds, while the GPU answers.

use slipway_fake_gpu::Topology;

use crate::kubelet::{GPU, ready, ready_with};
use crate::metrics::get;
use crate::node::root;

/// A look a second, and a sign that was gone twice is gone.
const QUICK: &str = "[health]\nprobe_seconds = 1\nwell_after = 2\n";

/// Everything that can condemn does.
const STRICT: &str = "[health.signs]\necc_contained = \"condemn\"\nremap_pending = \"condemn\"\nretirement_pending = \"condemn\"\nlinks_down = \"condemn\"\n";

/// GPUs of a driver that does not say what is to be done about them.
fn silent_driver(name: &str) -> Topology {
    let mut topology = Topology::named(name).unwrap();
    topology.gpus.iter_mut().for_each(|g| g.recovery_action = None);
    topology
}

#[tokio::test]
async fn root_a_gpu_with_a_sign_of_illness_is_kept_back_until_it_is_gone() {
    if !root() {
        return;
    }
    let topology = silent_driver("h100x8");
    let (mut node, kubelet, _) = ready(&topology, &format!("{QUICK}{STRICT}"), 8).await;
    let uuid = |n: usize| topology.gpus[n].uuid.clone();
    let signs = [
        (
            "0 set ecc_volatile 2",
            "2 memory errors could not be corrected",
            "0 reset",
        ),
        ("1 set remap_pending 1", "to be remapped", "1 reset"),
        (
            "2 set remap_failed 1",
            "could not be remapped",
            "2 set remap_failed 0",
        ),
        (
            "3 set links_down 2",
            "2 of its 18 NVLinks are down",
            "3 set links_down 0",
        ),
        (
            "4 set temperature 93",
            "93 °C hot: from 92 on it shuts itself down",
            "4 set temperature 80",
        ),
    ];
    for (gpu, (set, said, _)) in signs.iter().enumerate() {
        node.driver.raise(set).unwrap();
        node.wait(set, || kubelet.ids(GPU, false).contains(&uuid(gpu)))
            .await;
        assert!(node.log().contains(said), "{said}:\n{}", node.log());
    }
    assert_eq!(kubelet.ids(GPU, true), [uuid(5), uuid(6), uuid(7)]);

    // The agent is killed: what it knew is known, before anything is looked at, and the links are missed still.
    node.kill();
    node.wait("the end of the list", || kubelet.known(GPU).unwrap().ended)
        .await;
    node.start();
    node.wait("a list again", || {
        !kubelet.known(GPU).unwrap().ended && kubelet.ids(GPU, true).len() == 3
    })
    .await;
    assert!(node.log().contains("still unhealthy"));

    for (gpu, (_, _, end)) in signs.iter().enumerate() {
        node.driver.raise(end).unwrap();
        let well = || kubelet.ids(GPU, true).contains(&uuid(gpu));
        node.wait(&format!("{end} to make it well"), well).await;
    }
    assert_eq!(kubelet.ids(GPU, true).len(), 8);
}

#[tokio::test]
async fn root_cards_that_retire_pages_are_looked_at_for_them() {
    if !root() {
        return;
    }
    let mut topology = silent_driver("h100x8");
    topology.gpus.truncate(2);
    topology.gpus.iter_mut().for_each(|g| g.rows = None);
    let (node, kubelet, _) = ready(&topology, &format!("{QUICK}{STRICT}"), 2).await;
    let uuid = |n: usize| topology.gpus[n].uuid.clone();
    // Nor do they contain errors.
    node.driver.raise("1 set ecc_volatile 1").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false) == [uuid(1)])
        .await;
    node.driver.raise("1 reset").unwrap();
    node.wait("both healthy", || kubelet.ids(GPU, true).len() == 2)
        .await;
    node.driver.raise("0 set retirement_pending 1").unwrap();
    node.driver.raise("1 set retired_pages 60").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false) == [uuid(0)])
        .await;
    node.driver.raise("1 set retired_pages 61").unwrap();
    node.wait("both unhealthy", || kubelet.ids(GPU, false).len() == 2)
        .await;
    node.driver.raise("0 reset").unwrap();
    node.wait("the first healthy", || kubelet.ids(GPU, true) == [uuid(0)])
        .await;
}

/// What the XIDs of the same things leave alone, a look leaves alone; and a neighbour's links are not one's own fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_signs_that_a_gpu_can_live_with_are_told_and_take_none_away() {
    if !root() {
        return;
    }
    let (node, kubelet, _) = ready(&silent_driver("h100x8"), QUICK, 8).await;
    let all = [
        ("0 set ecc_volatile 1", "ecc_contained"),
        ("1 set remap_pending 1", "remap_pending"),
        ("2 set links_down 4", "links_down"),
    ];
    for (line, _) in all {
        node.driver.raise(line).unwrap();
    }
    for (_, sign) in all {
        node.wait(sign, || {
            let page = get(&node, "/metrics").1;
            page.contains(&format!("sign=\"{sign}\""))
        })
        .await;
    }
    assert_eq!(kubelet.ids(GPU, true).len(), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_what_is_done_about_a_sign_is_configured_and_a_warning_is_told_only() {
    if !root() {
        return;
    }
    let more = format!(
        "{QUICK}[health.signs]\necc_aggregate = \"condemn\"\nremap_failed = \"ignore\"\n[health.limits]\necc_aggregate = 10\nlink_errors = 5\n"
    );
    // Its driver says what is to be done: nothing.
    let (node, kubelet) = ready_with("h100x8", &more, 8).await;
    let told = |gpu: usize, sign: &str| {
        let page = get(&node, "/metrics").1;
        let line = |l: &str| {
            l.starts_with("slipway_gpu_sign{")
                && l.contains(&format!("gpu=\"{gpu}\""))
                && l.contains(&format!("sign=\"{sign}\""))
        };
        page.lines().any(line)
    };
    for line in [
        "0 set ecc_volatile 3",
        "1 set remap_pending 1",
        "2 set remap_failed 1",
        "3 set temperature 88",
        "4 set link_errors 6",
        "5 set ecc_aggregate 10",
    ] {
        node.driver.raise(line).unwrap();
    }
    node.wait("word of the heat", || told(3, "slowdown")).await;
    node.wait("word of the links", || {
        node.log().contains("6 errors of its NVLinks since the last look")
    })
    .await;
    for (gpu, sign) in [(0, "ecc_contained"), (1, "remap_pending"), (2, "remap_failed")] {
        assert!(!told(gpu, sign), "{sign}");
    }
    assert_eq!(kubelet.ids(GPU, true).len(), 8);
    node.driver.raise("5 set ecc_aggregate 11").unwrap();
    node.wait("one unhealthy", || kubelet.ids(GPU, false).len() == 1)
        .await;
    node.driver.raise("3 set temperature 60").unwrap();
    node.wait("the end of the heat", || !told(3, "slowdown")).await;
    assert!(node.log().contains("a sign of illness is gone"));
}
