//! The events file, and event sets that read along in it.

use std::collections::HashMap;
use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nvml_wrapper_sys::bindings as nvml;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify;

use crate::state::{self, Code};

/// No instance.
const NONE: u32 = u32::MAX;

/// A line of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// "GPU XID [GI CI]".
    Xid {
        /// Index.
        gpu: usize,
        /// Number.
        xid: u64,
        /// GPU and compute instance; all ones: of none.
        instance: (u32, u32),
    },
    /// "GPU reset".
    Reset {
        /// Index.
        gpu: usize,
    },
    /// "GPU reattach".
    Reattach {
        /// Index.
        gpu: usize,
    },
    /// "GPU set KEY VALUE".
    Set {
        /// Index.
        gpu: usize,
        /// What.
        key: Key,
        /// To what.
        value: u64,
    },
    /// "reload".
    Reload,
}

/// What of a GPU's state can be set while programs run, over what the topology says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// "ecc_volatile": uncorrected errors since the driver was loaded.
    EccVolatile,
    /// "ecc_aggregate": those in the card's life.
    EccAggregate,
    /// "remap_pending": 0 or 1.
    RemapPending,
    /// "remap_failed": 0 or 1.
    RemapFailed,
    /// "retirement_pending": 0 or 1.
    RetirementPending,
    /// "retired_pages".
    RetiredPages,
    /// "links_down": that many of the first NVLinks.
    LinksDown,
    /// "link_errors": of all NVLinks together.
    LinkErrors,
    /// "temperature".
    Temperature,
}

impl Key {
    fn parse(word: &str) -> Option<Key> {
        Some(match word {
            "ecc_volatile" => Key::EccVolatile,
            "ecc_aggregate" => Key::EccAggregate,
            "remap_pending" => Key::RemapPending,
            "remap_failed" => Key::RemapFailed,
            "retirement_pending" => Key::RetirementPending,
            "retired_pages" => Key::RetiredPages,
            "links_down" => Key::LinksDown,
            "link_errors" => Key::LinkErrors,
            "temperature" => Key::Temperature,
            _ => return None,
        })
    }

    /// Whether a reset of the GPU, or a driver that is loaded anew, ends it.
    fn ends_with_a_reset(self) -> bool {
        matches!(
            self,
            Key::EccVolatile | Key::RemapPending | Key::RetirementPending | Key::LinksDown | Key::LinkErrors
        )
    }
}

/// What a key of a GPU was set to last; none: it is as the topology says.
pub fn value(gpu: usize, key: Key) -> Option<u64> {
    all().into_iter().fold(None, |value, event| match event {
        Event::Set {
            gpu: g,
            key: k,
            value,
        } if (g, k) == (gpu, key) => Some(value),
        Event::Reset { gpu: g } | Event::Reattach { gpu: g } if g == gpu && key.ends_with_a_reset() => None,
        Event::Reload if key.ends_with_a_reset() => None,
        _ => value,
    })
}

impl Event {
    /// Whose it is; none: everything's.
    pub fn gpu(self) -> Option<usize> {
        match self {
            Event::Xid { gpu, .. }
            | Event::Reset { gpu }
            | Event::Reattach { gpu }
            | Event::Set { gpu, .. } => Some(gpu),
            Event::Reload => None,
        }
    }
}

fn parse(line: &str) -> Option<Event> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["reload"] => Some(Event::Reload),
        [gpu, "reset"] => Some(Event::Reset {
            gpu: gpu.parse().ok()?,
        }),
        [gpu, "reattach"] => Some(Event::Reattach {
            gpu: gpu.parse().ok()?,
        }),
        [gpu, "set", key, value] => Some(Event::Set {
            gpu: gpu.parse().ok()?,
            key: Key::parse(key)?,
            value: value.parse().ok()?,
        }),
        [gpu, xid, rest @ ..] => Some(Event::Xid {
            gpu: gpu.parse().ok()?,
            xid: xid.parse().ok()?,
            instance: match rest {
                [gi, ci] => (gi.parse().ok()?, ci.parse().ok()?),
                _ => (NONE, NONE),
            },
        }),
        _ => None,
    }
}

/// Whole lines of the file, by their number.
pub fn all() -> Vec<Event> {
    let text = state::folder().and_then(|dir| fs::read_to_string(dir.join("events")).ok());
    let text = text.unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(parse).collect()
}

#[derive(Default)]
struct Set {
    gpus: Vec<usize>,
    /// How many events were there before, or have been told.
    seen: usize,
}

struct Sets {
    next: usize,
    all: Option<HashMap<usize, Set>>,
}

static SETS: Mutex<Sets> = Mutex::new(Sets { next: 1, all: None });

fn with<T>(work: impl FnOnce(&mut HashMap<usize, Set>) -> T) -> T {
    let mut sets = SETS.lock().unwrap_or_else(PoisonError::into_inner);
    work(sets.all.get_or_insert_with(HashMap::new))
}

/// A new set; its token.
pub fn create() -> usize {
    let mut sets = SETS.lock().unwrap_or_else(PoisonError::into_inner);
    let token = sets.next << 4;
    sets.next += 1;
    let seen = all().len();
    sets.all.get_or_insert_with(HashMap::new).insert(
        token,
        Set {
            gpus: Vec::new(),
            seen,
        },
    );
    token
}

/// Adds a GPU to a set.
pub fn register(token: usize, gpu: usize) -> Code {
    with(|sets| match sets.get_mut(&token) {
        Some(set) => {
            set.gpus.push(gpu);
            nvml::nvmlReturn_enum_NVML_SUCCESS
        }
        None => nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT,
    })
}

/// Ends a set.
pub fn free(token: usize) -> Code {
    match with(|sets| sets.remove(&token)) {
        Some(_) => nvml::nvmlReturn_enum_NVML_SUCCESS,
        None => nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT,
    }
}

/// The next event of one of the set's GPUs.
///
/// # Errors
/// TIMEOUT, or GPU_IS_LOST when one of them is and nothing is left to tell.
pub fn wait(token: usize, limit: Duration) -> Result<Event, Code> {
    let end = Instant::now() + limit;
    // Watched before the file is read, so that nothing falls between.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .map_err(|_| nvml::nvmlReturn_enum_NVML_ERROR_OPERATING_SYSTEM)?;
    if let Some(dir) = state::folder() {
        let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        let _ = inotify::add_watch(&watch, &dir, flags);
    }
    loop {
        if state::is_stale() {
            return Err(nvml::nvmlReturn_enum_NVML_ERROR_LIB_RM_VERSION_MISMATCH);
        }
        let gpus = with(|sets| -> Result<Vec<usize>, Event> {
            let Some(set) = sets.get_mut(&token) else {
                return Ok(Vec::new());
            };
            let new = all();
            while let Some(event) = new.get(set.seen) {
                set.seen += 1;
                if let Event::Xid { gpu, .. } = event
                    && set.gpus.contains(gpu)
                {
                    return Err(*event);
                }
            }
            Ok(set.gpus.clone())
        });
        match gpus {
            Err(event) => return Ok(event),
            Ok(gpus) if gpus.is_empty() => return Err(nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
            Ok(gpus) if gpus.iter().any(|g| state::is_lost(*g)) => {
                return Err(nvml::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST);
            }
            Ok(_) => {}
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(nvml::nvmlReturn_enum_NVML_ERROR_TIMEOUT);
        }
        let spec = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let _ = rustix::event::poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&spec));
        let _ = rustix::io::read(&watch, &mut [0u8; 4096]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_xids_resets_or_nothing() {
        let xid = |gpu, xid, instance| Some(Event::Xid { gpu, xid, instance });
        assert_eq!(parse("3 79"), xid(3, 79, (NONE, NONE)));
        assert_eq!(parse("0 94 2 1"), xid(0, 94, (2, 1)));
        assert_eq!(parse("1 reset"), Some(Event::Reset { gpu: 1 }));
        assert_eq!(parse("1 reattach"), Some(Event::Reattach { gpu: 1 }));
        assert_eq!(parse("reload"), Some(Event::Reload));
        let set = Event::Set {
            gpu: 2,
            key: Key::Temperature,
            value: 95,
        };
        assert_eq!(parse("2 set temperature 95"), Some(set));
        assert_eq!(parse("2 set colour 95"), None);
        assert_eq!(parse("gpu 79"), None);
        assert_eq!(parse(""), None);
    }
}
