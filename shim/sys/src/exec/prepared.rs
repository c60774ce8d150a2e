//! Everything a child of exec needs, worked out before the fork: after it nothing can be allocated.

use super::caps::{CapSets, Limit};
use super::plan::{ExecError, ExecPlan};
use crate::fork::CArray;
use crate::seccomp::Filter;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;

/// Where programs are looked for when the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) struct Prepared {
    /// To be tried in this order.
    pub(super) candidates: Vec<CString>,
    pub(super) args: CArray,
    pub(super) env: CArray,
    pub(super) cwd: CString,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) umask: u32,
    pub(super) caps: CapSets,
    pub(super) limits: Vec<Limit>,
    pub(super) no_new_privs: bool,
    pub(super) seccomp: Option<Filter>,
    /// The file below `/proc/self/attr` and what to write.
    pub(super) label: Option<(CString, Vec<u8>)>,
    pub(super) oom_score_adj: Vec<u8>,
    pub(super) terminal: Option<libc::winsize>,
    /// Which of the first three descriptors are `/dev/null`.
    pub(super) nulls: [bool; 3],
    /// `setns(2)` flags.
    pub(super) namespaces: i32,
}

fn invalid(what: &'static str, reason: impl Into<String>) -> ExecError {
    ExecError::Invalid {
        what,
        reason: reason.into(),
    }
}

pub(super) fn c_string(what: &'static str, s: &str) -> Result<CString, ExecError> {
    CString::new(s).map_err(|_| invalid(what, "it has a zero byte"))
}

pub(super) fn c_array(what: &'static str, items: &[String]) -> Result<CArray, ExecError> {
    CArray::new(items.iter().map(OsStr::new)).map_err(|e| invalid(what, e.to_string()))
}

impl Prepared {
    pub(super) fn new(plan: &ExecPlan<'_>) -> Result<Prepared, ExecError> {
        let p = plan.process;
        let program = p
            .args
            .first()
            .ok_or_else(|| invalid("the command", "it is empty"))?;
        let cwd = if p.cwd.is_empty() { "/" } else { &p.cwd };
        if !cwd.starts_with('/') {
            return Err(invalid("the working directory", format!("{cwd} is not absolute")));
        }
        let size = p.console_size.unwrap_or_default();
        Ok(Prepared {
            candidates: candidates(program, &p.env)?,
            args: c_array("the command", &p.args)?,
            env: c_array("the environment", &p.env)?,
            cwd: c_string("the working directory", cwd)?,
            uid: p.user.uid,
            gid: p.user.gid,
            groups: p.user.additional_gids.clone(),
            umask: p.user.umask.unwrap_or(0o022),
            caps: p
                .capabilities
                .as_ref()
                .map_or(Ok(CapSets::default()), CapSets::parse)?,
            limits: p.rlimits.iter().map(Limit::parse).collect::<Result<_, _>>()?,
            no_new_privs: p.no_new_privileges,
            seccomp: match plan.seccomp_bpf {
                Some(file) => {
                    Some(Filter::from_bytes(file).map_err(|e| invalid("the seccomp filter", e.to_string()))?)
                }
                None => None,
            },
            label: label(p.apparmor_profile.as_deref(), p.selinux_label.as_deref())?,
            oom_score_adj: oom_score_adj(plan)?,
            terminal: p.terminal.then_some(libc::winsize {
                ws_row: size.height,
                ws_col: size.width,
                ws_xpixel: 0,
                ws_ypixel: 0,
            }),
            nulls: plan.stdio.map(|fd| fd.is_none() && !p.terminal),
            namespaces: namespaces(plan.init_pid)?,
        })
    }
}

/// A program with a slash is that file; else it is looked up in the absolute directories of PATH.
pub(super) fn candidates(program: &str, env: &[String]) -> Result<Vec<CString>, ExecError> {
    if program.is_empty() {
        return Err(invalid("the command", "the program's name is empty"));
    }
    if program.contains('/') {
        return Ok(vec![c_string("the command", program)?]);
    }
    let path = env
        .iter()
        .rev()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let dirs = path.split(':').filter(|d| d.starts_with('/'));
    dirs.map(|d| c_string("PATH", &format!("{}/{program}", d.trim_end_matches('/'))))
        .collect()
}

/// What to write where, so that the label holds from the exec on. A label the kernel has no use for is left out.
fn label(apparmor: Option<&str>, selinux: Option<&str>) -> Result<Option<(CString, Vec<u8>)>, ExecError> {
    let at = |path: &str| CString::new(path).map_err(|_| invalid("a label", "zero byte"));
    if let Some(profile) = apparmor.filter(|p| !p.is_empty() && apparmor_enabled()) {
        let own = "/proc/self/attr/apparmor/exec";
        let file = if std::path::Path::new(own).exists() {
            own
        } else {
            "/proc/self/attr/exec"
        };
        return Ok(Some((at(file)?, format!("exec {profile}").into_bytes())));
    }
    if let Some(label) = selinux.filter(|l| !l.is_empty() && selinux_enabled()) {
        return Ok(Some((at("/proc/self/attr/exec")?, label.as_bytes().to_vec())));
    }
    Ok(None)
}

/// Whether this kernel enforces AppArmor profiles.
pub fn apparmor_enabled() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|v| v.first() == Some(&b'Y'))
}

/// Whether this kernel runs with an SELinux policy.
pub fn selinux_enabled() -> bool {
    std::path::Path::new("/sys/fs/selinux/enforce").exists()
}

fn oom_score_adj(plan: &ExecPlan<'_>) -> Result<Vec<u8>, ExecError> {
    let value = match plan.process.oom_score_adj {
        Some(n) => n,
        None => crate::process::oom_score_adj(Some(plan.init_pid)).map_err(|_| ExecError::Gone)?,
    };
    Ok(value.to_string().into_bytes())
}

/// Every kind this kernel has; the user namespace only when it is not ours, since joining one's own is refused.
fn namespaces(init: u32) -> Result<i32, ExecError> {
    use crate::ns::Kind;
    use std::sync::OnceLock;
    static OWN: OnceLock<(i32, Option<std::path::PathBuf>)> = OnceLock::new();
    let user = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/user"));
    let (flags, own_user) = OWN.get_or_init(|| {
        let there =
            |k: &&Kind| **k != Kind::User && std::fs::symlink_metadata(format!("/proc/self/ns/{k}")).is_ok();
        (
            Kind::ALL.iter().filter(there).fold(0, |f, k| f | k.flag()),
            user("self").ok(),
        )
    });
    let theirs = user(&init.to_string()).map_err(|_| ExecError::Gone)?;
    let joins_user = own_user.as_ref().is_some_and(|own| *own != theirs);
    Ok(flags | if joins_user { Kind::User.flag() } else { 0 })
}

/// For messages.
pub(super) fn program_of(plan: &ExecPlan<'_>) -> String {
    let name = plan.process.args.first().map(String::as_str).unwrap_or_default();
    String::from_utf8_lossy(&OsStr::new(name).as_bytes()[..name.len().min(256)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_up_in_the_absolute_directories_of_the_last_path() {
        let env = |s: &[&str]| s.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let found = candidates("x", &env(&["PATH=/wrong", "PATH=/a:.:b::/c/"])).unwrap();
        assert_eq!(found, [c"/a/x".to_owned(), c"/c/x".to_owned()]);
        assert_eq!(candidates("./x", &[]).unwrap(), [c"./x".to_owned()]);
        assert_eq!(candidates("sh", &[]).unwrap().len(), 6);
        assert!(candidates("", &[]).is_err());
    }
}
