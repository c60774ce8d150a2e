//! NVML's functions, at their C ABI. Each is: say that it was called, find what the handle means, write the answer.
//!
//! The one place with unsafe code: pointers come from the program, and are written to as NVML's documentation says for each
//! function. A null pointer is answered with INVALID_ARGUMENT.

mod activity;
mod describe;
mod place;

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_ulonglong};
use std::time::Duration;

use nvml_wrapper_sys::bindings as nvml;
use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlEventSet_t};

use crate::events::{self, Event, Key};
use crate::state::{self, Code, Handle};
use crate::topology::{Gpu, MigDevice, Topology};

const OK: Code = nvml::nvmlReturn_enum_NVML_SUCCESS;
const INVALID: Code = nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
const UNSUPPORTED: Code = nvml::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const NOT_FOUND: Code = nvml::nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
const TOO_SMALL: Code = nvml::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;
/// The driver's recovery action.
const FIELD_RECOVERY_ACTION: u32 = 230;
/// KiB of data over NVLinks.
const FIELD_LINK_SENT: u32 = 138;
const FIELD_LINK_RECEIVED: u32 = 139;
/// Errors of all NVLinks together: replays, which are all that there are here, recoveries, checksums.
const FIELD_LINK_REPLAYS: u32 = 52;
const FIELDS_LINK_ERRORS: [u32; 4] = [FIELD_LINK_REPLAYS, 59, 38, 45];
/// From where on every card slows itself down, and shuts itself down.
const SLOWDOWN_AT: u32 = 87;
const SHUTDOWN_AT: u32 = 92;
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
    /// What was set while the library is in use, or what the topology says.
    fn state(&self, key: Key, otherwise: u64) -> u64 {
        events::value(self.handle.gpu, key).unwrap_or(otherwise)
    }

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
