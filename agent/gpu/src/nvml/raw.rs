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
use crate::signs::LinkErrors;

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

/// Whether pages wait to be retired.
pub fn retirement_pending(nvml: &Nvml, device: &Device<'_>) -> Result<bool, NvmlError> {
    let call = nvml_sym(nvml.lib().nvmlDeviceGetRetiredPagesPendingStatus.as_ref())?;
    let mut pending = 0;
    // SAFETY: see the module.
    unsafe { nvml_try(call(device.handle(), &mut pending))? };
    Ok(pending != 0)
}

/// How many pages are retired, for whatever reason.
pub fn retired_pages(nvml: &Nvml, device: &Device<'_>) -> Result<u32, NvmlError> {
    let call = nvml_sym(nvml.lib().nvmlDeviceGetRetiredPages.as_ref())?;
    let mut all = 0;
    for cause in [
        sys::nvmlPageRetirementCause_enum_NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS,
        sys::nvmlPageRetirementCause_enum_NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR,
    ] {
        let mut count = 0;
        // SAFETY: see the module; with room for none, none is written and they are only counted.
        let answer = unsafe { call(device.handle(), cause, &mut count, std::ptr::null_mut()) };
        match nvml_try(answer) {
            Ok(()) | Err(NvmlError::InsufficientSize(_)) => all += count,
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// What the driver tells of a GPU in fields.
pub struct Told {
    /// What is to be done about it (0: nothing); none: it does not say.
    pub recovery: Option<u32>,
    /// Errors of all NVLinks.
    pub link_errors: LinkErrors,
}

/// What the driver tells.
pub fn told(nvml: &Nvml, device: &Device<'_>) -> Told {
    let ids = [
        sys::field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
        sys::field_id::NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL,
        sys::field_id::NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL,
        sys::field_id::NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL,
        sys::field_id::NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL,
    ];
    let [recovery, links @ ..] = fields(nvml, device, ids, 0);
    Told {
        recovery: recovery.and_then(|action| u32::try_from(action).ok()),
        link_errors: links,
    }
}

/// What the driver says is to be done about the GPU (0: nothing); none when it does not say.
pub fn recovery_action(nvml: &Nvml, device: &Device<'_>) -> Option<u32> {
    let ids = [sys::field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION];
    let [action] = fields(nvml, device, ids, 0);
    u32::try_from(action?).ok()
}

/// KiB of data over all NVLinks: sent, received.
pub fn link_kib(nvml: &Nvml, device: &Device<'_>) -> Option<(u64, u64)> {
    let ids = [
        sys::field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
        sys::field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
    ];
    let [sent, received] = fields(nvml, device, ids, ALL_LINKS);
    Some((sent?, received?))
}

/// The values of fields, each none where it is not there, in one call.
fn fields<const N: usize>(nvml: &Nvml, device: &Device<'_>, ids: [u32; N], scope: u32) -> [Option<u64>; N] {
    let Ok(call) = nvml_sym(nvml.lib().nvmlDeviceGetFieldValues.as_ref()) else {
        return [None; N];
    };
    let mut values = ids.map(|id| {
        // SAFETY: a structure of plain numbers.
        let mut value: sys::nvmlFieldValue_t = unsafe { std::mem::zeroed() };
        (value.fieldId, value.scopeId) = (id, scope);
        value
    });
    let Ok(count) = i32::try_from(N) else {
        return [None; N];
    };
    // SAFETY: see the module; as many values are passed as are counted.
    let answer = unsafe { call(device.handle(), count, values.as_mut_ptr()) };
    if nvml_try(answer).is_err() {
        return [None; N];
    }
    values.map(|value| {
        nvml_try(value.nvmlReturn).ok()?;
        number(&value)
    })
}

/// A whole number that is not negative.
fn number(value: &sys::nvmlFieldValue_t) -> Option<u64> {
    // SAFETY: every field of the union is a number, and the library has written the one that the type names.
    unsafe {
        match value.valueType {
            sys::nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT => Some(value.value.uiVal.into()),
            sys::nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG => Some(value.value.ulVal),
            sys::nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG_LONG => Some(value.value.ullVal),
            sys::nvmlValueType_enum_NVML_VALUE_TYPE_SIGNED_LONG_LONG => {
                u64::try_from(value.value.sllVal).ok()
            }
            _ => None,
        }
    }
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
