//! The calls that nvml-wrapper does not have (instance ids, remapped rows), cuts short (events lose their instance, and a
//! failed registration ends the whole set) or answers wrongly (what is at the other end of a link): straight on the bindings.
//!
//! Every function checks that the library has the symbol, hands out pointers to its own variables only, and reads them only
//! after a success.

#![allow(unsafe_code)]

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings as sys;

use crate::model::Rows;

/// What a field of links is asked with for the sum of them.
const ALL_LINKS: u32 = u32::MAX;
/// How long one wait takes at most. Nothing depends on it: a wait that ends is begun again.
const WAIT_MS: u32 = 60_000;
/// What an instance's id is when there is none.
const NO_INSTANCE: u32 = u32::MAX;

/// GPU and compute instance of a MIG device.
pub fn instances(nvml: &Nvml, slice: &Device<'_>) -> Result<(u32, u32), NvmlError> {
    let gi = nvml_sym(nvml.lib().nvmlDeviceGetGpuInstanceId.as_ref())?;
    let ci = nvml_sym(nvml.lib().nvmlDeviceGetComputeInstanceId.as_ref())?;
    let (mut gpu, mut compute) = (0, 0);
    // SAFETY: see the module; the handle lives as long as `nvml`.
    unsafe {
        nvml_try(gi(slice.handle(), &mut gpu))?;
        nvml_try(ci(slice.handle(), &mut compute))?;
    }
    Ok((gpu, compute))
}

/// Remapped rows.
pub fn remapped_rows(nvml: &Nvml, device: &Device<'_>) -> Result<Rows, NvmlError> {
    let call = nvml_sym(nvml.lib().nvmlDeviceGetRemappedRows.as_ref())?;
    let (mut corrected, mut uncorrected, mut pending, mut failed) = (0, 0, 0, 0);
    // SAFETY: see the module.
    unsafe {
        nvml_try(call(
            device.handle(),
            &mut corrected,
            &mut uncorrected,
            &mut pending,
            &mut failed,
        ))?;
    }
    Ok(Rows {
        corrected,
        uncorrected,
        pending: pending != 0,
        failed: failed != 0,
    })
}

/// Whether a switch is at the other end of a link.
pub fn leads_to_switch(nvml: &Nvml, device: &Device<'_>, link: u32) -> Result<bool, NvmlError> {
    let call = nvml_sym(nvml.lib().nvmlDeviceGetNvLinkRemoteDeviceType.as_ref())?;
    let mut kind = 0;
    // SAFETY: see the module.
    unsafe { nvml_try(call(device.handle(), link, &mut kind))? };
    Ok(kind == sys::nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_SWITCH)
}

/// What the driver says is to be done about the GPU (0: nothing); none when it does not say.
pub fn recovery_action(nvml: &Nvml, device: &Device<'_>) -> Option<u32> {
    let value = field(
        nvml,
        device,
        sys::field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
        0,
    )?;
    // SAFETY: every field of the union is a number, and the library has written it.
    Some(unsafe { value.value.uiVal })
}

/// KiB of data over all NVLinks: sent, received.
pub fn link_kib(nvml: &Nvml, device: &Device<'_>) -> Option<(u64, u64)> {
    let ask = |id| {
        let value = field(nvml, device, id, ALL_LINKS)?;
        // SAFETY: every field of the union is a number; these two are 64 bits wide.
        Some(unsafe { value.value.ullVal })
    };
    Some((
        ask(sys::field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX)?,
        ask(sys::field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)?,
    ))
}

fn field(nvml: &Nvml, device: &Device<'_>, id: u32, scope: u32) -> Option<sys::nvmlFieldValue_t> {
    let call = nvml_sym(nvml.lib().nvmlDeviceGetFieldValues.as_ref()).ok()?;
    // SAFETY: a structure of plain numbers.
    let mut value: sys::nvmlFieldValue_t = unsafe { std::mem::zeroed() };
    (value.fieldId, value.scopeId) = (id, scope);
    // SAFETY: see the module; one value is passed and one is counted.
    let answer = unsafe { call(device.handle(), 1, &mut value) };
    nvml_try(answer).ok()?;
    nvml_try(value.nvmlReturn).ok()?;
    Some(value)
}

/// An error that the driver reported.
pub struct Xid {
    /// Its number.
    pub xid: u64,
    /// GPU and compute instance, when it is of one.
    pub instance: Option<(u32, u32)>,
}

/// A set of events of one GPU.
pub struct EventSet<'nvml> {
    nvml: &'nvml Nvml,
    set: sys::nvmlEventSet_t,
}

impl<'nvml> EventSet<'nvml> {
    /// Of this GPU's XIDs.
    pub fn of(nvml: &'nvml Nvml, device: &Device<'_>) -> Result<EventSet<'nvml>, NvmlError> {
        let create = nvml_sym(nvml.lib().nvmlEventSetCreate.as_ref())?;
        let register = nvml_sym(nvml.lib().nvmlDeviceRegisterEvents.as_ref())?;
        let mut set = std::ptr::null_mut();
        // SAFETY: see the module.
        unsafe { nvml_try(create(&mut set))? };
        let set = EventSet { nvml, set };
        let kinds = u64::from(sys::nvmlEventTypeXidCriticalError);
        // SAFETY: the set was just made and is freed when `set` is dropped, not before.
        unsafe { nvml_try(register(device.handle(), kinds, set.set))? };
        Ok(set)
    }

    /// The next XID; none when none came in a while.
    pub fn wait(&self) -> Result<Option<Xid>, NvmlError> {
        let call = nvml_sym(self.nvml.lib().nvmlEventSetWait_v2.as_ref())?;
        // SAFETY: a structure of a pointer and plain numbers.
        let mut data: sys::nvmlEventData_t = unsafe { std::mem::zeroed() };
        // SAFETY: see the module; the set lives as long as `self`.
        let answer = unsafe { call(self.set, &mut data, WAIT_MS) };
        match nvml_try(answer) {
            Ok(()) => {
                let instance = (data.gpuInstanceId, data.computeInstanceId);
                let of_one = instance.0 != NO_INSTANCE && instance.1 != NO_INSTANCE;
                Ok(Some(Xid {
                    xid: data.eventData,
                    instance: of_one.then_some(instance),
                }))
            }
            Err(NvmlError::Timeout) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Drop for EventSet<'_> {
    fn drop(&mut self) {
        if let Ok(free) = nvml_sym(self.nvml.lib().nvmlEventSetFree.as_ref()) {
            // SAFETY: made by us, freed once.
            unsafe { free(self.set) };
        }
    }
}
