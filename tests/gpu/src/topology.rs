//! What a fake machine has, as its file says it. Units are NVML's unless the name says otherwise.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A machine's GPUs and driver.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// As `580.95.05`.
    pub driver_version: String,
    /// CUDA's, as 13000 for 13.0.
    pub cuda_version: i32,
    /// The GPUs, in NVML's order.
    pub gpus: Vec<Gpu>,
}

/// One GPU.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gpu {
    /// Product name.
    pub name: String,
    /// `GPU-…`.
    pub uuid: String,
    /// Board serial number.
    pub serial: String,
    /// N of `/dev/nvidiaN`.
    pub minor: u32,
    /// `0000:19:00.0`.
    pub pci: String,
    /// Device and vendor, as NVML has them: `0x233510de`.
    pub pci_device_id: u32,
    /// The host bridge that it hangs on: GPUs with the same one have a common ancestor there.
    pub bridge: u32,
    /// NUMA node; none: unknown.
    pub numa: Option<u32>,
    /// NVML's number of the architecture (9: Hopper).
    pub architecture: u32,
    /// Major, minor.
    pub compute_capability: (i32, i32),
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Memory that the driver keeps, in MiB.
    pub reserved_mib: u64,
    /// Per cent of the last period: cores, memory.
    pub utilization: (u32, u32),
    /// Milliwatts drawn and allowed.
    pub power_mw: (u32, u32),
    /// Degrees Celsius.
    pub temperature: u32,
    /// MHz: cores, memory.
    pub clocks: (u32, u32),
    /// Corrected and uncorrected errors since the driver was loaded; none: a card without ECC.
    pub ecc: Option<(u64, u64)>,
    /// Rows remapped: corrected, uncorrected, one pending (0 or 1), one failed (0 or 1); none: not supported.
    pub rows: Option<(u32, u32, u32, u32)>,
    /// The driver's recovery action (field 230); none: an older driver.
    pub recovery_action: Option<u32>,
    /// KiB that went over all NVLinks: sent, received; none: the driver does not count.
    pub link_kib: Option<(u64, u64)>,
    /// NVLinks, by link number.
    pub nvlinks: Vec<Link>,
    /// MIG; none: the card has none.
    pub mig: Option<Mig>,
    /// Processes.
    pub processes: Vec<Process>,
}

/// One NVLink.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// PCI address of the other end.
    pub remote: String,
    /// Whether that is a switch, not a GPU.
    #[serde(default)]
    pub switch: bool,
    /// Whether the link is down.
    #[serde(default)]
    pub down: bool,
}

/// A GPU's MIG state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mig {
    /// Whether it is on.
    pub enabled: bool,
    /// How many devices there may be.
    pub max: u32,
    /// The devices there are.
    #[serde(default)]
    pub devices: Vec<MigDevice>,
}

/// A MIG device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigDevice {
    /// NVML's index of it, which may leave holes.
    pub slot: u32,
    /// `MIG-…`.
    pub uuid: String,
    /// Its profile: `1g.10gb`.
    pub profile: String,
    /// GPU instance.
    pub gi: u32,
    /// Compute instance.
    pub ci: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Slices: of the GPU instance, of the compute instance.
    pub slices: (u32, u32),
}

/// A process on a GPU.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// On the host.
    pub pid: u32,
    /// MiB that it uses.
    pub used_mib: u64,
    /// GPU and compute instance, where it is on one.
    #[serde(default)]
    pub instance: Option<(u32, u32)>,
    /// Per cent of the cores.
    #[serde(default)]
    pub utilization: u32,
}

impl Topology {
    /// Reads a topology file.
    ///
    /// # Errors
    /// It is not there or not one.
    pub fn read(path: &Path) -> Result<Topology> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))
    }

    /// The topology that ships as `NAME.json`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn named(name: &str) -> Result<Topology> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/gpu");
        Topology::read(&dir.join(format!("{name}.json")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topologies_that_ship_are_consistent() {
        for (name, gpus, mig) in [
            ("h200", 1, 0),
            ("h100x8", 8, 0),
            ("a100x4-mig", 4, 9),
            ("workstation", 2, 0),
        ] {
            let t = Topology::named(name).expect("a topology");
            assert_eq!(t.gpus.len(), gpus, "{name}");
            let devices = t
                .gpus
                .iter()
                .filter_map(|g| g.mig.as_ref())
                .flat_map(|m| &m.devices);
            assert_eq!(devices.count(), mig, "{name}");
            let mut uuids: Vec<_> = t.gpus.iter().map(|g| &g.uuid).collect();
            uuids.sort();
            uuids.dedup();
            assert_eq!(uuids.len(), gpus, "{name}: UUIDs are unique");
        }
    }
}
