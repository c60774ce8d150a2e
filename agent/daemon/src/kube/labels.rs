//! The node's labels, by the names that GPU feature discovery has given them. Pure.
//!
//! Where cards differ, what is said holds for each of them: the least memory, the lowest capability, and "mixed" for products.

use std::collections::{BTreeMap, BTreeSet};

use slipway_gpu::{Gpu, Inventory};

use crate::config::{MigStrategy, Resources};

/// Names and values.
pub type Labels = BTreeMap<String, String>;

/// Names without their domain; MIG profiles' counts come beside.
const NAMES: [&str; 16] = [
    "gpu.present",
    "gpu.count",
    "gpu.product",
    "gpu.memory",
    "gpu.replicas",
    "gpu.sharing-strategy",
    "gpu.compute.major",
    "gpu.compute.minor",
    "gpu.nvlink",
    "gpu.nvswitch",
    "cuda.driver-version.full",
    "cuda.driver-version.major",
    "cuda.runtime-version.full",
    "cuda.runtime-version.major",
    "mig.capable",
    "mig.strategy",
];

fn domain(wanted: &Resources) -> &str {
    wanted.gpu.split('/').next().unwrap_or("nvidia.com")
}

/// Whether a label is one of ours, and so is to go when it is not wanted any more.
pub fn is_ours(name: &str, wanted: &Resources) -> bool {
    let Some(rest) = name
        .strip_prefix(domain(wanted))
        .and_then(|r| r.strip_prefix('/'))
    else {
        return false;
    };
    NAMES.contains(&rest) || (rest.starts_with("mig-") && rest.ends_with(".count"))
}

/// The labels.
pub fn labels(inventory: &Inventory, wanted: &Resources) -> Labels {
    let gpus = &inventory.gpus;
    let mut labels = Labels::new();
    let mut put = |name: &str, value: String| {
        labels.insert(format!("{}/{name}", domain(wanted)), text(&value));
    };
    if gpus.is_empty() {
        return labels;
    }
    put("gpu.present", "true".into());
    put("gpu.count", gpus.len().to_string());
    let products: BTreeSet<&str> = gpus.iter().map(|g| g.name.as_str()).collect();
    match products.first() {
        Some(only) if products.len() == 1 => put("gpu.product", (*only).to_owned()),
        _ => put("gpu.product", "mixed".into()),
    }
    let least = |of: fn(&Gpu) -> u64| gpus.iter().map(of).min().unwrap_or(0);
    put("gpu.memory", (least(|g| g.memory) >> 20).to_string());
    put("gpu.replicas", wanted.replicas.to_string());
    let sharing = if wanted.replicas > 1 {
        "time-slicing"
    } else {
        "none"
    };
    put("gpu.sharing-strategy", sharing.into());
    let (major, minor) = gpus.iter().map(|g| g.compute_capability).min().unwrap_or((0, 0));
    put("gpu.compute.major", major.to_string());
    put("gpu.compute.minor", minor.to_string());
    let links = |g: &Gpu| u64::from(g.links.switch + g.links.peers.iter().map(|(_, n)| n).sum::<u32>());
    put("gpu.nvlink", least(links).to_string());
    put("gpu.nvswitch", (least(|g| g.links.switch.into()) > 0).to_string());
    put("cuda.driver-version.full", inventory.driver.clone());
    let major = inventory.driver.split('.').next().unwrap_or_default();
    put("cuda.driver-version.major", major.to_owned());
    let (major, minor) = inventory.cuda;
    put("cuda.runtime-version.full", format!("{major}.{minor}"));
    put("cuda.runtime-version.major", major.to_string());
    put("mig.capable", gpus.iter().any(|g| g.mig.is_some()).to_string());
    let strategy = match wanted.mig_strategy {
        MigStrategy::None => "none",
        MigStrategy::Single => "single",
        MigStrategy::Mixed => "mixed",
    };
    put("mig.strategy", strategy.into());
    let mut profiles: BTreeMap<&str, u32> = BTreeMap::new();
    for slice in gpus.iter().flat_map(|g| &g.mig_devices) {
        *profiles.entry(&slice.profile).or_default() += 1;
    }
    for (profile, count) in profiles {
        put(&format!("mig-{}.count", text(profile)), count.to_string());
    }
    labels
}

/// As a label's value has to be: letters, digits, `-_.`, at most 63, and no punctuation at the ends.
fn text(value: &str) -> String {
    let plain = |c: char| {
        let good = c.is_ascii_alphanumeric() || "-_.".contains(c);
        if good { c } else { '-' }
    };
    let text: String = value.chars().map(plain).take(63).collect();
    text.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// As a file that node feature discovery reads.
pub fn features(labels: &Labels) -> String {
    labels
        .iter()
        .map(|(name, value)| format!("{name}={value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_gpu::MigDevice;

    fn gpu(name: &str, memory_mib: u64, capability: (i32, i32)) -> Gpu {
        Gpu {
            uuid: name.to_owned(),
            name: name.to_owned(),
            memory: memory_mib << 20,
            compute_capability: capability,
            mig: Some(false),
            ..Gpu::default()
        }
    }

    #[test]
    fn what_is_said_holds_for_every_gpu() {
        let inventory = Inventory {
            driver: "580.95.05".into(),
            cuda: (13, 0),
            gpus: vec![
                gpu("NVIDIA RTX 6000 (Ada)", 49140, (8, 9)),
                gpu("NVIDIA T4", 15360, (7, 5)),
            ],
            ..Inventory::default()
        };
        let all = labels(&inventory, &Resources::default());
        let is = |name: &str, value: &str| assert_eq!(all[&format!("nvidia.com/{name}")], value, "{name}");
        is("gpu.product", "mixed");
        is("gpu.memory", "15360");
        is("gpu.compute.major", "7");
        is("gpu.count", "2");
        is("cuda.driver-version.major", "580");
        is("cuda.runtime-version.full", "13.0");
        is("mig.capable", "true");
        assert!(all.keys().all(|name| is_ours(name, &Resources::default())));
        assert!(!is_ours("nvidia.com/gpu.machine", &Resources::default()));
        assert!(!is_ours("gpu.count", &Resources::default()));
    }

    #[test]
    fn values_are_such_as_labels_may_have() {
        let inventory = Inventory {
            gpus: vec![Gpu {
                mig_devices: vec![MigDevice {
                    profile: "1g.10gb+me".into(),
                    ..MigDevice::default()
                }],
                ..gpu("NVIDIA RTX 6000 (Ada)", 1, (8, 9))
            }],
            ..Inventory::default()
        };
        let all = labels(&inventory, &Resources::default());
        assert_eq!(all["nvidia.com/gpu.product"], "NVIDIA-RTX-6000--Ada");
        assert_eq!(all["nvidia.com/mig-1g.10gb-me.count"], "1");
        assert!(features(&all).contains("nvidia.com/gpu.count=1\n"));
        assert_eq!(text(&"x".repeat(80)).len(), 63);
    }
}
