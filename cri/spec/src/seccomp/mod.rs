//! System call filters: the runtime's own profile, and profiles from files.

mod localhost;
mod syscalls;

use std::collections::BTreeSet;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompBuilder, LinuxSeccompOperator as Op, LinuxSyscall, LinuxSyscallBuilder,
};

use crate::error::SpecError;
use crate::input::{CapabilitySet, Seccomp, SpecInput};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Every namespace flag of clone(2).
const CLONE_NEW: u64 =
    0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

/// personality(2): Linux, Linux with uname26, and the same on 64 bit; and the query.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Address families from AF_UNIX on that may be opened: all but AF_ALG (38: the kernel's crypto,
/// which no container needs and which has been a way out of one) and AF_VSOCK (40: reaches the
/// host's virtual machines from any network namespace). 46 and up do not exist yet.
const FAMILIES_BELOW: u64 = 38;
const FAMILIES: [u64; 6] = [39, 41, 42, 43, 44, 45];

/// The profile of containers that ask for RuntimeDefault.
///
/// An allow-list; what is not on it fails with EPERM. It depends on the capabilities held: a
/// container that may mount may also call mount(2). clone3 fails with ENOSYS, whose arguments are
/// behind a pointer, so that libraries fall back to clone.
pub fn runtime_default(capabilities: &CapabilitySet, kernel: (u32, u32)) -> LinuxSeccomp {
    let admin = capabilities.contains("CAP_SYS_ADMIN");
    let mut names: BTreeSet<&str> = syscalls::ALLOWED
        .iter()
        .flat_map(|g| g.split_whitespace())
        .collect();
    names.extend(of_this_architecture().1.split_whitespace());
    for (capability, more) in syscalls::BY_CAPABILITY {
        let given = if capability.is_empty() {
            kernel >= (4, 8)
        } else {
            capabilities.contains(capability)
        };
        if given {
            names.extend(more.split_whitespace());
        }
    }
    let mut rules = vec![rule(
        names.into_iter().map(str::to_owned).collect(),
        Action::ScmpActAllow,
        None,
        None,
    )];
    rules.push(allow_if("socket", Op::ScmpCmpLt, FAMILIES_BELOW, None));
    rules.extend(
        FAMILIES
            .iter()
            .map(|f| allow_if("socket", Op::ScmpCmpEq, *f, None)),
    );
    rules.extend(
        PERSONALITIES
            .iter()
            .map(|p| allow_if("personality", Op::ScmpCmpEq, *p, None)),
    );
    if !admin {
        rules.push(allow_if("clone", Op::ScmpCmpMaskedEq, CLONE_NEW, Some(0)));
        rules.push(rule(
            vec!["clone3".to_owned()],
            Action::ScmpActErrno,
            Some(ENOSYS),
            None,
        ));
    }
    LinuxSeccompBuilder::default()
        .default_action(Action::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(of_this_architecture().0)
        .syscalls(rules)
        .build()
        .expect("the default action is set")
}

/// The architectures of programs this machine runs, its own first, and their own system calls.
fn of_this_architecture() -> (Vec<Arch>, &'static str) {
    if cfg!(target_arch = "x86_64") {
        (
            vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
            syscalls::X86,
        )
    } else if cfg!(target_arch = "aarch64") {
        (vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm], syscalls::ARM)
    } else {
        (vec![Arch::ScmpArchNative], "")
    }
}

fn allow_if(name: &str, op: Op, value: u64, value_two: Option<u64>) -> LinuxSyscall {
    let mut arg = LinuxSeccompArgBuilder::default()
        .index(0usize)
        .value(value)
        .op(op);
    if let Some(two) = value_two {
        arg = arg.value_two(two);
    }
    let arg = arg.build().expect("index, value and operator are set");
    rule(vec![name.to_owned()], Action::ScmpActAllow, None, Some(vec![arg]))
}

fn rule(
    names: Vec<String>,
    action: Action,
    errno: Option<u32>,
    args: Option<Vec<LinuxSeccompArg>>,
) -> LinuxSyscall {
    let mut rule = LinuxSyscallBuilder::default().names(names).action(action);
    if let Some(errno) = errno {
        rule = rule.errno_ret(errno);
    }
    if let Some(args) = args {
        rule = rule.args(args);
    }
    rule.build().expect("names and action are set")
}

/// The filter a container gets: none when privileged, or where it asked for none.
pub(crate) fn seccomp(
    input: &SpecInput,
    held: &CapabilitySet,
    warnings: &mut Vec<String>,
) -> Result<Option<LinuxSeccomp>, SpecError> {
    if input.privileged {
        return Ok(None);
    }
    match &input.seccomp {
        Seccomp::Unconfined => Ok(None),
        Seccomp::RuntimeDefault if !input.host.seccomp => {
            warnings.push(
                "this kernel has no seccomp: the container runs without a system call filter".to_owned(),
            );
            Ok(None)
        }
        Seccomp::RuntimeDefault => Ok(Some(runtime_default(held, input.host.kernel))),
        Seccomp::Localhost(_) if !input.host.seccomp => Err(SpecError::Unsupported {
            field: "seccomp",
            value: "Localhost".to_owned(),
            reason: "this kernel has no seccomp",
        }),
        Seccomp::Localhost(bytes) => localhost::parse(bytes, held, input.host.kernel).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(capabilities: &[&str]) -> LinuxSeccomp {
        runtime_default(&capabilities.iter().map(|c| (*c).to_owned()).collect(), (6, 1))
    }

    fn rules<'a>(profile: &'a LinuxSeccomp, name: &str) -> Vec<&'a LinuxSyscall> {
        let has = |s: &&LinuxSyscall| s.names().iter().any(|n| n == name);
        profile.syscalls().iter().flatten().filter(has).collect()
    }

    fn allowed(profile: &LinuxSeccomp, name: &str) -> bool {
        rules(profile, name)
            .iter()
            .any(|r| r.action() == Action::ScmpActAllow && r.args().is_none())
    }

    #[test]
    fn what_programs_need_is_allowed_and_what_breaks_out_is_not() {
        let plain = profile(&[]);
        for name in [
            "read",
            "openat",
            "execve",
            "futex",
            "mmap",
            "clock_gettime",
            "epoll_wait",
            "statx",
            "ptrace",
            "rseq",
        ] {
            assert!(allowed(&plain, name), "{name}");
        }
        for name in [
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
            "socketcall",
            "mount",
            "unshare",
            "setns",
            "bpf",
            "kexec_load",
            "init_module",
            "keyctl",
            "add_key",
            "userfaultfd",
            "perf_event_open",
            "open_by_handle_at",
            "swapon",
            "reboot",
            "chroot",
            "move_mount",
            "pivot_root",
            "quotactl",
            "fsopen",
        ] {
            assert!(rules(&plain, name).is_empty(), "{name}");
        }
        assert_eq!(plain.default_action(), Action::ScmpActErrno);
    }

    #[test]
    fn capabilities_bring_their_system_calls() {
        assert!(allowed(&profile(&["CAP_SYS_CHROOT"]), "chroot"));
        assert!(allowed(&profile(&["CAP_BPF"]), "bpf"));
        let admin = profile(&["CAP_SYS_ADMIN"]);
        for name in ["mount", "clone", "clone3", "setns", "unshare"] {
            assert!(allowed(&admin, name), "{name}");
        }
    }

    #[test]
    fn without_admin_clone_makes_no_namespaces_and_clone3_does_not_exist() {
        let plain = profile(&[]);
        let clone = rules(&plain, "clone");
        let arg = clone[0].args().as_ref().unwrap()[0];
        assert_eq!(
            (clone.len(), arg.value(), arg.value_two(), arg.op()),
            (1, 0x7e02_0000, Some(0), Op::ScmpCmpMaskedEq)
        );
        let clone3 = rules(&plain, "clone3");
        assert_eq!(
            (clone3[0].action(), clone3[0].errno_ret()),
            (Action::ScmpActErrno, Some(38))
        );
    }

    #[test]
    fn sockets_of_the_kernels_crypto_and_of_virtual_machines_cannot_be_made() {
        let plain = profile(&[]);
        let may = |family: u64| {
            rules(&plain, "socket").iter().any(|r| {
                let arg = r.args().as_ref().unwrap()[0];
                match arg.op() {
                    Op::ScmpCmpLt => family < arg.value(),
                    Op::ScmpCmpEq => family == arg.value(),
                    other => panic!("{other:?}"),
                }
            })
        };
        assert!(may(1) && may(2) && may(10) && may(16) && may(17) && may(44));
        assert!(!may(38) && !may(40) && !may(46) && !may(0x1_0000_0028));
    }

    #[test]
    fn debuggers_work_from_kernel_4_8_on() {
        let old = runtime_default(&CapabilitySet::new(), (4, 4));
        assert!(!allowed(&old, "ptrace"));
    }

    #[test]
    fn no_system_call_is_listed_twice() {
        let all: Vec<&str> = syscalls::ALLOWED
            .iter()
            .flat_map(|g| g.split_whitespace())
            .collect();
        let unique: BTreeSet<&str> = all.iter().copied().collect();
        assert_eq!(all.len(), unique.len());
    }
}
