//! How devices lie to each other: common ancestors, links, NUMA nodes.

use super::*;

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
    let links = &f.whole()?.nvlinks;
    // As drivers do: a card with some links has no others, and one with none does not know what a link is.
    let other = if links.is_empty() { UNSUPPORTED } else { INVALID };
    links.get(number as usize).ok_or(other)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetNvLinkState(handle: nvmlDevice_t, number: c_uint, to: *mut c_uint) -> Code {
    device("nvmlDeviceGetNvLinkState", handle, |f| unsafe {
        let down = u64::from(number) < f.state(Key::LinksDown, 0);
        put(to, u32::from(!link(f, number)?.down && !down))
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
