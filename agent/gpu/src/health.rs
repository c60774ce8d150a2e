//! Which devices may be handed out. A state machine over what the driver reports and what probes find; pure but for one
//! file, so that neither a restart of the agent nor one of kubelet makes a sick GPU well.
//!
//! ```text
//!            XID that condemns · probe fails · lost · a sign of illness
//!  Healthy ────────────────────────────────────────▶ Unhealthy (why, since when)
//!     ▲                                                  │
//!     └── a probe succeeds and the driver says "no action needed" · the machine was booted since ──┘
//! ```
//! What condemned for a [`Sign`] is over when several probes in a row have not found one. Signs that only warn are kept beside,
//! and change nothing. That a GPU does not answer is kept beside what else is wrong with it: an answer ends the one only. A GPU is judged as a whole: its MIG devices share its fate.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::model::Probe;
use crate::signs::{Action, Before, Found, LinkErrors, Rules, Sign};

/// The record's version.
const VERSION: u32 = 1;

/// What condemns a GPU where the driver does not say what is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// XIDs of applications' errors, and reports that need no action: the GPU stays as it is.
    pub harmless: Vec<u64>,
    /// What a look finds.
    pub rules: Rules,
}

/// 13, 31, 43, 68, 69, 92, 94: an application's own; 45: follows another; 63: a row was remapped; 154: a report.
pub const HARMLESS: [u64; 10] = [13, 31, 43, 45, 63, 68, 69, 92, 94, 154];

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            harmless: HARMLESS.to_vec(),
            rules: Rules::default(),
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

/// What an XID makes of work, with what the driver says after it: "drain" means that work may end before the GPU is reset.
fn work_after(recovery: Option<u32>) -> Work {
    match recovery {
        Some(3 | 4) => Work::GoesOn,
        _ => Work::Over,
    }
}

/// What becomes of the work that a GPU has when it falls sick.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// It may come to its end.
    #[default]
    GoesOn,
    /// The GPU does not answer; the work is over if that stays so.
    Silent,
    /// It is over.
    Over,
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
    /// The sign, when it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sign: Option<Sign>,
    /// What that makes of whoever has it.
    #[serde(default)]
    pub work: Work,
}

/// What the looks since the agent's start have found of a GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Seen {
    link_errors: LinkErrors,
    /// How many looks in a row have found nothing that condemns.
    clean: u32,
    signs: Vec<Found>,
}

/// The state of every GPU that is not well; the others are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    version: u32,
    boot_id: String,
    /// What is wrong with them, but that they do not answer.
    unhealthy: BTreeMap<String, Unhealthy>,
    /// Those that do not answer and whose work is not over anyway, with what else is wrong.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    silent: BTreeMap<String, Unhealthy>,
    /// Most NVLinks that were up in this boot, of GPUs that have any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    links: BTreeMap<String, u32>,
    #[serde(skip)]
    seen: BTreeMap<String, Seen>,
}

impl Health {
    /// Reads the record. One that is not there, of another boot, or cannot be understood is an empty one; the last is told.
    pub fn load(path: &Path, boot_id: &str) -> (Health, Option<String>) {
        let fresh = Health {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            ..Health::default()
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
        self.silent.get(gpu).or_else(|| self.unhealthy.get(gpu))
    }

    /// The GPUs that are not well.
    pub fn unhealthy(&self) -> impl Iterator<Item = (&str, &Unhealthy)> {
        let answer = self
            .unhealthy
            .iter()
            .filter(|(g, _)| !self.silent.contains_key(*g));
        answer.chain(&self.silent).map(|(uuid, u)| (uuid.as_str(), u))
    }

    /// An XID came; whether that changed anything.
    pub fn xid(&mut self, policy: &Policy, gpu: &str, xid: u64, recovery: Option<u32>, now: u64) -> bool {
        match policy.judge(xid, recovery) {
            Some(reason) => self.condemn(gpu, reason, Some(xid), None, work_after(recovery), now),
            None => false,
        }
    }

    /// The GPU can be watched no longer; whether that changed anything.
    pub fn lost(&mut self, gpu: &str, error: &str, now: u64) -> bool {
        self.falls_silent(gpu, format!("it cannot be watched: {error}"), now)
    }

    /// The signs that the last look found of a GPU, those that only warn too.
    pub fn signs(&self, gpu: &str) -> &[Found] {
        self.seen.get(gpu).map_or(&[], |s| &s.signs)
    }

    /// A probe's result; whether that changed anything that is to be remembered.
    pub fn probed(&mut self, policy: &Policy, gpu: &str, probe: &Probe, now: u64) -> bool {
        if let Some(error) = &probe.error {
            // Nothing was read: what is known of signs stays.
            self.seen.entry(gpu.to_owned()).or_default().clean = 0;
            return self.falls_silent(gpu, format!("it does not answer: {error}"), now);
        }
        // It answers: whatever else is wrong with it, that is not.
        let answers = self.silent.remove(gpu).is_some();
        let more_links = self.links_of(gpu, probe);
        let before = Before {
            links: self.links.get(gpu).copied().unwrap_or(0),
            link_errors: self.seen.get(gpu).map(|s| s.link_errors).unwrap_or_default(),
        };
        let told = probe.recovery == Some(0);
        let signs = policy.rules.found(&probe.reading, before, told);
        let worst = signs.iter().find(|f| f.action == Action::Condemn).cloned();
        let seen = self.seen.entry(gpu.to_owned()).or_default();
        seen.link_errors = probe.reading.link_errors;
        seen.signs = signs;
        let condemned = match (probe.recovery, worst) {
            (Some(action @ 1..), _) => {
                let reason = format!("the driver asks for {}", action_name(action));
                Some((reason, None, work_after(Some(action))))
            }
            (_, Some(Found { sign, text, .. })) => Some((text, Some(sign), Work::GoesOn)),
            (None | Some(0), None) => None,
        };
        if let Some((reason, sign, work)) = condemned {
            seen.clean = 0;
            return self.condemn(gpu, reason, None, sign, work, now) || more_links || answers;
        }
        seen.clean = seen.clean.saturating_add(1);
        let clean = seen.clean;
        let over = match self.unhealthy.get(gpu) {
            None => false,
            // The driver does not say whether it is well again: what an XID said holds until the next boot.
            Some(u) if u.xid.is_some() => told,
            Some(u) => u.sign.is_none() || clean >= policy.rules.well_after,
        };
        if over {
            self.unhealthy.remove(gpu);
        }
        over || more_links || answers
    }

    /// Remembers how many links a GPU has had up; whether they are more than before.
    fn links_of(&mut self, gpu: &str, probe: &Probe) -> bool {
        let up = probe.reading.links.unwrap_or(0);
        if up <= self.links.get(gpu).copied().unwrap_or(0) {
            return false;
        }
        self.links.insert(gpu.to_owned(), up);
        true
    }

    /// It does not answer; whether that changed anything. Where work on it is over, that says nothing more.
    fn falls_silent(&mut self, gpu: &str, reason: String, now: u64) -> bool {
        if self.of(gpu).is_some_and(|u| u.work >= Work::Silent) {
            return false;
        }
        let besides = self.unhealthy.get(gpu);
        let silent = Unhealthy {
            reason: besides.map_or(reason.clone(), |u| format!("{}; {reason}", u.reason)),
            xid: besides.and_then(|u| u.xid),
            since: besides.map_or(now, |u| u.since),
            // What a look finds; it cannot be looked at.
            sign: None,
            work: Work::Silent,
        };
        self.silent.insert(gpu.to_owned(), silent);
        true
    }

    /// The first reason stays: what follows is its consequence. An XID says more than a symptom does, and of two of a kind the
    /// one that leaves less of the work; a symptom that leaves less of it than an XID is told beside it.
    fn condemn(
        &mut self,
        gpu: &str,
        reason: String,
        xid: Option<u64>,
        sign: Option<Sign>,
        work: Work,
        now: u64,
    ) -> bool {
        let since = self.of(gpu).map_or(now, |u| u.since);
        match self.unhealthy.get_mut(gpu) {
            Some(old) if old.xid.is_some() >= xid.is_some() && work <= old.work => return false,
            Some(old) if old.xid.is_some() && xid.is_none() => {
                old.reason = format!("{}; {reason}", old.reason);
                old.work = work;
            }
            Some(old) => {
                (old.reason, old.xid, old.sign) = (reason, xid, sign);
                old.work = work.max(old.work);
            }
            None => {
                let unhealthy = Unhealthy {
                    reason,
                    xid,
                    since,
                    sign,
                    work,
                };
                self.unhealthy.insert(gpu.to_owned(), unhealthy);
            }
        }
        // Of one that is silent, and still is.
        if let Some(silent) = self.silent.remove(gpu) {
            self.falls_silent(gpu, silent.reason, now);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Rows;
    use crate::signs::Reading;

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

    fn answers(recovery: Option<u32>, reading: Reading) -> Probe {
        Probe {
            error: None,
            recovery,
            reading,
        }
    }

    fn silent(error: &str) -> Probe {
        Probe {
            error: Some(error.to_owned()),
            ..Probe::default()
        }
    }

    #[test]
    fn a_gpu_is_well_again_when_the_driver_says_so_and_not_before() {
        let (mut h, p) = (health(), Policy::default());
        let well = Reading::default;
        h.xid(&p, "GPU-1", 79, None, 1);
        assert!(!h.probed(&p, "GPU-1", &silent("GPU is lost"), 2));
        assert!(
            !h.probed(&p, "GPU-1", &answers(None, well()), 3),
            "an old driver tells nothing"
        );
        assert!(!h.probed(&p, "GPU-1", &answers(Some(1), well()), 4));
        assert!(h.probed(&p, "GPU-1", &answers(Some(0), well()), 5));
        assert!(h.of("GPU-1").is_none());
        let failed = Reading {
            rows: Some(Rows {
                failed: true,
                ..Rows::default()
            }),
            ..well()
        };
        assert!(
            h.probed(&p, "GPU-1", &answers(Some(0), failed), 6),
            "a failed remap outweighs it"
        );
        // What only a probe found, a probe takes back.
        h.probed(&p, "GPU-2", &silent("timeout"), 7);
        assert!(h.probed(&p, "GPU-2", &answers(None, well()), 8) && h.of("GPU-2").is_none());
    }

    #[test]
    fn what_condemned_for_a_sign_is_over_when_three_looks_have_not_found_it() {
        let (mut h, p) = (health(), Policy::default());
        let errors = |n| Reading {
            ecc_volatile: Some(n),
            ..Reading::default()
        };
        assert!(h.probed(&p, "GPU-1", &answers(None, errors(2)), 1));
        let sick = h.of("GPU-1").expect("unhealthy").clone();
        assert_eq!((sick.sign, sick.since), (Some(Sign::EccVolatile), 1));
        assert!(sick.reason.starts_with("2 memory errors"), "{}", sick.reason);
        for (n, clean) in [(0, 1), (0, 2), (1, 0), (0, 1), (0, 2)] {
            assert!(!h.probed(&p, "GPU-1", &answers(None, errors(n)), 2), "{clean}");
        }
        assert!(h.probed(&p, "GPU-1", &answers(None, errors(0)), 3));
        assert!(h.of("GPU-1").is_none());
        // An XID beside it says more, and holds longer.
        h.probed(&p, "GPU-1", &answers(None, errors(1)), 4);
        assert!(h.xid(&p, "GPU-1", 48, None, 5));
        for _ in 0..9 {
            assert!(!h.probed(&p, "GPU-1", &answers(None, errors(0)), 6));
        }
        assert!(h.probed(&p, "GPU-1", &answers(Some(0), errors(0)), 7));
    }

    #[test]
    fn signs_that_warn_are_told_and_condemn_nothing() {
        let mut h = health();
        let hot = Reading {
            temperature: Some(90),
            slowdown_at: Some(87),
            shutdown_at: Some(92),
            ..Reading::default()
        };
        let mut p = Policy::default();
        assert!(!h.probed(&p, "GPU-1", &answers(Some(0), hot.clone()), 1));
        assert_eq!(h.signs("GPU-1").len(), 1);
        assert!(h.of("GPU-1").is_none());
        p.rules.actions.insert(Sign::Slowdown, Action::Condemn);
        assert!(h.probed(&p, "GPU-1", &answers(Some(0), hot), 2));
        h.probed(&p, "GPU-1", &answers(Some(0), Reading::default()), 3);
        assert!(h.signs("GPU-1").is_empty() && h.of("GPU-1").is_some(), "not yet");
    }

    #[test]
    fn links_that_were_up_in_this_boot_are_missed_after_a_restart_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("health.json");
        let (mut h, mut p) = (Health::load(&path, "boot-1").0, Policy::default());
        p.rules.actions.insert(Sign::LinksDown, Action::Condemn);
        let links = |n| Reading {
            links: Some(n),
            ..Reading::default()
        };
        assert!(h.probed(&p, "GPU-1", &answers(Some(0), links(12)), 1));
        h.save(&path).expect("saved");
        let mut h = Health::load(&path, "boot-1").0;
        assert!(h.probed(&p, "GPU-1", &answers(Some(0), links(11)), 2));
        assert_eq!(
            h.of("GPU-1").map(|u| u.reason.as_str()),
            Some("1 of its 12 NVLinks are down")
        );
        // MIG has no links, and is none of the signs.
        assert!(!h.probed(&p, "GPU-2", &answers(Some(0), Reading::default()), 3));
        h.save(&path).expect("saved");
        let mut h = Health::load(&path, "boot-2").0;
        assert!(h.probed(&p, "GPU-1", &answers(Some(0), links(11)), 2) && h.of("GPU-1").is_none());
    }

    #[test]
    fn what_becomes_of_the_work_is_the_worst_that_was_heard_and_a_drain_lets_it_end() {
        let (mut h, p) = (health(), Policy::default());
        let work = |h: &Health| h.of("GPU-1").map(|u| (u.work, u.xid));
        h.xid(&p, "GPU-1", 63, Some(4), 1);
        assert_eq!(work(&h), Some((Work::GoesOn, Some(63))));
        assert!(h.probed(&p, "GPU-1", &silent("timeout"), 2), "it may not end");
        assert_eq!(work(&h), Some((Work::Silent, Some(63))));
        assert!(h.xid(&p, "GPU-1", 79, None, 3));
        assert_eq!(work(&h), Some((Work::Over, Some(79))));
        assert!(!h.xid(&p, "GPU-1", 63, Some(4), 4));
        let mut h = health();
        h.probed(&p, "GPU-1", &silent("timeout"), 1);
        assert_eq!(work(&h), Some((Work::Silent, None)));
        // It answers, and asks for a reset.
        assert!(h.probed(&p, "GPU-1", &answers(Some(1), Reading::default()), 2));
        assert_eq!(work(&h), Some((Work::Over, None)));
        assert!(h.of("GPU-1").is_some_and(|u| u.reason.contains("reset")));
        assert!(!h.probed(&p, "GPU-1", &silent("timeout"), 3));
        assert!(h.probed(&p, "GPU-1", &answers(Some(0), Reading::default()), 4));
        assert_eq!(work(&h), None);
    }

    #[test]
    fn an_xid_that_lets_work_end_is_outweighed_by_what_is_worse_and_stays_the_reason() {
        let p = Policy::default();
        let well = |action| answers(action, Reading::default());
        let mut h = health();
        let work = |h: &Health| h.of("GPU-1").map(|u| (u.work, u.xid, u.since));
        assert!(h.xid(&p, "GPU-1", 63, Some(4), 1));
        for t in [2, 4] {
            assert!(h.probed(&p, "GPU-1", &silent("GPU is lost"), t));
            assert_eq!(work(&h), Some((Work::Silent, Some(63), 1)));
            let reason = h.of("GPU-1").map(|u| u.reason.clone()).unwrap_or_default();
            assert!(
                reason.starts_with("XID 63") && reason.ends_with("GPU is lost"),
                "{reason}"
            );
            assert!(!h.probed(&p, "GPU-1", &silent("timeout"), t));
            assert_eq!(h.unhealthy().count(), 1);
            // It answers again; an old driver does not say that it is well.
            assert!(h.probed(&p, "GPU-1", &well(None), t + 1));
            assert_eq!(work(&h), Some((Work::GoesOn, Some(63), 1)));
        }
        assert!(h.probed(&p, "GPU-1", &well(Some(1)), 6));
        assert_eq!(work(&h), Some((Work::Over, Some(63), 1)));
        assert!(!h.probed(&p, "GPU-1", &silent("GPU is lost"), 7), "it is over");
        assert!(!h.probed(&p, "GPU-1", &well(Some(4)), 8), "and stays so");
        assert!(h.probed(&p, "GPU-1", &well(Some(0)), 9) && h.of("GPU-1").is_none());
        // One that is heard of a GPU that is silent already holds when it answers.
        assert!(h.probed(&p, "GPU-1", &silent("timeout"), 10));
        assert!(h.xid(&p, "GPU-1", 63, Some(4), 11));
        assert_eq!(work(&h), Some((Work::Silent, Some(63), 10)));
        assert!(h.probed(&p, "GPU-1", &well(None), 12));
        assert_eq!(work(&h), Some((Work::GoesOn, Some(63), 10)));
    }

    #[test]
    fn a_look_that_is_not_answered_does_not_take_back_what_a_sign_says() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("health.json");
        let (mut h, p) = (health(), Policy::default());
        let errors = |n| Reading {
            ecc_volatile: Some(n),
            ..Reading::default()
        };
        assert!(h.probed(&p, "GPU-1", &answers(None, errors(2)), 1));
        assert!(h.probed(&p, "GPU-1", &silent("timeout"), 2));
        let sick = |h: &Health| h.of("GPU-1").map(|u| (u.sign, u.work));
        assert_eq!(sick(&h), Some((None, Work::Silent)));
        h.save(&path).expect("saved");
        let mut h = Health::load(&path, "boot-1").0;
        assert!(h.probed(&p, "GPU-1", &answers(None, errors(0)), 3), "it answers");
        assert_eq!(sick(&h), Some((Some(Sign::EccVolatile), Work::GoesOn)));
        assert!(!h.probed(&p, "GPU-1", &answers(None, errors(0)), 4));
        assert!(h.probed(&p, "GPU-1", &answers(None, errors(0)), 5));
        assert_eq!(sick(&h), None);
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
