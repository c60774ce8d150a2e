//! Which sysctls a pod may set: those of its own namespaces, with values that are one value.

use std::collections::BTreeMap;

use crate::error::SpecError;
use crate::input::{Namespace, SpecInput};

/// Whose namespaces are not the host's.
#[derive(Debug, Clone, Copy, Default)]
pub struct OwnNamespaces {
    /// Network.
    pub network: bool,
    /// IPC.
    pub ipc: bool,
    /// Host and domain name.
    pub uts: bool,
}

/// Checks one sysctl of a pod or container.
///
/// # Errors
/// A name that belongs to no namespace or to one of the host's; characters that could end one
/// setting and begin another (CVE-2022-0811).
pub fn check(name: &str, value: &str, own: OwnNamespaces) -> Result<(), SpecError> {
    let field = "sysctls";
    let bad = |reason| Err(SpecError::invalid(field, name, reason));
    let sound = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if name.is_empty() || !name.chars().all(sound) || name.contains("..") || name.starts_with(['.', '/']) {
        return bad("is not the name of a sysctl");
    }
    if value.chars().any(|c| c == '+' || (c.is_control() && c != '\t')) || value.len() > 4096 {
        return bad("has a value with characters that are not part of one");
    }
    // `net/ipv4/conf/eth0.5/…` and `net.ipv4.conf.eth0/5.…` are the same name.
    let dotted: String = match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => name
            .chars()
            .map(|c| {
                if c == '/' {
                    '.'
                } else if c == '.' {
                    '/'
                } else {
                    c
                }
            })
            .collect(),
        _ => name.to_owned(),
    };
    let part = |part: &str| !matches!(part, "" | "/" | "//");
    if !dotted.split('.').all(part) {
        return bad("is not the name of a sysctl");
    }
    match dotted.as_str() {
        n if n.starts_with("net.") => {
            if own.network {
                Ok(())
            } else {
                bad("belongs to the host's network namespace")
            }
        }
        "kernel.msgmax"
        | "kernel.msgmnb"
        | "kernel.msgmni"
        | "kernel.sem"
        | "kernel.shmall"
        | "kernel.shmmax"
        | "kernel.shmmni"
        | "kernel.shm_rmid_forced"
        | "kernel.shm_next_id"
        | "kernel.msg_next_id"
        | "kernel.sem_next_id" => ipc(own, bad),
        n if n.starts_with("fs.mqueue.") => ipc(own, bad),
        "kernel.domainname" => {
            if own.uts {
                Ok(())
            } else {
                bad("belongs to the host's UTS namespace")
            }
        }
        _ => bad("is not a setting of a pod's own namespaces"),
    }
}

fn ipc(own: OwnNamespaces, bad: impl Fn(&'static str) -> Result<(), SpecError>) -> Result<(), SpecError> {
    if own.ipc {
        Ok(())
    } else {
        bad("belongs to the host's IPC namespace")
    }
}

/// The sysctls of a container's own new namespaces; those of shared ones were set when they were made.
pub(crate) fn of_container(input: &SpecInput) -> Result<BTreeMap<String, String>, SpecError> {
    let ns = &input.namespaces;
    let own = OwnNamespaces {
        network: ns.network != Namespace::Host,
        ipc: ns.ipc != Namespace::Host,
        uts: ns.uts != Namespace::Host,
    };
    let mut kept = BTreeMap::new();
    for (name, value) in &input.sysctls {
        check(name, value, own)?;
        let whose = if name.starts_with("net") {
            &ns.network
        } else if name.ends_with("domainname") {
            &ns.uts
        } else {
            &ns.ipc
        };
        if *whose == Namespace::New {
            kept.insert(name.clone(), value.clone());
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: OwnNamespaces = OwnNamespaces {
        network: true,
        ipc: true,
        uts: true,
    };

    #[test]
    fn sysctls_of_own_namespaces_are_fine() {
        for name in [
            "net.core.somaxconn",
            "net/ipv4/conf/eth0.5/forwarding",
            "kernel.shm_rmid_forced",
            "fs.mqueue.msg_max",
            "kernel.shm_next_id",
            "kernel/msg_next_id",
            "kernel.sem_next_id",
            "kernel.domainname",
        ] {
            check(name, "1", BOTH).unwrap();
        }
        check("net.ipv4.tcp_rmem", "4096\t87380 6291456", BOTH).unwrap();
        check("kernel.sem", "250 32000 100 128", BOTH).unwrap();
    }

    #[test]
    fn sysctls_of_the_hosts_namespaces_are_refused() {
        let none = OwnNamespaces::default();
        assert!(check("net.core.somaxconn", "1", none).is_err());
        assert!(check("kernel.shmmax", "1", none).is_err());
        assert!(check("kernel.domainname", "x", none).is_err());
        for name in [
            "vm.overcommit_memory",
            "kernel.core_pattern",
            "kernel.hostname",
            "fs.file-max",
            "kernel.shm",
        ] {
            assert!(check(name, "1", BOTH).is_err(), "{name}");
        }
    }

    /// CVE-2022-0811.
    #[test]
    fn a_value_that_smuggles_another_setting_is_refused() {
        for value in ["1+kernel.core_pattern=|/evil", "1\nkernel.core_pattern=x", "1\0"] {
            assert!(check("kernel.shm_rmid_forced", value, BOTH).is_err());
        }
        for name in [
            "net+x",
            "net.ipv4 x",
            "net.\n",
            "../x",
            "net/../../kernel/core_pattern",
            "",
            "/net/x",
            "net.",
            "net/",
            "net//x",
            "net/./x",
            "net./.x",
            "net.x.",
        ] {
            assert!(check(name, "1", BOTH).is_err(), "{name}");
        }
    }
}
