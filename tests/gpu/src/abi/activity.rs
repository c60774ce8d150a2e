//! What devices do: utilisation, sensors, errors, processes, events.

use super::*;

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
        let otherwise = f.whole()?.temperature.into();
        put(to, f.state(Key::Temperature, otherwise) as c_uint)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTemperatureThreshold(
    handle: nvmlDevice_t,
    kind: nvml::nvmlTemperatureThresholds_t,
    to: *mut c_uint,
) -> Code {
    device("nvmlDeviceGetTemperatureThreshold", handle, |f| {
        f.whole()?;
        let at = match kind {
            nvml::nvmlTemperatureThresholds_enum_NVML_TEMPERATURE_THRESHOLD_SLOWDOWN => SLOWDOWN_AT,
            nvml::nvmlTemperatureThresholds_enum_NVML_TEMPERATURE_THRESHOLD_SHUTDOWN => SHUTDOWN_AT,
            _ => return Err(UNSUPPORTED),
        };
        unsafe { put(to, at) }
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
    counter: c_uint,
    to: *mut c_ulonglong,
) -> Code {
    device("nvmlDeviceGetTotalEccErrors", handle, |f| {
        let (corrected, uncorrected) = f.whole()?.ecc.ok_or(UNSUPPORTED)?;
        // 0: since the driver was loaded.
        let key = if counter == 0 {
            Key::EccVolatile
        } else {
            Key::EccAggregate
        };
        let count = if kind == 0 {
            corrected
        } else {
            f.state(key, uncorrected)
        };
        unsafe { put(to, count) }
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
        unsafe { put(to, f.state(Key::RetirementPending, 0) as c_uint) }
    })
}

/// Only counts them: all are of one cause.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetRetiredPages(
    handle: nvmlDevice_t,
    cause: nvml::nvmlPageRetirementCause_t,
    count: *mut c_uint,
    _: *mut c_ulonglong,
) -> Code {
    device("nvmlDeviceGetRetiredPages", handle, |f| {
        let gpu = f.whole()?;
        if gpu.rows.is_some() || gpu.ecc.is_none() {
            return Err(UNSUPPORTED);
        }
        let pages = match cause {
            nvml::nvmlPageRetirementCause_enum_NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR => {
                f.state(Key::RetiredPages, 0)
            }
            _ => 0,
        };
        if count.is_null() {
            return Err(INVALID);
        }
        // SAFETY: not null.
        let room = unsafe { count.read_unaligned() };
        unsafe { put(count, pages as c_uint) }?;
        if u64::from(room) < pages {
            Err(TOO_SMALL)
        } else {
            Ok(())
        }
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
            put(pending, f.state(Key::RemapPending, rows.2.into()) as c_uint)?;
            put(failed, f.state(Key::RemapFailed, rows.3.into()) as c_uint)
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
            if !f.gpu.nvlinks.is_empty() && FIELDS_LINK_ERRORS.contains(&value.fieldId) {
                value.nvmlReturn = OK;
                value.valueType = 3; // an unsigned long long
                let errors = if value.fieldId == FIELD_LINK_REPLAYS {
                    f.state(Key::LinkErrors, 0)
                } else {
                    0
                };
                value.value = nvml::nvmlValue_t { ullVal: errors };
            }
            // All links together; the topology says what went over them.
            if let Some((sent, received)) = f.gpu.link_kib
                && value.scopeId == c_uint::MAX
                && [FIELD_LINK_SENT, FIELD_LINK_RECEIVED].contains(&value.fieldId)
            {
                value.nvmlReturn = OK;
                value.valueType = 3; // an unsigned long long
                let kib = if value.fieldId == FIELD_LINK_SENT {
                    sent
                } else {
                    received
                };
                value.value = nvml::nvmlValue_t { ullVal: kib };
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
