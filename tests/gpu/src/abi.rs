//! NVML's functions, at their C ABI. Each is: say that it was called, find what the handle means, write the answer.
//!
//! The one place with unsafe code: pointers come from the program, and are written to as NVML's documentation says for each
//! function. A null pointer is answered with INVALID_ARGUMENT.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_ulonglong};
use std::time::Duration;

use nvml_wrapper_sys::bindings as nvml;
use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlEventSet_t};

use crate::events::{self, Event};
use crate::state::{self, Code, Handle};
use crate::topology::{Gpu, MigDevice, Topology};

const OK: Code = nvml::nvmlReturn_enum_NVML_SUCCESS;
const INVALID: Code = nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
const UNSUPPORTED: Code = nvml::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const NOT_FOUND: Code = nvml::nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
const TOO_SMALL: Code = nvml::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;
/// The driver's recovery action.
const FIELD_RECOVERY_ACTION: u32 = 230;
const MIB: u64 = 1 << 20;

type Done = Result<(), Code>;

fn code(done: Done) -> Code {
    done.err().unwrap_or(OK)
}

/// # Safety
/// `to` is null or valid for a write.
unsafe fn put<T>(to: *mut T, value: T) -> Done {
    if to.is_null() {
        return Err(INVALID);
    }
    // SAFETY: the caller's promise.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// # Safety
/// `to` is null or valid for writes of `length` bytes.
unsafe fn put_text(to: *mut c_char, length: c_uint, text: &str) -> Done {
    if to.is_null() {
        return Err(INVALID);
    }
    if text.len() >= length as usize {
        return Err(TOO_SMALL);
    }
    // SAFETY: the text and its final zero fit, as was just seen.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// # Safety
/// `text` is null or a C string.
unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, Code> {
    if text.is_null() {
        return Err(INVALID);
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| INVALID)
}

fn system(function: &str, work: impl FnOnce(&Topology) -> Done) -> Code {
    let answer = state::called(function, None).and_then(|()| work(&*state::topology()?));
    code(answer)
}

fn token(handle: nvmlDevice_t) -> Option<Handle> {
    Handle::from_token(handle as usize)
}

/// What a device's handle stands for.
struct Found<'a> {
    topology: &'a Topology,
    handle: Handle,
    gpu: &'a Gpu,
    mig: Option<&'a MigDevice>,
}

impl Found<'_> {
    /// Only GPUs have that, MIG devices do not.
    fn whole(&self) -> Result<&Gpu, Code> {
        if self.mig.is_some() {
            Err(UNSUPPORTED)
        } else {
            Ok(self.gpu)
        }
    }
}

fn device(function: &str, handle: nvmlDevice_t, work: impl FnOnce(&Found<'_>) -> Done) -> Code {
    let handle = token(handle);
    let answer = || {
        state::called(function, handle.map(|h| h.gpu))?;
        let topology = state::topology()?;
        let handle = handle.ok_or(INVALID)?;
        let (gpu, mig) = handle.find(&topology)?;
        work(&Found {
            topology: &topology,
            handle,
            gpu,
            mig,
        })
    };
    code(answer())
}

fn to_device(gpu: usize, slot: Option<u32>) -> nvmlDevice_t {
    Handle { gpu, slot }.to_token() as nvmlDevice_t
}

fn chars<const N: usize>(text: &str) -> [c_char; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(text.bytes().take(N - 1)) {
        *to = from as c_char;
    }
    out
}

/// "0000:19:00.0" as NVML gives it.
fn pci(address: &str, device_id: u32) -> nvml::nvmlPciInfo_t {
    let part = |n: usize| {
        let text = address.split([':', '.']).nth(n).unwrap_or("0");
        u32::from_str_radix(text, 16).unwrap_or(0)
    };
    let (domain, bus, device) = (part(0), part(1), part(2));
    nvml::nvmlPciInfo_t {
        busIdLegacy: chars(&format!("{domain:04X}:{bus:02X}:{device:02X}.0")),
        domain,
        bus,
        device,
        pciDeviceId: device_id,
        pciSubSystemId: 0,
        busId: chars(&format!("{domain:08X}:{bus:02X}:{device:02X}.0")),
    }
}

// --- the system

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlInit_v2() -> Code {
    unsafe { nvmlInitWithFlags(0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlInitWithFlags(_: c_uint) -> Code {
    let answer = state::called("nvmlInit_v2", None).map(|()| state::initialise(true));
    answer.unwrap_or_else(|code| code)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlShutdown() -> Code {
    let answer = state::called("nvmlShutdown", None).map(|()| state::initialise(false));
    answer.unwrap_or_else(|code| code)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlErrorString(code: Code) -> *const c_char {
    let text: &CStr = match code {
        OK => c"Success",
        nvml::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST => c"GPU is lost",
        nvml::nvmlReturn_enum_NVML_ERROR_TIMEOUT => c"Timeout",
        UNSUPPORTED => c"Not Supported",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetDriverVersion(to: *mut c_char, length: c_uint) -> Code {
    system("nvmlSystemGetDriverVersion", |t| unsafe {
        put_text(to, length, &t.driver_version)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetNVMLVersion(to: *mut c_char, length: c_uint) -> Code {
    system("nvmlSystemGetNVMLVersion", |t| unsafe {
        put_text(
            to,
            length,
            &format!("{}.{}", t.cuda_version / 1000, t.driver_version),
        )
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(to: *mut c_int) -> Code {
    system("nvmlSystemGetCudaDriverVersion_v2", |t| unsafe {
        put(to, t.cuda_version)
    })
}

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

// --- how devices lie to each other

fn pair(
    function: &str,
    one: nvmlDevice_t,
    other: nvmlDevice_t,
    work: impl FnOnce(&Found<'_>, usize, &Gpu) -> Done,
) -> Code {
    device(function, one, |f| {
        let handle = token(other).ok_or(INVALID)?;
        let (gpu, _) = handle.find(f.topology)?;
        work(f, handle.gpu, gpu)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTopologyCommonAncestor(
    one: nvmlDevice_t,
    other: nvmlDevice_t,
    to: *mut nvml::nvmlGpuTopologyLevel_t,
) -> Code {
    pair(
        "nvmlDeviceGetTopologyCommonAncestor",
        one,
        other,
        |f, index, gpu| {
            let level = if index == f.handle.gpu {
                nvml::nvmlGpuLevel_enum_NVML_TOPOLOGY_INTERNAL
            } else if f.gpu.bridge == gpu.bridge {
                nvml::nvmlGpuLevel_enum_NVML_TOPOLOGY_HOSTBRIDGE
            } else if f.gpu.numa == gpu.numa {
                nvml::nvmlGpuLevel_enum_NVML_TOPOLOGY_NODE
            } else {
                nvml::nvmlGpuLevel_enum_NVML_TOPOLOGY_SYSTEM
            };
            unsafe { put(to, level) }
        },
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetP2PStatus(
    one: nvmlDevice_t,
    other: nvmlDevice_t,
    _: nvml::nvmlGpuP2PCapsIndex_t,
    to: *mut nvml::nvmlGpuP2PStatus_t,
) -> Code {
    pair("nvmlDeviceGetP2PStatus", one, other, |f, _, gpu| {
        let linked = f.gpu.nvlinks.iter().any(|l| l.switch || l.remote == gpu.pci);
        // 0: fine; 4: not supported.
        unsafe { put(to, if linked { 0 } else { 4 }) }
    })
}

fn link<'a>(f: &'a Found<'_>, number: c_uint) -> Result<&'a crate::topology::Link, Code> {
    if number >= nvml::NVML_NVLINK_MAX_LINKS {
        return Err(INVALID);
    }
    f.whole()?.nvlinks.get(number as usize).ok_or(UNSUPPORTED)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetNvLinkState(handle: nvmlDevice_t, number: c_uint, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetNvLinkState", handle, |f| unsafe {
        put(to, u32::from(!link(f, number)?.down))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetNvLinkRemotePciInfo_v2(
    handle: nvmlDevice_t,
    number: c_uint,
    to: *mut nvml::nvmlPciInfo_t,
) -> Code {
    device("nvmlDeviceGetNvLinkRemotePciInfo_v2", handle, |f| unsafe {
        put(to, pci(&link(f, number)?.remote, 0))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetNvLinkRemoteDeviceType(
    handle: nvmlDevice_t,
    number: c_uint,
    to: *mut c_uint,
) -> Code {
    device("nvmlDeviceGetNvLinkRemoteDeviceType", handle, |f| unsafe {
        put(to, if link(f, number)?.switch { 2 } else { 0 })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryAffinity(
    handle: nvmlDevice_t,
    words: c_uint,
    to: *mut c_ulong,
    _: nvml::nvmlAffinityScope_t,
) -> Code {
    device("nvmlDeviceGetMemoryAffinity", handle, |f| {
        let node = f.gpu.numa.ok_or(UNSUPPORTED)?;
        let (word, bit) = (node / c_ulong::BITS, node % c_ulong::BITS);
        if word >= words || to.is_null() {
            return Err(INVALID);
        }
        for n in 0..words {
            let value = if n == word { 1 << bit } else { 0 };
            // SAFETY: the program gave room for that many words.
            unsafe { to.add(n as usize).write_unaligned(value) };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetNumaNodeId(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetNumaNodeId", handle, |f| unsafe {
        put(to, f.gpu.numa.ok_or(UNSUPPORTED)?)
    })
}

// --- what a device does

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetUtilizationRates(
    handle: nvmlDevice_t,
    to: *mut nvml::nvmlUtilization_t,
) -> Code {
    device("nvmlDeviceGetUtilizationRates", handle, |f| {
        let gpu = f.whole()?;
        if gpu.mig.as_ref().is_some_and(|m| m.enabled) {
            return Err(UNSUPPORTED);
        }
        let (gpu, memory) = gpu.utilization;
        unsafe { put(to, nvml::nvmlUtilization_t { gpu, memory }) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTemperature(handle: nvmlDevice_t, _: c_uint, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetTemperature", handle, |f| unsafe {
        put(to, f.whole()?.temperature)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPowerUsage(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetPowerUsage", handle, |f| unsafe {
        put(to, f.whole()?.power_mw.0)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetEnforcedPowerLimit(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetEnforcedPowerLimit", handle, |f| unsafe {
        put(to, f.whole()?.power_mw.1)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetClockInfo(handle: nvmlDevice_t, kind: c_uint, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetClockInfo", handle, |f| {
        let (cores, memory) = f.whole()?.clocks;
        // 2: memory; graphics, SM and video run with the cores.
        unsafe { put(to, if kind == 2 { memory } else { cores }) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    handle: nvmlDevice_t,
    kind: c_uint,
    _: c_uint,
    to: *mut c_ulonglong,
) -> Code {
    device("nvmlDeviceGetTotalEccErrors", handle, |f| {
        let (corrected, uncorrected) = f.whole()?.ecc.ok_or(UNSUPPORTED)?;
        unsafe { put(to, if kind == 0 { corrected } else { uncorrected }) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetRetiredPagesPendingStatus(handle: nvmlDevice_t, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetRetiredPagesPendingStatus", handle, |f| {
        // Cards that remap rows retire no pages.
        let gpu = f.whole()?;
        if gpu.rows.is_some() || gpu.ecc.is_none() {
            return Err(UNSUPPORTED);
        }
        unsafe { put(to, 0) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetRemappedRows(
    handle: nvmlDevice_t,
    corrected: *mut c_uint,
    uncorrected: *mut c_uint,
    pending: *mut c_uint,
    failed: *mut c_uint,
) -> Code {
    device("nvmlDeviceGetRemappedRows", handle, |f| {
        let rows = f.whole()?.rows.ok_or(UNSUPPORTED)?;
        unsafe {
            put(corrected, rows.0)?;
            put(uncorrected, rows.1)?;
            put(pending, rows.2)?;
            put(failed, rows.3)
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetFieldValues(
    handle: nvmlDevice_t,
    count: c_int,
    values: *mut nvml::nvmlFieldValue_t,
) -> Code {
    device("nvmlDeviceGetFieldValues", handle, |f| {
        if values.is_null() {
            return Err(INVALID);
        }
        for n in 0..usize::try_from(count).map_err(|_| INVALID)? {
            // SAFETY: the program gave that many values.
            let value = unsafe { &mut *values.add(n) };
            value.nvmlReturn = UNSUPPORTED;
            if value.fieldId == FIELD_RECOVERY_ACTION
                && let Some(action) = f.gpu.recovery_action
            {
                value.nvmlReturn = OK;
                value.valueType = 1; // an unsigned int
                value.value = nvml::nvmlValue_t { uiVal: action };
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    handle: nvmlDevice_t,
    count: *mut c_uint,
    to: *mut nvml::nvmlProcessInfo_t,
) -> Code {
    device("nvmlDeviceGetComputeRunningProcesses_v3", handle, |f| {
        if count.is_null() {
            return Err(INVALID);
        }
        let on = |p: &&crate::topology::Process| f.mig.is_none_or(|m| p.instance == Some((m.gi, m.ci)));
        let list: Vec<_> = f.gpu.processes.iter().filter(on).collect();
        // SAFETY: not null.
        let room = unsafe { count.read_unaligned() } as usize;
        unsafe { put(count, list.len() as c_uint) }?;
        if room < list.len() || (to.is_null() && !list.is_empty()) {
            return Err(TOO_SMALL);
        }
        for (n, process) in list.iter().enumerate() {
            let (gi, ci) = process.instance.unwrap_or((u32::MAX, u32::MAX));
            let info = nvml::nvmlProcessInfo_t {
                pid: process.pid,
                usedGpuMemory: process.used_mib * MIB,
                gpuInstanceId: gi,
                computeInstanceId: ci,
            };
            // SAFETY: there is room for `room` of them, as the program said.
            unsafe { to.add(n).write_unaligned(info) };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetProcessUtilization(
    handle: nvmlDevice_t,
    to: *mut nvml::nvmlProcessUtilizationSample_t,
    count: *mut c_uint,
    _: c_ulonglong,
) -> Code {
    device("nvmlDeviceGetProcessUtilization", handle, |f| {
        if count.is_null() {
            return Err(INVALID);
        }
        let list = &f.whole()?.processes;
        // SAFETY: not null.
        let room = unsafe { count.read_unaligned() } as usize;
        unsafe { put(count, list.len() as c_uint) }?;
        if to.is_null() || room < list.len() {
            return Err(TOO_SMALL);
        }
        for (n, process) in list.iter().enumerate() {
            let sample = nvml::nvmlProcessUtilizationSample_t {
                pid: process.pid,
                timeStamp: 1,
                smUtil: process.utilization,
                memUtil: 0,
                encUtil: 0,
                decUtil: 0,
            };
            // SAFETY: there is room for `room` of them, as the program said.
            unsafe { to.add(n).write_unaligned(sample) };
        }
        Ok(())
    })
}

// --- events

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlEventSetCreate(to: *mut nvmlEventSet_t) -> Code {
    system("nvmlEventSetCreate", |_| unsafe {
        put(to, events::create() as nvmlEventSet_t)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlEventSetFree(set: nvmlEventSet_t) -> Code {
    match state::called("nvmlEventSetFree", None) {
        Ok(()) => events::free(set as usize),
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetSupportedEventTypes(handle: nvmlDevice_t, to: *mut c_ulonglong) -> Code {
    device("nvmlDeviceGetSupportedEventTypes", handle, |_| unsafe {
        put(to, c_ulonglong::from(nvml::nvmlEventTypeXidCriticalError))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceRegisterEvents(
    handle: nvmlDevice_t,
    kinds: c_ulonglong,
    set: nvmlEventSet_t,
) -> Code {
    device("nvmlDeviceRegisterEvents", handle, |f| {
        f.whole()?;
        if kinds & !c_ulonglong::from(nvml::nvmlEventTypeXidCriticalError) != 0 {
            return Err(UNSUPPORTED);
        }
        match events::register(set as usize, f.handle.gpu) {
            OK => Ok(()),
            code => Err(code),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlEventSetWait_v2(
    set: nvmlEventSet_t,
    to: *mut nvml::nvmlEventData_t,
    timeout_ms: c_uint,
) -> Code {
    let answer = || {
        state::called("nvmlEventSetWait_v2", None)?;
        state::topology()?;
        let limit = Duration::from_millis(u64::from(timeout_ms));
        let Event::Xid { gpu, xid, instance } = events::wait(set as usize, limit)? else {
            return Err(nvml::nvmlReturn_enum_NVML_ERROR_TIMEOUT);
        };
        let data = nvml::nvmlEventData_t {
            device: to_device(gpu, None),
            eventType: c_ulonglong::from(nvml::nvmlEventTypeXidCriticalError),
            eventData: xid,
            gpuInstanceId: instance.0,
            computeInstanceId: instance.1,
        };
        unsafe { put(to, data) }
    };
    code(answer())
}
