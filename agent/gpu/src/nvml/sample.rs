//! What a GPU does at one moment, for metrics: everything that it tells, and nothing that it does not.

use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;

use super::{Library, MAX_LINKS, raw};
use crate::model::{MAX_PROCESSES, Memory, Process, Sample};

impl Library {
    /// Asks the GPU of this UUID.
    pub fn sample(&self, index: u32, uuid: &str) -> Result<Sample, NvmlError> {
        let device = self.device(index, uuid)?;
        let ecc = |kind| device.total_ecc_errors(kind, EccCounter::Volatile).ok();
        let memory = device.memory_info()?;
        let mut sample = Sample {
            utilization: device.utilization_rates().ok().map(|u| (u.gpu, u.memory)),
            memory: Some(Memory {
                total: memory.total,
                used: memory.used,
                reserved: memory.reserved,
            }),
            power_mw: device.power_usage().ok(),
            power_limit_mw: device.enforced_power_limit().ok(),
            temperature: device.temperature(TemperatureSensor::Gpu).ok(),
            clocks_mhz: pair(
                device.clock_info(Clock::SM).ok(),
                device.clock_info(Clock::Memory).ok(),
            ),
            ecc: pair(ecc(MemoryError::Corrected), ecc(MemoryError::Uncorrected)),
            rows: raw::remapped_rows(&self.nvml, &device).ok(),
            link_kib: raw::link_kib(&self.nvml, &device),
            ..Sample::default()
        };
        for number in 0..MAX_LINKS {
            match device.link_wrapper_for(number).is_active() {
                Ok(up) => sample.links += u32::from(up),
                // Links are numbered without holes: there are no more.
                Err(_) => break,
            }
        }
        if device.mig_mode().is_ok_and(|m| m.current == 1) {
            for slot in 0..device.mig_device_count().unwrap_or(0) {
                if let Ok(slice) = device.mig_device_by_index(slot)
                    && let (Ok(uuid), Ok(memory)) = (slice.uuid(), slice.memory_info())
                {
                    sample.slices.push((uuid, memory.used));
                }
            }
        }
        sample.processes = processes(&device);
        Ok(sample)
    }
}

fn pair<T>(one: Option<T>, other: Option<T>) -> Option<(T, T)> {
    Some((one?, other?))
}

fn processes(device: &nvml_wrapper::Device<'_>) -> Vec<Process> {
    let list = device.running_compute_processes().unwrap_or_default();
    // Not told under MIG. A process may have several samples: the last is the newest.
    let load = if list.is_empty() {
        Vec::new()
    } else {
        device.process_utilization_stats(None).unwrap_or_default()
    };
    let one = |p: &nvml_wrapper::struct_wrappers::device::ProcessInfo| Process {
        pid: p.pid,
        memory: match p.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
        instance: pair(p.gpu_instance_id, p.compute_instance_id),
        utilization: load
            .iter()
            .filter(|l| l.pid == p.pid)
            .max_by_key(|l| l.timestamp)
            .map(|l| l.sm_util),
    };
    list.iter().take(MAX_PROCESSES).map(one).collect()
}
