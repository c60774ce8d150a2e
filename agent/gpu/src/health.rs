//! Which devices may be handed out. A state machine over what the driver reports and what probes find; pure but for one
//! file, so that neither a restart of the agent nor one of kubelet makes a sick GPU well.
//!
//! ```text
//!            XID that condemns · probe fails · lost
//!  Healthy ────────────────────────────────────────▶ Unhealthy (why, since when)
//!     ▲                                                  │
//!     └── a probe succeeds and the driver says "no action needed" · the machine was booted since ──┘
//! ```
//! A GPU is judged as a whole: its MIG devices share its fate.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::model::Probe;

/// The record's version.
const VERSION: u32 = 1;

/// Which XIDs condemn a GPU where the driver does not say what is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Errors of applications, and reports that need no action: the GPU stays as it is.
    pub harmless: Vec<u64>,
}

/// 13, 31, 43, 68, 69, 92, 94: an application's own; 45: follows another; 63: a row was remapped; 154: a report.
pub const HARMLESS: [u64; 10] = [13, 31, 43, 45, 63, 68, 69, 92, 94, 154];

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            harmless: HARMLESS.to_vec(),
        }
    }
}

impl Policy {
    /// Why an XID condemns its GPU; none when it does not. What the driver says after it decides; unknown XIDs condemn.
    pub fn judge(&self, xid: u64, recovery: Option<u32>) -> Option<String> {
        match recovery {
            Some(0) => None,
            Some(action) => Some(format!("XID {xid}: the driver asks for {}", action_name(action))),
            None if self.harmless.contains(&xid) => None,
            None => Some(format!("XID {xid}")),
        }
    }
}

/// NVML's recovery actions.
fn action_name(action: u32) -> &'static str {
    match action {
        0 => "nothing",
        1 => "a reset of the GPU",
        2 => "a reboot of the node",
        3 => "a drain of peer-to-peer traffic",
        4 => "a drain and a reset",
        _ => "an action that is not known here",
    }
}

/// Why a GPU may not be handed out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unhealthy {
    /// For people.
    pub reason: String,
    /// The XID, when it was one.
    pub xid: Option<u64>,
    /// Seconds since 1970.
    pub since: u64,
}

/// The state of every GPU that is not well; the others are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    version: u32,
    boot_id: String,
    unhealthy: BTreeMap<String, Unhealthy>,
}

impl Health {
    /// Reads the record. One that is not there, of another boot, or cannot be understood is an empty one; the last is told.
    pub fn load(path: &Path, boot_id: &str) -> (Health, Option<String>) {
        let fresh = Health {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            unhealthy: BTreeMap::new(),
        };
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return (fresh, None),
            Err(e) => return (fresh, Some(e.to_string())),
        };
        match serde_json::from_slice::<Health>(&text) {
            Ok(kept) if kept.version != VERSION => {
                (fresh, Some(format!("version {} is not known", kept.version)))
            }
            Ok(kept) if kept.boot_id != boot_id => (fresh, None),
            Ok(kept) => (kept, None),
            Err(e) => (fresh, Some(e.to_string())),
        }
    }

    /// Writes the record, durable before it is seen.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        match path.parent() {
            Some(dir) => fs::File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }

    /// Why the GPU of this UUID may not be handed out; none: it may.
    pub fn of(&self, gpu: &str) -> Option<&Unhealthy> {
        self.unhealthy.get(gpu)
    }

    /// The GPUs that are not well.
    pub fn unhealthy(&self) -> impl Iterator<Item = (&str, &Unhealthy)> {
        self.unhealthy.iter().map(|(uuid, u)| (uuid.as_str(), u))
    }

    /// An XID came; whether that changed anything.
    pub fn xid(&mut self, policy: &Policy, gpu: &str, xid: u64, recovery: Option<u32>, now: u64) -> bool {
        match policy.judge(xid, recovery) {
            Some(reason) => self.condemn(gpu, reason, Some(xid), now),
            None => false,
        }
    }

    /// The GPU can be watched no longer; whether that changed anything.
    pub fn lost(&mut self, gpu: &str, error: &str, now: u64) -> bool {
        self.condemn(gpu, format!("it cannot be watched: {error}"), None, now)
    }

    /// A probe's result; whether that changed anything.
    pub fn probed(&mut self, gpu: &str, probe: &Probe, now: u64) -> bool {
        match probe {
            Probe {
                error: Some(error), ..
            } => self.condemn(gpu, format!("it does not answer: {error}"), None, now),
            Probe {
                remap_failed: true, ..
            } => self.condemn(gpu, "a row of its memory could not be remapped".into(), None, now),
            Probe {
                recovery: Some(action @ 1..),
                ..
            } => self.condemn(
                gpu,
                format!("the driver asks for {}", action_name(*action)),
                None,
                now,
            ),
            Probe {
                recovery: Some(0), ..
            } => self.unhealthy.remove(gpu).is_some(),
            // The driver does not say whether it is well again: what an XID said holds until the next boot.
            Probe { recovery: None, .. } => match self.unhealthy.get(gpu) {
                Some(u) if u.xid.is_none() => self.unhealthy.remove(gpu).is_some(),
                _ => false,
            },
        }
    }

    /// The first reason stays: what follows is its consequence. An XID says more than a symptom does.
    fn condemn(&mut self, gpu: &str, reason: String, xid: Option<u64>, now: u64) -> bool {
        match self.unhealthy.get_mut(gpu) {
            Some(old) if old.xid.is_some() || xid.is_none() => false,
            Some(old) => {
                (old.reason, old.xid) = (reason, xid);
                true
            }
            None => {
                let since = now;
                self.unhealthy
                    .insert(gpu.to_owned(), Unhealthy { reason, xid, since });
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        Health::load(Path::new("/no/such/file"), "boot-1").0
    }

    #[test]
    fn what_the_driver_says_decides_and_the_catalogue_only_where_it_is_silent() {
        let p = Policy::default();
        assert_eq!(p.judge(31, None), None);
        assert_eq!(p.judge(154, None), None);
        assert_eq!(p.judge(79, None).as_deref(), Some("XID 79"));
        assert_eq!(
            p.judge(4711, None).as_deref(),
            Some("XID 4711"),
            "one that nobody knows"
        );
        assert_eq!(p.judge(79, Some(0)), None);
        assert!(p.judge(31, Some(1)).is_some_and(|r| r.contains("reset")));
        for xid in [
            46, 48, 62, 64, 74, 79, 95, 109, 110, 119, 120, 136, 140, 143, 150, 155, 156, 158,
        ] {
            assert!(p.judge(xid, None).is_some(), "{xid}");
        }
    }

    #[test]
    fn the_first_reason_stays_but_an_xid_is_better_than_a_symptom() {
        let (mut h, p) = (health(), Policy::default());
        assert!(h.lost("GPU-1", "gone", 5));
        assert!(h.xid(&p, "GPU-1", 79, None, 6));
        assert!(!h.xid(&p, "GPU-1", 48, None, 7));
        assert!(!h.xid(&p, "GPU-2", 31, None, 7));
        let u = h.of("GPU-1").expect("unhealthy");
        assert_eq!((u.xid, u.since), (Some(79), 5));
        assert!(h.of("GPU-2").is_none());
    }

    #[test]
    fn a_gpu_is_well_again_when_the_driver_says_so_and_not_before() {
        let (mut h, p) = (health(), Policy::default());
        let probe = |error: Option<&str>, recovery, remap_failed| Probe {
            error: error.map(str::to_owned),
            recovery,
            remap_failed,
        };
        h.xid(&p, "GPU-1", 79, None, 1);
        assert!(!h.probed("GPU-1", &probe(Some("GPU is lost"), None, false), 2));
        assert!(
            !h.probed("GPU-1", &probe(None, None, false), 3),
            "an old driver tells nothing"
        );
        assert!(!h.probed("GPU-1", &probe(None, Some(1), false), 4));
        assert!(h.probed("GPU-1", &probe(None, Some(0), false), 5));
        assert!(h.of("GPU-1").is_none());
        assert!(
            h.probed("GPU-1", &probe(None, Some(0), true), 6),
            "a failed remap outweighs it"
        );
        // What only a probe found, a probe takes back.
        h.probed("GPU-2", &probe(Some("timeout"), None, false), 7);
        assert!(h.probed("GPU-2", &probe(None, None, false), 8) && h.of("GPU-2").is_none());
    }

    #[test]
    fn the_record_outlives_the_agent_and_not_the_boot() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("health.json");
        let (mut h, none) = Health::load(&path, "boot-1");
        assert!(none.is_none());
        h.xid(&Policy::default(), "GPU-1", 79, None, 1);
        h.save(&path).expect("saved");
        assert_eq!(Health::load(&path, "boot-1").0, h);
        assert!(Health::load(&path, "boot-2").0.of("GPU-1").is_none());
        fs::write(&path, "{").expect("written");
        let (h, told) = Health::load(&path, "boot-1");
        assert!(told.is_some() && h.of("GPU-1").is_none());
    }
}
