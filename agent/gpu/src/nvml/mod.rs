//! NVML, asked once and in full. Runs in the child process only.

mod raw;
mod sample;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor, TemperatureThreshold};
use nvml_wrapper::error::NvmlError;
use serde::{Deserialize, Serialize};

use crate::model::{Gpu, Links, Look, MigDevice, Probe, System};
use crate::signs::Reading;

/// NVML's largest number of links a GPU.
const MAX_LINKS: u32 = 18;
/// How long the driver may take to say what is to be done after an XID.
const RECOVERY: Duration = Duration::from_millis(50);

/// Something that happened to a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuEvent {
    /// The GPU's UUID.
    pub uuid: String,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The driver reported an error.
    Xid {
        /// Its number.
        xid: u64,
        /// GPU and compute instance, when it is of one.
        instance: Option<(u32, u32)>,
        /// The driver's recovery action right after it; none: it tells none.
        recovery: Option<u32>,
    },
    /// The GPU can be watched no longer.
    Lost {
        /// What NVML said.
        error: String,
    },
}

/// The library, loaded and initialised.
pub struct Library {
    nvml: Nvml,
}

impl Library {
    /// Loads and initialises the library.
    pub fn open(path: &Path) -> Result<Library, NvmlError> {
        Ok(Library {
            nvml: Nvml::builder().lib_path(path.as_os_str()).init()?,
        })
    }

    /// What the driver says of itself. Asks no GPU, so that none can hold it up.
    pub fn system(&self) -> Result<System, NvmlError> {
        let cuda = self.nvml.sys_cuda_driver_version()?;
        let part = |n: i32| u32::try_from(n).unwrap_or(0);
        Ok(System {
            driver: self.nvml.sys_driver_version()?,
            cuda: (part(cuda / 1000), part(cuda % 1000 / 10)),
            count: self.nvml.device_count()?,
        })
    }

    /// What the GPU of this index is, and whether it is well: both from the same calls. Only this GPU is asked.
    pub fn look(&self, index: u32, sys: &Path) -> Look {
        let ask = || {
            let device = self.nvml.device_by_index(index)?;
            let gpu = self.gpu(&device, index, sys)?;
            let (recovery, reading) = self.state(&device, &gpu)?;
            Ok::<_, NvmlError>((gpu, recovery, reading))
        };
        match ask() {
            Ok((gpu, recovery, reading)) => Look {
                gpu: Some(gpu),
                probe: Probe {
                    error: None,
                    recovery,
                    reading,
                },
            },
            Err(e) => Look {
                gpu: None,
                probe: Probe {
                    error: Some(e.to_string()),
                    ..Probe::default()
                },
            },
        }
    }

    fn gpu(&self, device: &nvml_wrapper::Device<'_>, index: u32, sys: &Path) -> Result<Gpu, NvmlError> {
        let info = device.pci_info()?;
        let pci = address(info.domain, info.bus, info.device);
        let capability = device.cuda_compute_capability()?;
        let mig = supported(device.mig_mode())?.map(|m| m.current == 1);
        let mut gpu = Gpu {
            index,
            uuid: device.uuid()?,
            name: device.name()?,
            minor: device.minor_number()?,
            numa: numa_node(sys, &pci),
            pci,
            memory: device.memory_info()?.total,
            compute_capability: (capability.major, capability.minor),
            mig,
            ..Gpu::default()
        };
        if mig == Some(true) {
            // A maximum: there are holes.
            for slot in 0..device.mig_device_count()? {
                match device.mig_device_by_index(slot) {
                    Ok(slice) => gpu.mig_devices.push(self.slice(&slice, slot)?),
                    Err(NvmlError::NotFound | NvmlError::InvalidArg) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        gpu.links = self.links(device)?;
        Ok(gpu)
    }

    /// The driver's recovery action, and what tells of an illness. What a card does not tell is left out; an error that only
    /// a GPU that fails can give is one.
    fn state(
        &self,
        device: &nvml_wrapper::Device<'_>,
        gpu: &Gpu,
    ) -> Result<(Option<u32>, Reading), NvmlError> {
        let ecc = |counter| device.total_ecc_errors(MemoryError::Uncorrected, counter).ok();
        let from = |threshold| device.temperature_threshold(threshold).ok();
        let rows = supported(raw::remapped_rows(&self.nvml, device))?;
        let told = raw::told(&self.nvml, device);
        let up = gpu.links.switch + gpu.links.peers.iter().map(|(_, n)| n).sum::<u32>();
        let reading = Reading {
            ecc_volatile: ecc(EccCounter::Volatile),
            ecc_aggregate: ecc(EccCounter::Aggregate),
            rows,
            // Cards that remap rows retire no pages.
            retirement_pending: match rows {
                Some(_) => None,
                None => raw::retirement_pending(&self.nvml, device).ok(),
            },
            retired_pages: match rows {
                Some(_) => None,
                None => raw::retired_pages(&self.nvml, device).ok(),
            },
            links: (gpu.mig != Some(true)).then_some(up),
            link_errors: told.link_errors,
            temperature: device.temperature(TemperatureSensor::Gpu).ok(),
            slowdown_at: from(TemperatureThreshold::Slowdown),
            shutdown_at: from(TemperatureThreshold::Shutdown),
        };
        Ok((told.recovery, reading))
    }

    /// As far as NVML tells: a GPU is good for something without its links. One that is lost has none to count.
    fn links(&self, device: &nvml_wrapper::Device<'_>) -> Result<Links, NvmlError> {
        let (mut peers, mut switch) = (BTreeMap::<String, u32>::new(), 0);
        for number in 0..MAX_LINKS {
            let link = device.link_wrapper_for(number);
            match link.is_active() {
                Ok(true) => {}
                Err(e @ NvmlError::GpuLost) => return Err(e),
                // A link that the card does not have is an invalid argument to some drivers, unsupported to others.
                Ok(false) | Err(_) => continue,
            }
            if raw::leads_to_switch(&self.nvml, device, number).unwrap_or(false) {
                switch += 1;
            } else if let Ok(other) = link.remote_pci_info() {
                *peers
                    .entry(address(other.domain, other.bus, other.device))
                    .or_default() += 1;
            }
        }
        Ok(Links {
            peers: peers.into_iter().collect(),
            switch,
        })
    }

    fn slice(&self, slice: &nvml_wrapper::Device<'_>, index: u32) -> Result<MigDevice, NvmlError> {
        let name = slice.name()?;
        let (gi, ci) = raw::instances(&self.nvml, slice)?;
        let profile = match name.rsplit_once("MIG ") {
            Some((_, profile)) => profile.to_owned(),
            // Older drivers' names do not tell it.
            None => profile_of(&slice.attributes()?),
        };
        Ok(MigDevice {
            index,
            uuid: slice.uuid()?,
            profile,
            gi,
            ci,
            memory: slice.memory_info()?.total,
        })
    }

    /// The GPU of this UUID, which was at this index when it was last looked at. To look for a UUID, NVML initialises every
    /// GPU on the way: only done where the index is another's by now.
    fn device(&self, index: u32, uuid: &str) -> Result<nvml_wrapper::Device<'_>, NvmlError> {
        match self.nvml.device_by_index(index) {
            Ok(device) if device.uuid()? == uuid => Ok(device),
            Err(e @ NvmlError::GpuLost) => Err(e),
            _ => self.nvml.device_by_uuid(uuid),
        }
    }

    /// Tells `heard` what happens to one GPU, on a set of its own so that no other GPU's trouble ends it, until it can be
    /// watched no longer. `ready` is told when it is watched, or that it cannot be.
    pub fn watch(
        self: &Arc<Library>,
        index: u32,
        uuid: &str,
        ready: impl FnOnce(Result<(), NvmlError>),
        heard: &dyn Fn(GpuEvent),
    ) {
        let event = |kind| GpuEvent {
            uuid: uuid.to_owned(),
            kind,
        };
        let begun = self
            .device(index, uuid)
            .and_then(|device| raw::EventSet::of(&self.nvml, &device));
        let set = match begun {
            Ok(begun) => begun,
            Err(e) => return ready(Err(e)),
        };
        ready(Ok(()));
        loop {
            match set.wait() {
                Ok(Some(raw::Xid { xid, instance })) => heard(event(EventKind::Xid {
                    xid,
                    instance,
                    recovery: self.recovery(index, uuid),
                })),
                Ok(None) => {}
                Err(e) => return heard(event(EventKind::Lost { error: e.to_string() })),
            }
        }
    }

    /// The driver's recovery action, if it tells one soon: an XID is not kept back by a GPU that does not answer.
    fn recovery(self: &Arc<Library>, index: u32, uuid: &str) -> Option<u32> {
        let (nvml, uuid) = (Arc::clone(self), uuid.to_owned());
        let (to, answer) = std::sync::mpsc::channel();
        let ask = move || {
            let device = nvml.device(index, &uuid).ok();
            let _ = to.send(device.and_then(|d| raw::recovery_action(&nvml.nvml, &d)));
        };
        let thread = std::thread::Builder::new().stack_size(128 << 10).spawn(ask);
        thread.ok()?;
        answer.recv_timeout(RECOVERY).ok().flatten()
    }
}

fn supported<T>(answer: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_) | NvmlError::FunctionNotFound) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

fn address(domain: u32, bus: u32, device: u32) -> String {
    format!("{domain:04x}:{bus:02x}:{device:02x}.0")
}

/// As NVIDIA writes profiles; compute instances that have less than their GPU instance are said before it.
fn profile_of(a: &nvml_wrapper::struct_wrappers::device::DeviceAttributes) -> String {
    let memory = a.memory_size_mb.div_ceil(1024);
    let (gi, ci) = (a.gpu_instance_slice_count, a.compute_instance_slice_count);
    let compute = if ci < gi { format!("{ci}c.") } else { String::new() };
    format!("{compute}{gi}g.{memory}gb")
}

fn numa_node(sys: &Path, pci: &str) -> Option<u32> {
    let path = sys.join("bus/pci/devices").join(pci).join("numa_node");
    // -1 where the firmware does not say.
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
