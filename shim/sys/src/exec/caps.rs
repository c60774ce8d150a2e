//! Capabilities and resource limits: names to numbers, and the calls that set them. Async-signal-safe where it sets.

use super::plan::{Capabilities, ExecError, Rlimit};
use crate::fork::{Sys, cvt};
use rustix::io::Errno;

/// In the order of their numbers (include/uapi/linux/capability.h).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities as the kernel counts them.
pub(crate) type Bits = u64;

fn bit_of(name: &str) -> Option<Bits> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|n| *n == bare).map(|n| 1 << n)
}

fn bits_of(names: &[String]) -> Result<Bits, ExecError> {
    names.iter().try_fold(0, |bits, name| match bit_of(name) {
        Some(bit) => Ok(bits | bit),
        None => Err(ExecError::Invalid {
            what: "a capability",
            reason: format!("{name} is not known"),
        }),
    })
}

/// All five sets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CapSets {
    pub(crate) bounding: Bits,
    pub(crate) effective: Bits,
    pub(crate) permitted: Bits,
    pub(crate) inheritable: Bits,
    pub(crate) ambient: Bits,
}

impl CapSets {
    pub(crate) fn parse(caps: &Capabilities) -> Result<CapSets, ExecError> {
        Ok(CapSets {
            bounding: bits_of(&caps.bounding)?,
            effective: bits_of(&caps.effective)?,
            permitted: bits_of(&caps.permitted)?,
            inheritable: bits_of(&caps.inheritable)?,
            ambient: bits_of(&caps.ambient)?,
        })
    }

    /// Takes everything else out of the bounding set. Needs CAP_SETPCAP.
    pub(crate) fn drop_bounding(&self) -> Sys<()> {
        for n in 0..64u64 {
            // SAFETY: prctl with numbers touches no memory.
            let has = unsafe { libc::prctl(libc::PR_CAPBSET_READ, n, 0, 0, 0) };
            if has < 0 {
                break; // this kernel has no capability of this number
            }
            if has == 1 && self.bounding & 1 << n == 0 {
                // SAFETY: as above.
                cvt(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, n, 0, 0, 0) }.into())?;
            }
        }
        Ok(())
    }

    /// Sets the other four.
    pub(crate) fn set(&self) -> Sys<()> {
        capset(self.effective, self.permitted, self.inheritable)?;
        // SAFETY: prctl with numbers touches no memory.
        cvt(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())?;
        for n in (0..64u64).filter(|n| self.ambient & 1 << n != 0) {
            // SAFETY: as above.
            cvt(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, n, 0, 0) }.into())?;
        }
        Ok(())
    }
}

/// capset(2), version 3: two halves of 32 bits.
pub(crate) fn capset(effective: Bits, permitted: Bits, inheritable: Bits) -> Sys<()> {
    let header: [u32; 2] = [0x2008_0522, 0];
    let half = |shift: u32| [effective, permitted, inheritable].map(|set| (set >> shift) as u32);
    let data: [[u32; 3]; 2] = [half(0), half(32)];
    // SAFETY: header and data are live and have the layout of version 3.
    cvt(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// The permitted set of the calling process.
pub(crate) fn permitted() -> Sys<Bits> {
    let header: [u32; 2] = [0x2008_0522, 0];
    let mut data = [[0u32; 3]; 2];
    // SAFETY: header and data are live and have the layout of version 3.
    cvt(unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) })?;
    Ok(u64::from(data[0][1]) | u64::from(data[1][1]) << 32)
}

/// How many descriptors a program may have unless it asks for more. Programs that look at each possible one, or use
/// select(2), break with more; which is why ours raise the limit for themselves alone.
const USUAL_DESCRIPTORS: u64 = 1024;

/// Takes the soft limit of descriptors back to the usual. Async-signal-safe.
pub(crate) fn usual_descriptors() -> Sys<()> {
    let [_, hard] = DESCRIPTORS.now()?;
    DESCRIPTORS.set_to([USUAL_DESCRIPTORS.min(hard), hard])
}

/// Takes a child's soft limit of descriptors back to the usual: that of a program which was started in the ordinary way, and has
/// not yet been given what it waits for. One that has ended has no limits.
pub fn give_usual_descriptors(pid: u32) {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(USUAL_DESCRIPTORS.min(maximum.unwrap_or(u64::MAX)));
    // Refused (a helper of another user's): it has what we have, as before.
    let _ = prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum });
}

/// Lets this process have as many descriptors as it may allow itself. A container's processes get the usual number again, and so
/// does what [`crate::process::launch`] starts.
///
/// # Errors
/// What `prlimit(2)` says.
pub fn raise_descriptors() -> std::io::Result<()> {
    let raised = DESCRIPTORS
        .now()
        .and_then(|[_, hard]| DESCRIPTORS.set_to([hard, hard]));
    raised.map_err(crate::error::failed(|| {
        "raise the limit of descriptors".to_string()
    }))
}

/// Only its number counts.
const DESCRIPTORS: Limit = Limit {
    resource: 7, // RLIMIT_NOFILE
    soft: 0,
    hard: 0,
};

/// A limit ready to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    resource: u32,
    soft: u64,
    hard: u64,
}

impl Limit {
    pub(crate) fn parse(limit: &Rlimit) -> Result<Limit, ExecError> {
        /// In the order of their numbers on Linux (asm-generic/resource.h).
        const KINDS: [&str; 16] = [
            "CPU",
            "FSIZE",
            "DATA",
            "STACK",
            "CORE",
            "RSS",
            "NPROC",
            "NOFILE",
            "MEMLOCK",
            "AS",
            "LOCKS",
            "SIGPENDING",
            "MSGQUEUE",
            "NICE",
            "RTPRIO",
            "RTTIME",
        ];
        let invalid = |reason| ExecError::Invalid {
            what: "a resource limit",
            reason,
        };
        let bare = limit.kind.strip_prefix("RLIMIT_").unwrap_or(&limit.kind);
        let resource = KINDS.iter().position(|k| *k == bare);
        let resource = resource.ok_or_else(|| invalid(format!("{} is not known", limit.kind)))?;
        if limit.soft > limit.hard {
            return Err(invalid(format!(
                "{}: {} is above {}",
                limit.kind, limit.soft, limit.hard
            )));
        }
        Ok(Limit {
            resource: resource as u32,
            soft: limit.soft,
            hard: limit.hard,
        })
    }

    /// Sets it. A hard limit that may not be raised (CAP_SYS_RESOURCE) stays where it is, for init as for exec.
    pub(crate) fn set(&self) -> Sys<()> {
        match self.set_to([self.soft, self.hard]) {
            Err(Errno::PERM) => {
                let [_, hard] = self.now()?;
                self.set_to([self.soft.min(hard), self.hard.min(hard)])
            }
            other => other,
        }
    }

    /// Raises the hard limit to what is wanted, if it is lower; false when that is forbidden.
    pub(crate) fn raise(&self) -> bool {
        match self.now() {
            Ok([soft, hard]) if hard < self.hard => self.set_to([soft, self.hard]).is_ok(),
            _ => true,
        }
    }

    fn set_to(&self, new: [u64; 2]) -> Sys<()> {
        let old = std::ptr::null_mut::<u64>();
        // SAFETY: new has the layout of struct rlimit64; a null old is allowed; pid 0 is the caller.
        cvt(unsafe { libc::syscall(libc::SYS_prlimit64, 0, self.resource, new.as_ptr(), old) }).map(drop)
    }

    fn now(&self) -> Sys<[u64; 2]> {
        let mut old = [0u64; 2];
        let new = std::ptr::null::<u64>();
        // SAFETY: old has the layout of struct rlimit64; a null new is allowed.
        cvt(unsafe { libc::syscall(libc::SYS_prlimit64, 0, self.resource, new, old.as_mut_ptr()) })?;
        Ok(old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_kernels_numbers() {
        assert_eq!(bit_of("CAP_CHOWN"), Some(1));
        assert_eq!(bit_of("cap_sys_admin"), Some(1 << 21));
        assert_eq!(bit_of("CHECKPOINT_RESTORE"), Some(1 << 40));
        assert_eq!(bit_of("CAP_NONSENSE"), None);
        let limit = |kind: &str, soft, hard| {
            Limit::parse(&Rlimit {
                kind: kind.into(),
                soft,
                hard,
            })
        };
        assert_eq!(
            limit("RLIMIT_NOFILE", 1, 2).unwrap(),
            Limit {
                resource: 7,
                soft: 1,
                hard: 2
            }
        );
        assert!(limit("RLIMIT_NOFILE", 3, 2).is_err());
        assert!(limit("RLIMIT_X", 1, 2).is_err());
    }
}
