//! What the library knows at the moment of a call: the folder's files, read again when they change. No pointers here.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nvml_wrapper_sys::bindings as nvml;

use crate::events::{self, Event};
use crate::topology::{Gpu, MigDevice, Topology};

/// NVML's answer as a number.
pub type Code = nvml::nvmlReturn_t;

type Stamp = (u64, i64, i64, u64);

#[derive(Default)]
struct Shared {
    initialised: u32,
    /// How many events there were then.
    born: usize,
    topology: Option<(Stamp, Arc<Topology>)>,
    /// Locked while the library is initialised, as a program that uses a driver has its nodes open.
    held: Option<fs::File>,
}

static SHARED: Mutex<Shared> = Mutex::new(Shared {
    initialised: 0,
    born: 0,
    topology: None,
    held: None,
});

fn shared() -> std::sync::MutexGuard<'static, Shared> {
    SHARED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folder, when the program has one.
pub fn folder() -> Option<PathBuf> {
    std::env::var_os(crate::FOLDER).map(PathBuf::from)
}

/// Counts initialisations as NVML does.
pub fn initialise(more: bool) -> Code {
    let mut shared = shared();
    match (more, shared.initialised) {
        (true, n) => {
            shared.initialised = n + 1;
            if n == 0 {
                shared.born = events::all().len();
                shared.held = hold();
            }
        }
        (false, 0) => return nvml::nvmlReturn_enum_NVML_ERROR_UNINITIALIZED,
        (false, n) => {
            shared.initialised = n - 1;
            if n == 1 {
                shared.held = None;
            }
        }
    }
    nvml::nvmlReturn_enum_NVML_SUCCESS
}

fn hold() -> Option<fs::File> {
    let path = folder()?.join("held");
    let mut options = fs::OpenOptions::new();
    let file = options.create(true).append(true).open(path).ok()?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).ok()?;
    Some(file)
}

/// Logs a call and does what `overrides` says about it.
///
/// # Errors
/// The code it is to answer with.
pub fn called(function: &str, gpu: Option<usize>) -> Result<(), Code> {
    let Some(dir) = folder() else {
        return Err(nvml::nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED);
    };
    if let Ok(mut log) = fs::OpenOptions::new().append(true).open(dir.join("calls")) {
        let line = gpu.map_or(format!("{function}\n"), |g| format!("{function} {g}\n"));
        let _ = log.write_all(line.as_bytes());
    }
    if is_stale() && function != "nvmlInit_v2" {
        return Err(nvml::nvmlReturn_enum_NVML_ERROR_LIB_RM_VERSION_MISMATCH);
    }
    let overrides = fs::read_to_string(dir.join("overrides")).unwrap_or_default();
    for line in overrides.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (rule, which) = match words.as_slice() {
            [name, "sleep", ms, which @ ..] if *name == function || *name == "*" => (("sleep", *ms), which),
            [name, "hang", which @ ..] if *name == function || *name == "*" => (("hang", ""), which),
            [name, code, which @ ..] if *name == function || *name == "*" => (("code", *code), which),
            _ => continue,
        };
        let meant = |w: &&str| w.parse().ok() == gpu;
        if which.first().is_some_and(|w| !meant(w)) {
            continue;
        }
        match rule {
            ("sleep", ms) => std::thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0))),
            ("hang", _) => loop {
                // Like a call into a driver that is stuck: nothing in this process can end it.
                std::thread::park();
            },
            (_, code) => return Err(code.parse().unwrap_or(nvml::nvmlReturn_enum_NVML_ERROR_UNKNOWN)),
        }
    }
    Ok(())
}

/// The machine as its file says it now.
///
/// # Errors
/// The library is not initialised, or there is no file.
pub fn topology() -> Result<Arc<Topology>, Code> {
    let mut shared = shared();
    if shared.initialised == 0 {
        return Err(nvml::nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
    }
    let path = folder().unwrap_or_default().join("topology.json");
    let gone = nvml::nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED;
    let meta = fs::metadata(&path).map_err(|_| gone)?;
    let stamp = (meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len());
    match &shared.topology {
        Some((old, topology)) if *old == stamp => Ok(Arc::clone(topology)),
        _ => {
            let topology = Arc::new(Topology::read(&path).map_err(|_| gone)?);
            shared.topology = Some((stamp, Arc::clone(&topology)));
            Ok(topology)
        }
    }
}

/// Whether the driver was loaded anew since the library was initialised: nothing works then, until that is done again.
pub fn is_stale() -> bool {
    let (initialised, born) = {
        let shared = shared();
        (shared.initialised > 0, shared.born)
    };
    initialised && events::all().iter().skip(born).any(|e| *e == Event::Reload)
}

/// Whether a GPU fell off the bus and was not reset since, as far as this process can see.
pub fn is_lost(gpu: usize) -> bool {
    let born = shared().born;
    let mine = events::all().into_iter().enumerate();
    let mine = mine.filter(|(_, e)| e.gpu() == Some(gpu));
    mine.fold(false, |lost, (n, event)| match event {
        Event::Xid { xid: 79, .. } => true,
        Event::Reset { .. } => false,
        Event::Reattach { .. } if n < born => false,
        _ => lost,
    })
}

/// A device as a handle says it: a GPU, or a slot of its MIG devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handle {
    /// The GPU's index.
    pub gpu: usize,
    /// The MIG device's slot.
    pub slot: Option<u32>,
}

/// What handles are made of; no address that anything could lie at.
const BASE: usize = 0x4000_0000;

impl Handle {
    /// As the program sees it.
    pub fn to_token(self) -> usize {
        BASE | (self.gpu << 8) | self.slot.map_or(0, |s| s as usize + 1)
    }

    /// The handle that a token is.
    pub fn from_token(token: usize) -> Option<Handle> {
        if token & !0xffff != BASE {
            return None;
        }
        Some(Handle {
            gpu: (token >> 8) & 0xff,
            slot: u32::try_from(token & 0xff).ok()?.checked_sub(1),
        })
    }

    /// What it stands for.
    ///
    /// # Errors
    /// It stands for nothing (any more), or for a GPU that is lost.
    pub fn find(self, topology: &Topology) -> Result<(&Gpu, Option<&MigDevice>), Code> {
        let invalid = nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
        let gpu = topology.gpus.get(self.gpu).ok_or(invalid)?;
        if is_lost(self.gpu) {
            return Err(nvml::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
        }
        let Some(slot) = self.slot else {
            return Ok((gpu, None));
        };
        let mig = gpu.mig.as_ref().filter(|m| m.enabled).ok_or(invalid)?;
        let device = mig.devices.iter().find(|d| d.slot == slot).ok_or(invalid)?;
        Ok((gpu, Some(device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_told_apart_from_anything_else() {
        for handle in [
            Handle { gpu: 0, slot: None },
            Handle {
                gpu: 7,
                slot: Some(6),
            },
        ] {
            assert_eq!(Handle::from_token(handle.to_token()), Some(handle));
        }
        assert_eq!(Handle::from_token(0), None);
        assert_eq!(Handle::from_token(0x7fff_0000_1000), None);
    }
}
