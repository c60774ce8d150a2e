//! Capability names, and which of them a container gets: defaults, add, drop, `ALL`, ambient,
//! and never more than this process has itself.

use std::collections::BTreeSet;

use crate::error::SpecError;
use crate::host::HostFacts;
use crate::input::{CapabilityRequest, CapabilitySet};

/// Every capability, in the order of its number (include/uapi/linux/capability.h).
pub const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a container has unless it asks otherwise: no MKNOD, no NET_RAW, no SYS_CHROOT.
pub const DEFAULT: [&str; 9] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_KILL",
];

/// What a RUN step has: Docker's fourteen, since Dockerfiles are written against them.
pub const BUILD: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// The sets of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessCapabilities {
    /// Bounding, permitted and effective.
    pub held: CapabilitySet,
    /// Ambient, and therefore inheritable. Otherwise the inheritable set stays empty: a file
    /// capability must not raise what a non-root process was not given (CVE-2022-24769's class).
    pub ambient: CapabilitySet,
    /// Capabilities that were asked for by name and that this process does not have to give.
    pub missing: Vec<String>,
}

/// The set with these bits, as /proc/self/status writes them.
pub(crate) fn from_mask(mask: u64) -> CapabilitySet {
    let bit = |i: usize| mask >> i & 1 == 1;
    ALL.iter()
        .enumerate()
        .filter(|(i, _)| bit(*i))
        .map(|(_, name)| (*name).to_owned())
        .collect()
}

/// Spells a capability as `CAP_NAME`; accepts `net_admin`, `NET_ADMIN`, `CAP_NET_ADMIN`.
///
/// # Errors
/// A name that is none.
pub fn parse(name: &str) -> Result<&'static str, SpecError> {
    let upper = name.trim().to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    ALL.iter()
        .find(|c| &c["CAP_".len()..] == bare)
        .copied()
        .ok_or_else(|| SpecError::invalid("capabilities", name, "is not a capability"))
}

fn is_all(name: &str) -> bool {
    name.trim().eq_ignore_ascii_case("ALL") || name.trim().eq_ignore_ascii_case("CAP_ALL")
}

fn parse_all(names: &[String]) -> Result<BTreeSet<&'static str>, SpecError> {
    names.iter().filter(|n| !is_all(n)).map(|n| parse(n)).collect()
}

/// Decides the sets of a container's process.
///
/// The order is Kubernetes': defaults; `ALL` added; `ALL` dropped; names added; names dropped. So
/// dropping ALL and adding one leaves that one, and a name both added and dropped is dropped.
///
/// # Errors
/// An unknown name, or one asked as ambient and dropped by name.
pub fn resolve(
    request: &CapabilityRequest,
    defaults: Option<&[String]>,
    privileged: bool,
    host: &HostFacts,
) -> Result<ProcessCapabilities, SpecError> {
    let add = parse_all(&request.add)?;
    let drop = parse_all(&request.drop)?;
    let mut ambient = parse_all(&request.ambient)?;
    if request.ambient.iter().any(|n| is_all(n)) {
        ambient.extend(ALL);
    }

    let mut held: BTreeSet<&'static str> = match defaults {
        _ if privileged => ALL.into(),
        Some(names) => parse_all(names)?,
        None => DEFAULT.into(),
    };
    let mut named = add.clone();
    if !privileged {
        if request.add.iter().any(|n| is_all(n)) {
            held.extend(ALL);
        }
        if request.drop.iter().any(|n| is_all(n)) {
            held.clear();
        }
        held.extend(&add);
        held.retain(|c| !drop.contains(c));
        named.retain(|c| !drop.contains(c));
        if let Some(c) = parse_all(&request.ambient)?.intersection(&drop).next() {
            return Err(SpecError::invalid(
                "capabilities",
                *c,
                "is both dropped and asked as ambient",
            ));
        }
        ambient.retain(|c| !drop.contains(c));
        held.extend(&ambient);
    }

    let own = |c: &&&'static str| host.capabilities.contains(**c);
    Ok(ProcessCapabilities {
        missing: named
            .iter()
            .filter(|c| !own(c))
            .map(|c| (*c).to_owned())
            .collect(),
        held: held.iter().filter(own).map(|c| (*c).to_owned()).collect(),
        ambient: ambient.iter().filter(own).map(|c| (*c).to_owned()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(add: &[&str], drop: &[&str], ambient: &[&str]) -> CapabilityRequest {
        let own = |l: &[&str]| l.iter().map(|s| (*s).to_owned()).collect();
        CapabilityRequest {
            add: own(add),
            drop: own(drop),
            ambient: own(ambient),
        }
    }

    fn held(add: &[&str], drop: &[&str]) -> Vec<String> {
        let got = resolve(&request(add, drop, &[]), None, false, &HostFacts::default()).unwrap();
        assert!(got.ambient.is_empty());
        got.held.into_iter().collect()
    }

    #[test]
    fn nothing_asked_gives_the_nine_defaults() {
        let mut expected: Vec<_> = DEFAULT.iter().map(|s| (*s).to_owned()).collect();
        expected.sort();
        assert_eq!(held(&[], &[]), expected);
    }

    #[test]
    fn dropping_all_and_adding_one_leaves_that_one() {
        assert_eq!(held(&["NET_BIND_SERVICE"], &["ALL"]), ["CAP_NET_BIND_SERVICE"]);
        assert_eq!(held(&["net_admin"], &["all"]), ["CAP_NET_ADMIN"]);
    }

    #[test]
    fn adding_all_gives_everything_but_what_is_dropped_by_name() {
        let got = held(&["ALL"], &["CAP_SYS_ADMIN"]);
        assert_eq!(got.len(), ALL.len() - 1);
        assert!(!got.contains(&"CAP_SYS_ADMIN".to_owned()));
    }

    #[test]
    fn adding_and_dropping_all_leaves_nothing() {
        assert!(held(&["ALL"], &["ALL"]).is_empty());
    }

    #[test]
    fn a_name_both_added_and_dropped_is_dropped() {
        assert!(!held(&["SYS_TIME"], &["SYS_TIME"]).contains(&"CAP_SYS_TIME".to_owned()));
    }

    #[test]
    fn privileged_is_what_this_process_has_whatever_is_dropped() {
        let host = HostFacts {
            capabilities: from_mask(0b1011),
            ..HostFacts::default()
        };
        let got = resolve(&request(&[], &["ALL"], &[]), None, true, &host).unwrap();
        assert_eq!(got.held, host.capabilities);
        assert!(got.missing.is_empty());
    }

    #[test]
    fn what_this_process_lacks_is_left_out_and_told_when_it_was_named() {
        let mut host = HostFacts::default();
        host.capabilities.remove("CAP_SYS_RESOURCE");
        host.capabilities.remove("CAP_KILL");
        let got = resolve(&request(&["SYS_RESOURCE"], &[], &[]), None, false, &host).unwrap();
        assert_eq!(got.missing, ["CAP_SYS_RESOURCE"]);
        assert!(!got.held.contains("CAP_SYS_RESOURCE") && !got.held.contains("CAP_KILL"));
    }

    #[test]
    fn ambient_ones_are_held_too_and_cannot_be_dropped_ones() {
        let host = HostFacts::default();
        let got = resolve(&request(&[], &["ALL"], &["NET_RAW"]), None, false, &host).unwrap();
        assert!(got.held.contains("CAP_NET_RAW") && got.ambient.contains("CAP_NET_RAW"));
        assert!(resolve(&request(&[], &["NET_RAW"], &["NET_RAW"]), None, false, &host).is_err());
    }

    #[test]
    fn an_unknown_name_is_refused() {
        let err = resolve(&request(&["FLY"], &[], &[]), None, false, &HostFacts::default()).unwrap_err();
        assert_eq!(err.to_string(), "capabilities: \"FLY\" is not a capability");
    }
}
