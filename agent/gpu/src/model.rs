//! What a node has. Values as NVML and /sys gave them; no handles, nothing that can become invalid.

use serde::{Deserialize, Serialize};

use crate::signs::Reading;

/// What the driver says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct System {
    /// As `580.95.05`.
    pub driver: String,
    /// CUDA's major and minor version that the driver has.
    pub cuda: (u32, u32),
    /// How many GPUs there are.
    pub count: u32,
}

/// One look at a GPU: what it is and whether it is well are one answer, so that they cannot disagree.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// What it is; none: it does not answer, and the probe says how.
    pub gpu: Option<Gpu>,
    /// Whether it is well.
    pub probe: Probe,
}

/// Everything found at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// As `580.95.05`.
    pub driver: String,
    /// CUDA's major and minor version that the driver has.
    pub cuda: (u32, u32),
    /// The GPUs that answer, by index.
    pub gpus: Vec<Gpu>,
    /// Those that do not.
    pub failed: Vec<Failed>,
}

/// A GPU that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// NVML's index.
    pub index: u32,
    /// What NVML said.
    pub error: String,
}

/// One GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// NVML's index: by PCI address, not by minor number.
    pub index: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// N of `/dev/nvidiaN`.
    pub minor: u32,
    /// `0000:19:00.0`.
    pub pci: String,
    /// NUMA node, when known.
    pub numa: Option<u32>,
    /// Bytes of memory.
    pub memory: u64,
    /// CUDA compute capability: major, minor.
    pub compute_capability: (i32, i32),
    /// Whether MIG is on; none: the card has none.
    pub mig: Option<bool>,
    /// MIG devices, when it is on.
    pub mig_devices: Vec<MigDevice>,
    /// NVLinks that are up.
    pub links: Links,
}

/// A GPU's NVLinks that are up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Links {
    /// To other GPUs: their PCI address, and how many.
    pub peers: Vec<(String, u32)>,
    /// To switches.
    pub switch: u32,
}

/// A MIG device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigDevice {
    /// NVML's index of it on its GPU.
    pub index: u32,
    /// `MIG-…`.
    pub uuid: String,
    /// `1g.10gb`.
    pub profile: String,
    /// GPU instance.
    pub gi: u32,
    /// Compute instance.
    pub ci: u32,
    /// Bytes of memory.
    pub memory: u64,
}

/// What can be handed out: a whole GPU, or a MIG device as one of its own.
pub trait Device {
    /// Its UUID.
    fn uuid(&self) -> &str;
    /// Bytes of memory.
    fn memory(&self) -> u64;
    /// Its MIG profile; none: a whole GPU.
    fn profile(&self) -> Option<&str>;
}

impl Device for Gpu {
    fn uuid(&self) -> &str {
        &self.uuid
    }

    fn memory(&self) -> u64 {
        self.memory
    }

    fn profile(&self) -> Option<&str> {
        None
    }
}

impl Device for MigDevice {
    fn uuid(&self) -> &str {
        &self.uuid
    }

    fn memory(&self) -> u64 {
        self.memory
    }

    fn profile(&self) -> Option<&str> {
        Some(&self.profile)
    }
}

/// Whether a GPU is well, as far as it can be asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What NVML said instead of an answer.
    pub error: Option<String>,
    /// The driver's recovery action (0: none); none: the driver does not tell one.
    pub recovery: Option<u32>,
    /// What was read of its state.
    pub reading: Reading,
}

/// What a GPU does at one moment. None: the card, or its driver, does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Per cent of the last period: cores, memory's bandwidth.
    pub utilization: Option<(u32, u32)>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Milliwatts drawn.
    pub power_mw: Option<u32>,
    /// Milliwatts allowed.
    pub power_limit_mw: Option<u32>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// MHz: cores, memory.
    pub clocks_mhz: Option<(u32, u32)>,
    /// Errors since the driver was loaded: corrected, uncorrected.
    pub ecc: Option<(u64, u64)>,
    /// Rows remapped.
    pub rows: Option<Rows>,
    /// NVLinks that are up.
    pub links: u32,
    /// KiB of data over all NVLinks since the driver was loaded: sent, received.
    pub link_kib: Option<(u64, u64)>,
    /// Bytes in use on each MIG device, by UUID.
    pub slices: Vec<(String, u64)>,
    /// Processes that compute, [`MAX_PROCESSES`] at most.
    pub processes: Vec<Process>,
}

/// Most processes that are told of one GPU.
pub const MAX_PROCESSES: usize = 1024;

/// A GPU's memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// In use.
    pub used: u64,
    /// Kept by the driver.
    pub reserved: u64,
}

/// Remapped rows of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// After corrected errors.
    pub corrected: u32,
    /// After uncorrected ones.
    pub uncorrected: u32,
    /// One waits for a reset.
    pub pending: bool,
    /// One could not be remapped.
    pub failed: bool,
}

/// A process on a GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// On the host.
    pub pid: u32,
    /// Bytes that it uses, when the driver tells.
    pub memory: Option<u64>,
    /// GPU and compute instance that it is on.
    pub instance: Option<(u32, u32)>,
    /// Per cent of the cores, when the driver tells.
    pub utilization: Option<u32>,
}

impl Inventory {
    /// How near two GPUs are: NVLinks between them first, then a common NUMA node. Greater is nearer; the same GPU's MIG
    /// devices are nearest of all.
    pub fn nearness(&self, one: &Gpu, other: &Gpu) -> u32 {
        if one.uuid == other.uuid {
            return 10_000;
        }
        let direct = one
            .links
            .peers
            .iter()
            .find(|(pci, _)| *pci == other.pci)
            .map_or(0, |(_, n)| *n);
        let switched = one.links.switch.min(other.links.switch);
        let numa = u32::from(one.numa.is_some() && one.numa == other.numa);
        direct.max(switched) * 100 + numa * 10
    }

    /// The GPU that a device of this UUID is, or is on.
    pub fn gpu_of(&self, uuid: &str) -> Option<&Gpu> {
        self.gpus
            .iter()
            .find(|g| g.uuid == uuid || g.mig_devices.iter().any(|m| m.uuid == uuid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: u32, numa: Option<u32>, peers: &[(&str, u32)], switch: u32) -> Gpu {
        Gpu {
            index,
            uuid: format!("GPU-{index}"),
            pci: format!("0000:0{index}:00.0"),
            numa,
            links: Links {
                peers: peers.iter().map(|(p, n)| ((*p).to_owned(), *n)).collect(),
                switch,
            },
            ..Gpu::default()
        }
    }

    #[test]
    fn links_count_more_than_nodes_and_unknown_nodes_nothing() {
        let i = Inventory::default();
        let a = gpu(0, Some(0), &[("0000:01:00.0", 4)], 0);
        let b = gpu(1, Some(1), &[("0000:00:00.0", 4)], 0);
        let c = gpu(2, Some(0), &[], 0);
        assert_eq!(
            (i.nearness(&a, &b), i.nearness(&a, &c), i.nearness(&b, &c)),
            (400, 10, 0)
        );
        let (s, t) = (gpu(3, None, &[], 18), gpu(4, None, &[], 18));
        assert_eq!((i.nearness(&s, &t), i.nearness(&s, &a)), (1800, 0));
        assert_eq!(i.nearness(&a, &a), 10_000);
    }
}
