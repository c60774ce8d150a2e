//! What of a node may be handed out, and under which names. Pure.

use std::collections::BTreeMap;

use slipway_gpu::health::Health;
use slipway_gpu::{Device, Gpu, Inventory};

use crate::config::{MigStrategy, Resources};

/// Between a device's UUID and the number of a replica. Kubelet takes ids of 63 characters.
const REPLICA: &str = "::";

/// The UUID of the device that an id of kubelet's stands for.
pub fn device_of(id: &str) -> &str {
    id.split_once(REPLICA).map_or(id, |(uuid, _)| uuid)
}

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

/// Devices that a container could not be given, by UUID, and why.
pub type Without = BTreeMap<String, String>;

/// Makes the lists.
pub fn offer(inventory: &Inventory, health: &Health, without: &Without, wanted: &Resources) -> Offer {
    let mut offer = Offer::default();
    // Always there: kubelet is told "none" rather than nothing.
    offer.resources.insert(wanted.gpu.clone(), Vec::new());
    let vendor = wanted.gpu.split('/').next().unwrap_or("nvidia.com");
    let sick = |gpu: &str| health.of(gpu).map(|u| u.reason.clone());
    for gpu in &inventory.gpus {
        let unhealthy = |device: &dyn Device| sick(&gpu.uuid).or_else(|| without.get(device.uuid()).cloned());
        if gpu.mig != Some(true) {
            put(&mut offer, &wanted.gpu, gpu, gpu, unhealthy(gpu), wanted);
            continue;
        }
        for slice in &gpu.mig_devices {
            match wanted.mig_strategy {
                MigStrategy::None => {}
                MigStrategy::Single => put(&mut offer, &wanted.gpu, slice, gpu, unhealthy(slice), wanted),
                MigStrategy::Mixed => {
                    let name = format!("{vendor}/mig-{}", slice.profile.replace('+', "."));
                    put(&mut offer, &name, slice, gpu, unhealthy(slice), wanted);
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
    unhealthy: Option<String>,
    wanted: &Resources,
) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_gpu::MigDevice;
    use std::path::Path;

    fn offer(inventory: &Inventory, health: &Health, wanted: &Resources) -> Offer {
        super::offer(inventory, health, &Without::new(), wanted)
    }

    fn gpu(index: u32) -> Gpu {
        Gpu {
            index,
            uuid: format!("GPU-{index}"),
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
            ..gpu(index)
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
        let i = inventory(vec![gpu(0), sliced(1, &["1g.5gb", "1g.5gb", "2g.10gb"])]);
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
        let i = inventory(vec![gpu(0), sliced(1, &["1g.5gb", "2g.10gb"])]);
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

    #[test]
    fn a_device_that_no_container_could_be_given_is_the_only_one_kept_back() {
        let i = inventory(vec![gpu(0), sliced(1, &["1g.5gb", "1g.5gb"])]);
        let without = Without::from([("MIG-1-1".to_owned(), "its node is not there".to_owned())]);
        let offer = super::offer(&i, &health(), &without, &wanted(MigStrategy::Mixed, 1));
        let kept = |r: &str| -> Vec<Option<&str>> {
            offer.resources[r]
                .iter()
                .map(|i| i.unhealthy.as_deref())
                .collect()
        };
        assert_eq!(kept("nvidia.com/gpu"), [None]);
        assert_eq!(
            kept("nvidia.com/mig-1g.5gb"),
            [None, Some("its node is not there")]
        );
    }
}
