//! What devices there are and what they are: finding them, names, numbers, memory, MIG.

use super::*;

// --- finding devices

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCount_v2(to: *mut c_uint) -> Code {
    system("nvmlDeviceGetCount_v2", |t| unsafe {
        put(to, t.gpus.len() as c_uint)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, to: *mut nvmlDevice_t) -> Code {
    let answer = || {
        let index = index as usize;
        state::called("nvmlDeviceGetHandleByIndex_v2", Some(index))?;
        if index >= state::topology()?.gpus.len() {
            return Err(INVALID);
        }
        if state::is_lost(index) {
            return Err(nvml::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
        }
        unsafe { put(to, to_device(index, None)) }
    };
    code(answer())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, to: *mut nvmlDevice_t) -> Code {
    system("nvmlDeviceGetHandleByUUID", |t| {
        let uuid = unsafe { text(uuid) }?;
        for (index, gpu) in t.gpus.iter().enumerate() {
            if gpu.uuid == uuid {
                return unsafe { put(to, to_device(index, None)) };
            }
            let devices = gpu.mig.iter().filter(|m| m.enabled).flat_map(|m| &m.devices);
            if let Some(device) = devices.into_iter().find(|d| d.uuid == uuid) {
                return unsafe { put(to, to_device(index, Some(device.slot))) };
            }
        }
        Err(NOT_FOUND)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(address: *const c_char, to: *mut nvmlDevice_t) -> Code {
    system("nvmlDeviceGetHandleByPciBusId_v2", |t| {
        let address = unsafe { text(address) }?.to_ascii_lowercase();
        let same = |gpu: &Gpu| address.ends_with(&gpu.pci.to_ascii_lowercase());
        let index = t.gpus.iter().position(same).ok_or(NOT_FOUND)?;
        unsafe { put(to, to_device(index, None)) }
    })
}

// --- what a device is

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetIndex(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetIndex", handle, |f| unsafe {
        put(to, f.handle.slot.unwrap_or(f.handle.gpu as u32))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetName(handle: nvmlDevice_t, to: *mut c_char, length: c_uint) -> Code {
    device("nvmlDeviceGetName", handle, |f| {
        let name = match f.mig {
            Some(mig) => format!("{} MIG {}", f.gpu.name, mig.profile),
            None => f.gpu.name.clone(),
        };
        unsafe { put_text(to, length, &name) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetUUID(handle: nvmlDevice_t, to: *mut c_char, length: c_uint) -> Code {
    device("nvmlDeviceGetUUID", handle, |f| unsafe {
        put_text(to, length, f.mig.map_or(&f.gpu.uuid, |m| &m.uuid))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetSerial(handle: nvmlDevice_t, to: *mut c_char, length: c_uint) -> Code {
    device("nvmlDeviceGetSerial", handle, |f| {
        match f.whole()?.serial.as_str() {
            "" => Err(UNSUPPORTED),
            serial => unsafe { put_text(to, length, serial) },
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMinorNumber(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetMinorNumber", handle, |f| unsafe {
        put(to, f.whole()?.minor)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetArchitecture(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetArchitecture", handle, |f| unsafe {
        put(to, f.gpu.architecture)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCudaComputeCapability(
    handle: nvmlDevice_t,
    major: *mut c_int,
    minor: *mut c_int,
) -> Code {
    device("nvmlDeviceGetCudaComputeCapability", handle, |f| unsafe {
        put(major, f.gpu.compute_capability.0)?;
        put(minor, f.gpu.compute_capability.1)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(handle: nvmlDevice_t, to: *mut nvml::nvmlPciInfo_t) -> Code {
    device("nvmlDeviceGetPciInfo_v3", handle, |f| {
        let gpu = f.whole()?;
        unsafe { put(to, pci(&gpu.pci, gpu.pci_device_id)) }
    })
}

fn memory(f: &Found<'_>) -> (u64, u64, u64) {
    let on = |p: &&crate::topology::Process| f.mig.is_none_or(|m| p.instance == Some((m.gi, m.ci)));
    let used: u64 = f.gpu.processes.iter().filter(on).map(|p| p.used_mib).sum();
    match f.mig {
        Some(mig) => (mig.memory_mib * MIB, 0, used * MIB),
        None => (f.gpu.memory_mib * MIB, f.gpu.reserved_mib * MIB, used * MIB),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo(handle: nvmlDevice_t, to: *mut nvml::nvmlMemory_t) -> Code {
    device("nvmlDeviceGetMemoryInfo", handle, |f| {
        // The old form counts what is reserved as used.
        let (total, reserved, used) = memory(f);
        let used = used + reserved;
        let free = total.saturating_sub(used);
        unsafe { put(to, nvml::nvmlMemory_t { total, free, used }) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(
    handle: nvmlDevice_t,
    to: *mut nvml::nvmlMemory_v2_t,
) -> Code {
    device("nvmlDeviceGetMemoryInfo_v2", handle, |f| {
        if to.is_null() {
            return Err(INVALID);
        }
        // SAFETY: not null; the program has set the version before the call.
        let version = unsafe { (&raw const (*to).version).read_unaligned() };
        if version != (size_of::<nvml::nvmlMemory_v2_t>() as u32 | (2 << 24)) {
            return Err(nvml::nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        let (total, reserved, used) = memory(f);
        let free = total.saturating_sub(used + reserved);
        let answer = nvml::nvmlMemory_v2_t {
            version,
            total,
            reserved,
            free,
            used,
        };
        unsafe { put(to, answer) }
    })
}

// --- MIG

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMigMode(
    handle: nvmlDevice_t,
    current: *mut c_uint,
    pending: *mut c_uint,
) -> Code {
    device("nvmlDeviceGetMigMode", handle, |f| {
        let on = u32::from(f.whole()?.mig.as_ref().ok_or(UNSUPPORTED)?.enabled);
        unsafe {
            put(current, on)?;
            put(pending, on)
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetMaxMigDeviceCount", handle, |f| unsafe {
        put(to, f.whole()?.mig.as_ref().map_or(0, |m| m.max))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    handle: nvmlDevice_t,
    slot: c_uint,
    to: *mut nvmlDevice_t,
) -> Code {
    device("nvmlDeviceGetMigDeviceHandleByIndex", handle, |f| {
        let mig = f.whole()?.mig.as_ref().filter(|m| m.enabled).ok_or(UNSUPPORTED)?;
        if slot >= mig.max {
            return Err(INVALID);
        }
        let there = mig.devices.iter().any(|d| d.slot == slot);
        if !there {
            return Err(NOT_FOUND);
        }
        unsafe { put(to, to_device(f.handle.gpu, Some(slot))) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(
    handle: nvmlDevice_t,
    to: *mut nvmlDevice_t,
) -> Code {
    device("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, |f| {
        f.mig.ok_or(INVALID)?;
        unsafe { put(to, to_device(f.handle.gpu, None)) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceIsMigDeviceHandle(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceIsMigDeviceHandle", handle, |f| unsafe {
        put(to, u32::from(f.mig.is_some()))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetGpuInstanceId(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetGpuInstanceId", handle, |f| unsafe {
        put(to, f.mig.ok_or(INVALID)?.gi)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeInstanceId(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetComputeInstanceId", handle, |f| unsafe {
        put(to, f.mig.ok_or(INVALID)?.ci)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetAttributes_v2(
    handle: nvmlDevice_t,
    to: *mut nvml::nvmlDeviceAttributes_t,
) -> Code {
    device("nvmlDeviceGetAttributes_v2", handle, |f| {
        let mig = f.mig.ok_or(UNSUPPORTED)?;
        let answer = nvml::nvmlDeviceAttributes_t {
            multiprocessorCount: mig.multiprocessors,
            sharedCopyEngineCount: mig.slices.0,
            sharedDecoderCount: 0,
            sharedEncoderCount: 0,
            sharedJpegCount: 0,
            sharedOfaCount: 0,
            gpuInstanceSliceCount: mig.slices.0,
            computeInstanceSliceCount: mig.slices.1,
            memorySizeMB: mig.memory_mib,
        };
        unsafe { put(to, answer) }
    })
}
