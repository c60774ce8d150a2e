//! What of a node may be handed out, under which names, and which devices go well together. Pure.

use std::collections::BTreeMap;

use slipway_gpu::health::Health;
use slipway_gpu::{Device, Gpu, Inventory};

use crate::config::{MigStrategy, Resources};

/// Between a device's UUID and the number of a replica. Kubelet takes ids of 63 characters.
const REPLICA: &str = "::";

/// A device as kubelet sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its id for kubelet: the UUID, with the replica's number where GPUs are shared.
    pub id: String,
    /// The UUID of the GPU or MIG device.
    pub uuid: String,
    /// The UUID of the GPU that it is or is on.
    pub gpu: String,
    /// NUMA node, when known.
    pub numa: Option<u32>,
    /// Why it may not be handed out; none: it may.
    pub unhealthy: Option<String>,
}

/// Everything that is handed out, by resource name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offer {
    /// The lists.
    pub resources: BTreeMap<String, Vec<Item>>,
    /// What cannot be handed out as it was configured, for the log.
    pub warnings: Vec<String>,
}

/// Makes the lists.
pub fn offer(inventory: &Inventory, health: &Health, wanted: &Resources) -> Offer {
    let mut offer = Offer::default();
    // Always there: kubelet is told "none" rather than nothing.
    offer.resources.insert(wanted.gpu.clone(), Vec::new());
    let vendor = wanted.gpu.split('/').next().unwrap_or("nvidia.com");
    for gpu in &inventory.gpus {
        if gpu.mig != Some(true) {
            put(&mut offer, &wanted.gpu, gpu, gpu, health, wanted);
            continue;
        }
        for slice in &gpu.mig_devices {
            match wanted.mig_strategy {
                MigStrategy::None => {}
                MigStrategy::Single => put(&mut offer, &wanted.gpu, slice, gpu, health, wanted),
                MigStrategy::Mixed => {
                    let name = format!("{vendor}/mig-{}", slice.profile.replace('+', "."));
                    put(&mut offer, &name, slice, gpu, health, wanted);
                }
            }
        }
    }
    if wanted.mig_strategy == MigStrategy::Single {
        check_single(inventory, wanted, &mut offer);
    }
    offer
}

fn put(
    offer: &mut Offer,
    resource: &str,
    device: &dyn Device,
    gpu: &Gpu,
    health: &Health,
    wanted: &Resources,
) {
    let unhealthy = health.of(&gpu.uuid).map(|u| u.reason.clone());
    let list = offer.resources.entry(resource.to_owned()).or_default();
    for n in 0..wanted.replicas {
        let id = if wanted.replicas == 1 {
            device.uuid().to_owned()
        } else {
            format!("{}{REPLICA}{n}", device.uuid())
        };
        list.push(Item {
            id,
            uuid: device.uuid().to_owned(),
            gpu: gpu.uuid.clone(),
            numa: gpu.numa,
            unhealthy: unhealthy.clone(),
        });
    }
}

/// With "single" a user cannot say which profile is meant, so there may be one only.
fn check_single(inventory: &Inventory, wanted: &Resources, offer: &mut Offer) {
    let mut kinds: Vec<&str> = inventory
        .gpus
        .iter()
        .flat_map(|g| match g.mig {
            Some(true) => g.mig_devices.iter().map(|m| m.profile.as_str()).collect(),
            _ => vec!["a whole GPU"],
        })
        .collect();
    kinds.sort_unstable();
    kinds.dedup();
    if kinds.len() > 1 {
        offer.resources.insert(wanted.gpu.clone(), Vec::new());
        offer.warnings.push(format!(
            "mig_strategy \"single\" needs devices of one kind, and there are {}: nothing is handed out as {}",
            kinds.join(", "),
            wanted.gpu
        ));
    }
}

/// Chooses `size` of `available` that go well together, all of `must` among them. Never fails: what is not known to the
/// inventory counts as far from everything, and fewer are chosen where there are not enough.
pub fn prefer(
    inventory: &Inventory,
    items: &[Item],
    available: &[String],
    must: &[String],
    size: usize,
) -> Vec<String> {
    let item = |id: &str| items.iter().find(|i| i.id == id);
    let gpu = |id: &str| item(id).and_then(|i| inventory.gpu_of(&i.gpu));
    let shared = items.iter().any(|i| i.id != i.uuid);
    let mut rest: Vec<&String> = available.iter().filter(|id| !must.contains(id)).collect();
    rest.sort();
    rest.dedup();
    let nearness = |a: &str, b: &str| match (gpu(a), gpu(b)) {
        (Some(a), Some(b)) => inventory.nearness(a, b),
        _ => 0,
    };
    // Replicas: the least shared GPU first. Otherwise: near to what is chosen, then far from what stays, so that groups
    // which belong together stay whole for whoever needs them.
    let score = |id: &String, chosen: &[String], rest: &[&String]| -> (i64, i64) {
        if shared {
            let same = |other: &str| item(other).map(|i| &i.uuid) == item(id).map(|i| &i.uuid);
            let taken = chosen.iter().filter(|c| same(c)).count();
            let free = rest.iter().filter(|r| same(r)).count();
            return (-(taken as i64), free as i64);
        }
        let near: u32 = chosen.iter().map(|c| nearness(c, id)).sum();
        let left: u32 = rest.iter().filter(|r| **r != id).map(|r| nearness(r, id)).sum();
        (i64::from(near), -i64::from(left))
    };
    let grow = |mut chosen: Vec<String>, mut rest: Vec<&String>| -> Vec<String> {
        while chosen.len() < size && !rest.is_empty() {
            let best = (0..rest.len())
                .max_by_key(|n| (score(rest[*n], &chosen, &rest), std::cmp::Reverse(*n)))
                .unwrap_or(0);
            chosen.push(rest.remove(best).clone());
        }
        chosen
    };
    let must: Vec<String> = must.iter().take(size).cloned().collect();
    if !must.is_empty() || size < 2 || shared {
        return grow(must, rest);
    }
    // Every device as a beginning: what grows best from it.
    let total = |set: &[String]| -> u32 {
        set.iter()
            .enumerate()
            .map(|(n, a)| set[n + 1..].iter().map(|b| nearness(a, b)).sum::<u32>())
            .sum()
    };
    let mut best: Option<(u32, Vec<String>)> = None;
    for seed in rest.iter().take(64) {
        let others = rest.iter().copied().filter(|r| r != seed).collect();
        let set = grow(vec![(*seed).clone()], others);
        let score = total(&set);
        if best.as_ref().is_none_or(|(old, _)| score > *old) {
            best = Some((score, set));
        }
    }
    best.map_or_else(Vec::new, |(_, set)| set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_gpu::{Links, MigDevice};
    use std::path::Path;

    fn gpu(index: u32, numa: u32, peers: &[u32]) -> Gpu {
        Gpu {
            index,
            uuid: format!("GPU-{index}"),
            pci: format!("pci{index}"),
            numa: Some(numa),
            links: Links {
                peers: peers.iter().map(|p| (format!("pci{p}"), 4)).collect(),
                switch: 0,
            },
            ..Gpu::default()
        }
    }

    fn sliced(index: u32, profiles: &[&str]) -> Gpu {
        Gpu {
            mig: Some(true),
            mig_devices: profiles
                .iter()
                .zip(0..)
                .map(|(profile, n)| MigDevice {
                    index: n,
                    uuid: format!("MIG-{index}-{n}"),
                    profile: (*profile).to_owned(),
                    ..MigDevice::default()
                })
                .collect(),
            ..gpu(index, 0, &[])
        }
    }

    fn inventory(gpus: Vec<Gpu>) -> Inventory {
        Inventory {
            gpus,
            ..Inventory::default()
        }
    }

    fn health() -> Health {
        Health::load(Path::new("/no/such/file"), "boot").0
    }

    fn ids(offer: &Offer, resource: &str) -> Vec<String> {
        offer.resources[resource].iter().map(|i| i.id.clone()).collect()
    }

    fn wanted(mig_strategy: MigStrategy, replicas: u32) -> Resources {
        Resources {
            mig_strategy,
            replicas,
            ..Resources::default()
        }
    }

    #[test]
    fn mig_devices_are_handed_out_as_the_strategy_says() {
        let i = inventory(vec![gpu(0, 0, &[]), sliced(1, &["1g.5gb", "1g.5gb", "2g.10gb"])]);
        let none = offer(&i, &health(), &wanted(MigStrategy::None, 1));
        assert_eq!(ids(&none, "nvidia.com/gpu"), ["GPU-0"]);
        let mixed = offer(&i, &health(), &wanted(MigStrategy::Mixed, 1));
        assert_eq!(mixed.resources.len(), 3);
        assert_eq!(ids(&mixed, "nvidia.com/mig-1g.5gb"), ["MIG-1-0", "MIG-1-1"]);
        let single = offer(&i, &health(), &wanted(MigStrategy::Single, 1));
        assert!(single.resources["nvidia.com/gpu"].is_empty() && single.warnings[0].contains("2g.10gb"));
        let same = inventory(vec![sliced(0, &["1g.5gb", "1g.5gb"])]);
        let single = offer(&same, &health(), &wanted(MigStrategy::Single, 1));
        assert_eq!(ids(&single, "nvidia.com/gpu"), ["MIG-0-0", "MIG-0-1"]);
    }

    #[test]
    fn a_sick_gpu_takes_its_slices_and_replicas_with_it() {
        let i = inventory(vec![gpu(0, 0, &[]), sliced(1, &["1g.5gb", "2g.10gb"])]);
        let mut h = health();
        h.xid(&slipway_gpu::health::Policy::default(), "GPU-1", 79, None, 1);
        let offer = offer(&i, &h, &wanted(MigStrategy::Mixed, 2));
        let sick = |r: &str| {
            offer.resources[r]
                .iter()
                .filter(|i| i.unhealthy.is_some())
                .count()
        };
        assert_eq!(
            (
                sick("nvidia.com/gpu"),
                sick("nvidia.com/mig-1g.5gb"),
                sick("nvidia.com/mig-2g.10gb")
            ),
            (0, 2, 2)
        );
        assert_eq!(ids(&offer, "nvidia.com/gpu"), ["GPU-0::0", "GPU-0::1"]);
    }

    fn choose(i: &Inventory, replicas: u32, available: &[&str], must: &[&str], size: usize) -> Vec<String> {
        let items = offer(i, &health(), &wanted(MigStrategy::None, replicas))
            .resources
            .remove("nvidia.com/gpu");
        let owned = |list: &[&str]| -> Vec<String> { list.iter().map(|s| (*s).to_owned()).collect() };
        let mut got = prefer(
            i,
            &items.unwrap_or_default(),
            &owned(available),
            &owned(must),
            size,
        );
        got.sort();
        got
    }

    #[test]
    fn pairs_that_are_linked_are_given_together_and_others_left_whole() {
        // Two linked pairs, and one GPU alone.
        let i = inventory(vec![
            gpu(0, 0, &[3]),
            gpu(1, 0, &[4]),
            gpu(2, 1, &[]),
            gpu(3, 1, &[0]),
            gpu(4, 1, &[1]),
        ]);
        let all = ["GPU-0", "GPU-1", "GPU-2", "GPU-3", "GPU-4"];
        assert_eq!(choose(&i, 1, &all, &[], 2), ["GPU-0", "GPU-3"]);
        assert_eq!(choose(&i, 1, &all, &["GPU-4"], 2), ["GPU-1", "GPU-4"]);
        assert_eq!(
            choose(&i, 1, &all, &[], 1),
            ["GPU-2"],
            "the lonely one goes first"
        );
        assert_eq!(
            choose(&i, 1, &["GPU-1", "GPU-2", "GPU-4"], &[], 2),
            ["GPU-1", "GPU-4"]
        );
    }

    #[test]
    fn a_choice_never_fails() {
        let i = inventory(vec![gpu(0, 0, &[])]);
        assert_eq!(choose(&i, 1, &["GPU-0", "GPU-gone"], &[], 2).len(), 2);
        assert_eq!(choose(&i, 1, &["GPU-0"], &[], 5), ["GPU-0"]);
        assert_eq!(choose(&i, 1, &[], &["GPU-gone"], 1), ["GPU-gone"]);
        assert!(choose(&i, 1, &["GPU-0"], &[], 0).is_empty());
    }

    #[test]
    fn replicas_are_spread_over_gpus() {
        let i = inventory(vec![gpu(0, 0, &[]), gpu(1, 0, &[])]);
        let available = ["GPU-0::0", "GPU-1::0", "GPU-1::1", "GPU-1::2"];
        assert_eq!(choose(&i, 3, &available, &[], 1), ["GPU-1::0"]);
        assert_eq!(choose(&i, 3, &available, &[], 2), ["GPU-0::0", "GPU-1::0"]);
    }
}
