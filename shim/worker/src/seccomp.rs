//! OCI's seccomp object compiled to a program, once: init loads it, and exec, from `seccomp.bpf` in the bundle.

use libcontainer::oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use libseccomp::error::SeccompError as LibError;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use slipway_sys::seccomp::Filter;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

/// Why a filter could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// Nobody would answer.
    #[error("the seccomp action SCMP_ACT_NOTIFY needs a listenerPath")]
    Notify,
    /// An errno that is none.
    #[error("the seccomp errno {0} is out of range")]
    Errno(u32),
    /// libseccomp refused.
    #[error("{act}")]
    Library {
        /// What was attempted.
        act: String,
        /// Why not.
        #[source]
        source: LibError,
    },
    /// The compiled program could not be taken.
    #[error("take the compiled seccomp program")]
    Export(#[source] io::Error),
}

fn step(act: &str) -> impl FnOnce(LibError) -> SeccompError {
    let act = act.to_string();
    move |source| SeccompError::Library { act, source }
}

/// Compiles. Names of system calls that this machine does not know are passed over, as the specification asks.
pub fn compile(seccomp: &LinuxSeccomp) -> Result<Filter, SeccompError> {
    let default = action(seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default).map_err(step("make a seccomp filter"))?;
    context
        .set_ctl_nnp(false)
        .map_err(step("set a seccomp attribute"))?;
    // A binary tree over the numbers instead of a list: a call costs eight comparisons instead of hundreds.
    let _ = context.set_ctl_optimize(2);
    for arch in seccomp.architectures().iter().flatten() {
        context
            .add_arch(architecture(*arch))
            .map_err(step("add an architecture to the seccomp filter"))?;
    }
    for rule in seccomp.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == default {
            continue;
        }
        let args: &[LinuxSeccompArg] = rule.args().as_deref().unwrap_or_default();
        for name in rule.names() {
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            add_rule(&mut context, action, call, args)
                .map_err(step(&format!("add the seccomp rule for {name}")))?;
        }
    }
    let program = export(&context)?;
    Filter::new(&program, flags(seccomp)).map_err(SeccompError::Export)
}

/// Whether somebody outside is to answer for system calls: then libcontainer has to load the filter.
pub fn has_listener(seccomp: &LinuxSeccomp) -> bool {
    seccomp.listener_path().is_some()
}

fn add_rule(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    call: ScmpSyscall,
    args: &[LinuxSeccompArg],
) -> Result<(), LibError> {
    // OCI's value is the mask of SCMP_CMP_MASKED_EQ and valueTwo what must be left; of the others, value is the datum.
    let datum = |a: &LinuxSeccompArg| match a.op() {
        LinuxSeccompOperator::ScmpCmpMaskedEq => a.value_two().unwrap_or(0),
        _ => a.value(),
    };
    let compare = |a: &LinuxSeccompArg| ScmpArgCompare::new(a.index() as u32, operator(a), datum(a));
    let compares: Vec<ScmpArgCompare> = args.iter().map(compare).collect();
    let mut indices: Vec<usize> = args.iter().map(LinuxSeccompArg::index).collect();
    indices.sort_unstable();
    indices.dedup();
    if args.is_empty() {
        context.add_rule(action, call).map(drop)
    } else if indices.len() == args.len() {
        context.add_rule_conditional(action, call, &compares).map(drop)
    } else {
        // libseccomp compares an argument once in a rule; several comparisons of one are several rules, as in runc.
        compares
            .into_iter()
            .try_for_each(|c| context.add_rule_conditional(action, call, &[c]).map(drop))
    }
}

fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, SeccompError> {
    let memory = rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(memory.map_err(|e| SeccompError::Export(e.into()))?);
    context
        .export_bpf(&file)
        .map_err(step("compile the seccomp filter"))?;
    let mut program = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut program))
        .map_err(SeccompError::Export)?;
    Ok(program)
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

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SeccompError> {
    let errno = errno.unwrap_or(1); // EPERM
    let small = || u16::try_from(errno).map_err(|_| SeccompError::Errno(errno));
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(i32::from(small()?)),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(small()?),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => return Err(SeccompError::Notify),
    })
}

fn operator(arg: &LinuxSeccompArg) -> ScmpCompareOp {
    match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpCompareOp::MaskedEqual(arg.value()),
    }
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}
