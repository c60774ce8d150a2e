//! Parts of a GPU through the real kubelet: MIG devices, and time-slicing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use slipway_fake_gpu::Topology;
use slipway_fake_gpu::topology::MigDevice;

use crate::OURS;
use crate::devices::Devices;
use crate::gpu::{GPU, SOON, container};
use crate::kube::Kube;

const SMALL: &str = "nvidia.com/mig-1g.5gb";
const MIDDLE: &str = "nvidia.com/mig-2g.10gb";
/// How soon kubelet has to know of another layout: two looks of the agent's, which looks every two seconds here.
const BOUND: Duration = Duration::from_secs(5);

/// A pod that asks for a number of something and stays; it may make device nodes.
fn pod(k: &Kube, name: &str, resource: &str, count: u32) -> Result<()> {
    k.pod(
        name,
        "exec sleep 1000",
        json!({ "restartPolicy": "Always" }),
        json!({
            "resources": { "limits": { resource: count } },
            "securityContext": { "capabilities": { "add": ["MKNOD"] } },
        }),
    )
}

/// The number of a slice's GPU instance's capability node, as the fake driver has it.
fn capability(minor: u32, slice: &MigDevice) -> u32 {
    3 + minor * 135 + slice.gi * 9
}

/// One A100 with MIG, by its topology, and its slices.
fn topology() -> Result<Topology> {
    let mut topology = Topology::named("a100x4-mig")?;
    topology.gpus.truncate(1);
    Ok(topology)
}

fn slices(topology: &mut Topology) -> Result<&mut Vec<MigDevice>> {
    Ok(&mut topology.gpus[0].mig.as_mut().context("no MIG")?.devices)
}

/// A slice that was not there before, in a place of its own.
fn another(like: &MigDevice, n: u32) -> MigDevice {
    MigDevice {
        slot: 4 + n,
        uuid: format!("MIG-00000000-0000-0000-0000-{n:012}"),
        gi: 10 + n,
        ..like.clone()
    }
}

fn cdi(k: &Kube) -> Result<String> {
    let path = k.cluster.node_dir(OURS).join("cdi/slipway-gpu.json");
    std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

fn event(k: &Kube, pod: &str, reason: &str) -> Result<String> {
    let which = format!("reason={reason},involvedObject.name={pod}");
    k.ok(&[
        "get",
        "events",
        "--field-selector",
        &which,
        "-o",
        "jsonpath={.items[*].message}",
    ])
}

/// Whose each slice is, each of one pod at most.
async fn slice_of(devices: &Devices, resource: &str, pod: &str) -> Result<String> {
    let holders = devices.holders(resource).await?;
    let mut mine = holders
        .into_iter()
        .filter(|(_, h)| h.ends_with(&format!("/{pod}")));
    let (id, _) = mine.next().with_context(|| format!("{pod} has no {resource}"))?;
    Ok(id)
}

pub async fn slices_of_a_gpu_are_pods_own_and_follow_the_geometry(k: Kube) -> Result<()> {
    let mut t = topology()?;
    let minor = t.gpus[0].minor;
    let driver = k
        .cluster
        .start_gpus_with(OURS, &t, "[resources]\nmig_strategy = \"mixed\"\n")?;
    k.cluster.wait_allocatable(OURS, SMALL, 2, SOON).await?;
    k.cluster.wait_allocatable(OURS, MIDDLE, 1, SOON).await?;
    for name in ["one", "two"] {
        pod(&k, name, SMALL, 1)?;
    }
    for name in ["one", "two"] {
        k.ready(name).await?;
    }
    let devices = Devices::of(&k, OURS);
    // Each has its GPU's node and its own two capabilities, and opens no other's, though it makes a node for it.
    let all = slices(&mut t)?.clone();
    for name in ["one", "two"] {
        let uuid = slice_of(&devices, SMALL, name).await?;
        let mine = all.iter().find(|s| s.uuid == uuid).context("no such slice")?;
        let cap = capability(minor, mine);
        let said = k.exec(name, "ls /dev/nvidia-caps | sort; ls /dev | grep 'nvidia[0-9]'")?;
        let expected = format!("nvidia-cap{cap}\nnvidia-cap{}\nnvidia{minor}\n", cap + 1);
        ensure!(said == expected, "{name}: {said}");
        for other in all.iter().filter(|s| s.uuid != uuid) {
            let cap = capability(minor, other);
            let said = k.exec(
                name,
                &format!("mknod /dev/c{cap} c 508 {cap}; cat /dev/c{cap} 2>&1 || true"),
            )?;
            ensure!(said.contains("Operation not permitted"), "{name} {cap}: {said}");
        }
    }
    let before = (container(&k, "one")?, container(&k, "two")?);
    let label = |profile: &str| format!(".metadata.labels.nvidia\\.com/mig-{profile}\\.count");
    k.until("node/node1", &label("1g\\.5gb"), "2").await?;

    // Divided otherwise where nobody is: a 2g.10gb becomes two 1g.5gb.
    let gone = all
        .iter()
        .find(|s| s.profile == "2g.10gb")
        .context("no 2g.10gb")?;
    let small = all.iter().find(|s| s.profile == "1g.5gb").context("no 1g.5gb")?;
    let list = slices(&mut t)?;
    list.retain(|s| s.uuid != gone.uuid);
    list.extend([another(small, 1), another(small, 2)]);
    let ids = |t: &mut Topology, profile: &str| -> Result<BTreeSet<String>> {
        let of = slices(t)?.iter().filter(|s| s.profile == profile);
        Ok(of.map(|s| s.uuid.clone()).collect())
    };
    let four = ids(&mut t, "1g.5gb")?;
    let began = Instant::now();
    driver.set_topology(&t)?;
    devices.until(SMALL, &four, BOUND).await?;
    devices.until(MIDDLE, &BTreeSet::new(), BOUND).await?;
    println!("another layout to kubelet: {:?}", began.elapsed());
    let text = cdi(&k)?;
    ensure!(
        !text.contains(&gone.uuid) && four.iter().all(|id| text.contains(id)),
        "{text}"
    );
    k.until("node/node1", &label("1g\\.5gb"), "4").await?;
    k.until("node/node1", &label("2g\\.10gb"), "").await?;
    // What is new is handed out, and nothing that somebody has.
    k.cluster.wait_allocatable(OURS, SMALL, 4, SOON).await?;
    for name in ["three", "four"] {
        pod(&k, name, SMALL, 1)?;
    }
    for name in ["three", "four"] {
        k.ready(name).await?;
    }
    let holders = devices.holders(SMALL).await?;
    ensure!(holders.len() == 4, "{holders:?}");

    // Divided otherwise under a pod: it goes on, and is told; its slice is nobody's.
    let lost = slice_of(&devices, SMALL, "one").await?;
    let old = slices(&mut t)?.clone();
    slices(&mut t)?.retain(|s| s.uuid != lost);
    driver.set_topology(&t)?;
    devices.until(SMALL, &ids(&mut t, "1g.5gb")?, BOUND).await?;
    k.until_true("the pod's Event", |k| {
        let said = event(k, "one", "GpuGone")?;
        Ok(said.contains(&lost) && said.contains("left alone"))
    })
    .await?;
    let log = std::fs::read_to_string(k.cluster.processes().log("agent1"))?;
    let told = |l: &str| l.contains(&lost) && l.contains("a container has it") && l.contains("pod=\"one\"");
    ensure!(log.lines().any(told), "{log}");
    k.until("node/node1", &label("1g\\.5gb"), "3").await?;
    // It comes back by the same name, as drivers do that name slices by their place: its pod has it still.
    *slices(&mut t)? = old;
    driver.set_topology(&t)?;
    devices.until(SMALL, &four, BOUND).await?;
    k.cluster.wait_allocatable(OURS, SMALL, 4, SOON).await?;
    pod(&k, "five", SMALL, 1)?;
    let reason = ".status.conditions[?(@.type==\"PodScheduled\")].reason";
    k.until("pod/five", reason, "Unschedulable").await?;
    ensure!(devices.holders(SMALL).await? == holders);
    let after = (container(&k, "one")?, container(&k, "two")?);
    ensure!(before == after, "the pods were {before:?} and are {after:?}");
    for name in ["two", "three", "four"] {
        ensure!(event(&k, name, "GpuGone")?.is_empty(), "{name} is told");
    }
    k.cluster.processes().end("agent1", Duration::from_secs(5))?;
    Ok(())
}

pub async fn slices_of_one_profile_are_handed_out_as_gpus(k: Kube) -> Result<()> {
    let mut t = topology()?;
    slices(&mut t)?.retain(|s| s.profile == "1g.5gb");
    let minor = t.gpus[0].minor;
    let driver = k
        .cluster
        .start_gpus_with(OURS, &t, "[resources]\nmig_strategy = \"single\"\n")?;
    k.cluster.wait_allocatable(OURS, GPU, 2, SOON).await?;
    for name in ["one", "two"] {
        pod(&k, name, GPU, 1)?;
    }
    for name in ["one", "two"] {
        k.ready(name).await?;
    }
    let devices = Devices::of(&k, OURS);
    let all = slices(&mut t)?.clone();
    for name in ["one", "two"] {
        let uuid = slice_of(&devices, GPU, name).await?;
        let mine = all.iter().find(|s| s.uuid == uuid).context("no such slice")?;
        let cap = capability(minor, mine);
        let said = k.exec(name, "ls /dev/nvidia-caps | sort")?;
        ensure!(
            said == format!("nvidia-cap{cap}\nnvidia-cap{}\n", cap + 1),
            "{name}: {said}"
        );
    }
    let before = (container(&k, "one")?, container(&k, "two")?);
    let holders = devices.holders(GPU).await?;

    // One more of the same profile.
    slices(&mut t)?.push(another(&all[0], 1));
    let three: BTreeSet<String> = slices(&mut t)?.iter().map(|s| s.uuid.clone()).collect();
    driver.set_topology(&t)?;
    devices.until(GPU, &three, BOUND).await?;
    k.cluster.wait_allocatable(OURS, GPU, 3, SOON).await?;
    pod(&k, "three", GPU, 1)?;
    k.ready("three").await?;
    ensure!(devices.holders(GPU).await?.len() == 3);

    // One of another profile: a user could not say which is meant, so none is handed out, and those who have one keep it.
    let other = MigDevice {
        profile: "2g.10gb".into(),
        ..another(&all[0], 2)
    };
    slices(&mut t)?.push(other.clone());
    driver.set_topology(&t)?;
    devices.until(GPU, &BTreeSet::new(), BOUND).await?;
    k.until_true("word of it in the agent's log", |k| {
        let log = std::fs::read_to_string(k.cluster.processes().log("agent1"))?;
        Ok(log.contains("needs devices of one kind, and there are"))
    })
    .await?;
    slices(&mut t)?.retain(|s| s.uuid != other.uuid);
    driver.set_topology(&t)?;
    devices.until(GPU, &three, BOUND).await?;
    let after = (container(&k, "one")?, container(&k, "two")?);
    ensure!(before == after, "the pods were {before:?} and are {after:?}");
    let now = devices.holders(GPU).await?;
    ensure!(
        holders.iter().all(|(id, pod)| now.get(id) == Some(pod)),
        "{now:?}"
    );
    k.cluster.processes().end("agent1", Duration::from_secs(5))?;
    Ok(())
}

pub async fn four_pods_share_a_gpu_and_none_is_given_two_shares(k: Kube) -> Result<()> {
    let t = Topology::named("h200")?;
    let driver = k
        .cluster
        .start_gpus_with(OURS, &t, "[resources]\nreplicas = 4\n")?;
    k.cluster.wait_allocatable(OURS, GPU, 4, SOON).await?;
    k.until("node/node1", ".metadata.labels.nvidia\\.com/gpu\\.replicas", "4")
        .await?;
    // Two shares of one GPU are not two GPUs: refused, and why is said.
    pod(&k, "greedy", GPU, 2)?;
    k.phase("greedy", "Failed").await?;
    let why = k.field("pod/greedy", ".status.message")?;
    ensure!(
        why.contains("a container may have one nvidia.com/gpu only"),
        "{why}"
    );
    k.ok(&["delete", "pod", "greedy", "--wait"])?;
    let names = ["one", "two", "three", "four"];
    for name in names {
        pod(&k, name, GPU, 1)?;
    }
    for name in names {
        k.ready(name).await?;
        let said = k.exec(name, "ls /dev | grep 'nvidia[0-9]'")?;
        ensure!(said == "nvidia0\n", "{name}: {said}");
    }
    let devices = Devices::of(&k, OURS);
    let holders = devices.holders(GPU).await?;
    ensure!(holders.len() == 4, "each has a share of its own: {holders:?}");
    pod(&k, "five", GPU, 1)?;
    let reason = ".status.conditions[?(@.type==\"PodScheduled\")].reason";
    k.until("pod/five", reason, "Unschedulable").await?;
    // All of it falls sick together.
    driver.raise("0 79")?;
    devices.until(GPU, &BTreeSet::new(), BOUND).await?;
    for name in ["one", "two", "three", "four", "five"] {
        // The agent may have had it evicted.
        k.ok(&["delete", "pod", name, "--wait", "--ignore-not-found"])?;
    }
    k.cluster.processes().end("agent1", Duration::from_secs(5))?;

    // Where it is configured so, a container may have several: it still sees one GPU.
    let more = "[resources]\nreplicas = 4\none_replica_a_container = false\n";
    k.cluster.start_gpus_with(OURS, &t, more)?;
    k.cluster.wait_allocatable(OURS, GPU, 4, SOON).await?;
    pod(&k, "several", GPU, 2)?;
    k.ready("several").await?;
    let said = k.exec("several", "ls /dev | grep 'nvidia[0-9]'")?;
    ensure!(said == "nvidia0\n", "{said}");
    k.cluster.processes().end("agent1", Duration::from_secs(5))?;
    Ok(())
}
