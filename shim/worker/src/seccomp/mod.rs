//! OCI's seccomp object compiled to a program, once: init loads it, and exec, from `seccomp.bpf` in the bundle.
//!
//! What the rules mean is what libseccomp makes of them for runc, with one difference: on i386 a rule for `socket` and
//! its like does not reach into `socketcall`, which has to be named. A test compares the verdicts of both on a real profile.

mod program;

use libcontainer::oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use libseccomp::{ScmpArch, ScmpSyscall};
use program::{Compare, KILL_THREAD, Op, Rule, Table, Verdict};
use slipway_sys::seccomp::Filter;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Why a filter could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// Nobody would answer.
    #[error("the seccomp action SCMP_ACT_NOTIFY needs a listenerPath")]
    Notify,
    /// An errno that is none.
    #[error("the seccomp errno {0} is out of range")]
    Errno(u32),
    /// There are six.
    #[error("a seccomp rule compares argument {0}, and there are only 0 to 5")]
    Argument(usize),
    /// For a machine this is not.
    #[error("the seccomp architecture {0:?} is none of this machine's")]
    Architecture(Arch),
    /// Too many rules.
    #[error("the seccomp filter has {0} instructions, more than the kernel takes")]
    TooLong(usize, #[source] io::Error),
}

/// Compiles. Names of system calls that an architecture does not have are passed over, as the specification asks.
pub fn compile(seccomp: &LinuxSeccomp) -> Result<Filter, SeccompError> {
    let default = verdict(seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut tables = architectures(seccomp)?;
    for rule in seccomp.syscalls().iter().flatten() {
        let verdict = verdict(rule.action(), rule.errno_ret())?;
        if verdict == default {
            continue;
        }
        let alternatives = alternatives(rule.args().as_deref().unwrap_or_default(), verdict)?;
        for name in rule.names() {
            for (arch, table) in &mut tables {
                if let Some(number) = number(name, *arch) {
                    table
                        .calls
                        .entry(number)
                        .or_default()
                        .extend(alternatives.iter().cloned());
                }
            }
        }
    }
    let tables: Vec<Table> = tables.into_iter().map(|(_, table)| table).collect();
    let program = program::compile(&tables, default);
    let bytes: Vec<u8> = program
        .iter()
        .flat_map(|i| {
            let (code, k) = (i.code.to_ne_bytes(), i.k.to_ne_bytes());
            [code[0], code[1], i.jt, i.jf, k[0], k[1], k[2], k[3]]
        })
        .collect();
    Filter::new(&bytes, flags(seccomp)).map_err(|e| SeccompError::TooLong(program.len(), e))
}

/// A call's number; `None` when the architecture has no such call.
fn number(name: &str, arch: ScmpArch) -> Option<u32> {
    /// Calls of i386 that came after the multiplexers: libseccomp answers with the multiplexer's (arch/x86/entry/syscalls).
    const DIRECT: [(&str, u32); 27] = [
        ("socket", 359),
        ("socketpair", 360),
        ("bind", 361),
        ("connect", 362),
        ("listen", 363),
        ("accept4", 364),
        ("getsockopt", 365),
        ("setsockopt", 366),
        ("getsockname", 367),
        ("getpeername", 368),
        ("sendto", 369),
        ("sendmsg", 370),
        ("recvfrom", 371),
        ("recvmsg", 372),
        ("shutdown", 373),
        ("recvmmsg", 337),
        ("sendmmsg", 345),
        ("semget", 393),
        ("semctl", 394),
        ("shmget", 395),
        ("shmctl", 396),
        ("shmat", 397),
        ("shmdt", 398),
        ("msgget", 399),
        ("msgsnd", 400),
        ("msgrcv", 401),
        ("msgctl", 402),
    ];
    let number = i32::from(ScmpSyscall::from_name_by_arch(name, arch).ok()?);
    // Negative: a name libseccomp knows, but no number of this architecture.
    u32::try_from(number).ok().or_else(|| {
        let direct = DIRECT
            .iter()
            .find(|(direct, _)| arch == ScmpArch::X86 && *direct == name);
        direct.map(|(_, number)| *number)
    })
}

/// Whether somebody outside is to answer for system calls: then libcontainer has to load the filter.
pub fn has_listener(seccomp: &LinuxSeccomp) -> bool {
    seccomp.listener_path().is_some()
}

/// Empty tables of the architectures named, and always of the native one.
fn architectures(seccomp: &LinuxSeccomp) -> Result<Vec<(ScmpArch, Table)>, SeccompError> {
    let named = seccomp.architectures().iter().flatten().copied();
    let mut out: Vec<(ScmpArch, Table)> = Vec::new();
    for arch in [Arch::ScmpArchNative].into_iter().chain(named) {
        let (scmp, arch, x32, wide) = architecture(arch)?;
        if !out.iter().any(|(_, t)| (t.arch, t.x32) == (arch, x32)) {
            out.push((
                scmp,
                Table {
                    arch,
                    x32,
                    wide,
                    calls: BTreeMap::new(),
                },
            ));
        }
    }
    Ok(out)
}

/// libseccomp's name, `AUDIT_ARCH_*` (include/uapi/linux/audit.h), whether it is x32, whether arguments have 64 bits.
fn architecture(arch: Arch) -> Result<(ScmpArch, u32, bool, bool), SeccompError> {
    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;
    const AARCH64: u32 = 0xc000_00b7;
    const ARM: u32 = 0x4000_0028;
    let native = if cfg!(target_arch = "aarch64") {
        Arch::ScmpArchAarch64
    } else {
        Arch::ScmpArchX86_64
    };
    let arch = if arch == Arch::ScmpArchNative {
        native
    } else {
        arch
    };
    match arch {
        Arch::ScmpArchX86_64 => Ok((ScmpArch::X8664, X86_64, false, true)),
        Arch::ScmpArchX32 => Ok((ScmpArch::X32, X86_64, true, true)),
        Arch::ScmpArchX86 => Ok((ScmpArch::X86, I386, false, false)),
        Arch::ScmpArchAarch64 => Ok((ScmpArch::Aarch64, AARCH64, false, true)),
        Arch::ScmpArchArm => Ok((ScmpArch::Arm, ARM, false, false)),
        other => Err(SeccompError::Architecture(other)),
    }
}

/// The comparisons as one rule; but several comparisons of one argument are several rules, as in runc and libseccomp.
fn alternatives(args: &[LinuxSeccompArg], verdict: Verdict) -> Result<Vec<Rule>, SeccompError> {
    let compares = args.iter().map(compare).collect::<Result<Vec<_>, _>>()?;
    let distinct: BTreeSet<u8> = compares.iter().map(|c| c.arg).collect();
    Ok(if distinct.len() == compares.len() {
        vec![Rule { compares, verdict }]
    } else {
        compares
            .into_iter()
            .map(|c| Rule {
                compares: vec![c],
                verdict,
            })
            .collect()
    })
}

fn compare(a: &LinuxSeccompArg) -> Result<Compare, SeccompError> {
    let n = a.value();
    let op = match a.op() {
        LinuxSeccompOperator::ScmpCmpNe => Op::Ne(n),
        LinuxSeccompOperator::ScmpCmpLt => Op::Lt(n),
        LinuxSeccompOperator::ScmpCmpLe => Op::Le(n),
        LinuxSeccompOperator::ScmpCmpEq => Op::Eq(n),
        LinuxSeccompOperator::ScmpCmpGe => Op::Ge(n),
        LinuxSeccompOperator::ScmpCmpGt => Op::Gt(n),
        LinuxSeccompOperator::ScmpCmpMaskedEq => Op::Masked {
            mask: n,
            value: a.value_two().unwrap_or(0),
        },
    };
    let arg = u8::try_from(a.index())
        .ok()
        .filter(|n| *n < 6)
        .ok_or(SeccompError::Argument(a.index()))?;
    Ok(Compare { arg, op })
}

/// `SECCOMP_RET_*` (include/uapi/linux/seccomp.h).
fn verdict(action: LinuxSeccompAction, errno: Option<u32>) -> Result<Verdict, SeccompError> {
    let errno = errno.unwrap_or(1); // EPERM
    let data = || {
        u16::try_from(errno)
            .map(u32::from)
            .map_err(|_| SeccompError::Errno(errno))
    };
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => KILL_THREAD,
        LinuxSeccompAction::ScmpActKillProcess => 0x8000_0000,
        LinuxSeccompAction::ScmpActTrap => 0x0003_0000,
        LinuxSeccompAction::ScmpActErrno => 0x0005_0000 | data()?,
        LinuxSeccompAction::ScmpActTrace => 0x7ff0_0000 | data()?,
        LinuxSeccompAction::ScmpActLog => 0x7ffc_0000,
        LinuxSeccompAction::ScmpActAllow => 0x7fff_0000,
        LinuxSeccompAction::ScmpActNotify => return Err(SeccompError::Notify),
    })
}

/// `seccomp(2)`'s flags (include/uapi/linux/seccomp.h).
fn flags(seccomp: &LinuxSeccomp) -> u32 {
    let bit = |flag: &LinuxSeccompFilterFlag| match flag {
        // All threads at once: there is one.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => 1 << 1,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 1 << 2,
        // Means something only with a listener.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    };
    seccomp
        .flags()
        .iter()
        .flatten()
        .fold(0, |bits, flag| bits | bit(flag))
}

#[cfg(test)]
mod tests {
    use super::*;
    use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext};
    use program::{Insn, run};
    use std::io::{Read, Seek, SeekFrom};

    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;

    fn parse(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).expect("a profile")
    }

    fn instructions(bytes: &[u8]) -> Vec<Insn> {
        let insn = |c: &[u8]| Insn {
            code: u16::from_ne_bytes([c[0], c[1]]),
            jt: c[2],
            jf: c[3],
            k: u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
        };
        bytes.chunks_exact(8).map(insn).collect()
    }

    fn ours(seccomp: &LinuxSeccomp) -> Vec<Insn> {
        instructions(&compile(seccomp).expect("compiled").to_bytes()[4..])
    }

    /// What libseccomp makes of the same rules.
    fn theirs(seccomp: &LinuxSeccomp) -> Vec<Insn> {
        let action = |a: LinuxSeccompAction, errno: Option<u32>| match a {
            LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.unwrap_or(1) as i32),
            LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
            other => panic!("{other:?}"),
        };
        let default = action(seccomp.default_action(), seccomp.default_errno_ret());
        let mut context = ScmpFilterContext::new(default).expect("a context");
        for arch in seccomp.architectures().iter().flatten() {
            context
                .add_arch(architecture(*arch).expect("known").0)
                .expect("added");
        }
        for rule in seccomp.syscalls().iter().flatten() {
            let action = action(rule.action(), rule.errno_ret());
            if action == default {
                continue;
            }
            for name in rule.names() {
                let Ok(call) = ScmpSyscall::from_name(name) else {
                    continue;
                };
                let compares: Vec<ScmpArgCompare> = rule
                    .args()
                    .iter()
                    .flatten()
                    .map(|a| match compare(a).expect("sane").op {
                        Op::Masked { mask, value } => {
                            ScmpArgCompare::new(a.index() as u32, ScmpCompareOp::MaskedEqual(mask), value)
                        }
                        Op::Eq(n) => ScmpArgCompare::new(a.index() as u32, ScmpCompareOp::Equal, n),
                        Op::Ne(n) => ScmpArgCompare::new(a.index() as u32, ScmpCompareOp::NotEqual, n),
                        other => panic!("{other:?}"),
                    })
                    .collect();
                context
                    .add_rule_conditional(action, call, &compares)
                    .expect("added");
            }
        }
        let memory = rustix::fs::memfd_create("theirs", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
        let mut file = std::fs::File::from(memory);
        context.export_bpf(&file).expect("exported");
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.read_to_end(&mut bytes))
            .expect("read");
        instructions(&bytes)
    }

    #[test]
    fn verdicts_are_libseccomps_on_a_profile_like_the_one_in_use() {
        let seccomp = parse(include_str!("../../tests/profile.json"));
        let (ours, theirs) = (ours(&seccomp), theirs(&seccomp));
        assert!(ours.len() < 1500, "{} instructions", ours.len());
        let values = [
            0u64,
            1,
            2,
            8,
            16,
            38,
            40,
            41,
            0x2_0008,
            0x7e02_0000,
            0x1000_0000,
            0xffff_ffff,
            0x1_0000_0028,
        ];
        for arch in [X86_64, I386, 7] {
            for nr in (0..600).chain(program::X32..program::X32 + 600) {
                // libseccomp reaches into these two of i386's, see above; and x32's numbers there are none.
                if arch == I386 && (matches!(nr, 102 | 117) || nr >= program::X32) {
                    continue;
                }
                for value in values {
                    let args = [value, value, value, 0, 0, 0];
                    let (a, b) = (run(&ours, nr, arch, args), run(&theirs, nr, arch, args));
                    assert_eq!(a, b, "call {nr:#x} of {arch:#x} with {value:#x}");
                }
            }
        }
    }

    #[test]
    fn senseless_rules_are_refused() {
        let with = |rule: &str| {
            compile(&parse(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#
            )))
        };
        assert!(matches!(
            with(r#"{"names":["read"],"action":"SCMP_ACT_NOTIFY"}"#),
            Err(SeccompError::Notify)
        ));
        assert!(matches!(
            with(r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","errnoRet":70000}"#),
            Err(SeccompError::Errno(70000))
        ));
        assert!(matches!(
            with(
                r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]}"#
            ),
            Err(SeccompError::Argument(6))
        ));
        assert!(with(r#"{"names":["no_such_call"],"action":"SCMP_ACT_ERRNO"}"#).is_ok());
        let flags = parse(r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG"]}"#);
        assert_eq!(compile(&flags).expect("compiled").to_bytes()[0], 2);
    }
}
