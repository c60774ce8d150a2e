//! slipway-runc: creates one container through libcontainer, reports its init's pid, and is gone.
//!
//! ```text
//! slipway-runc create --bundle DIR --id ID --state DIR [--pid-namespace-fd N]
//! ```
//! What holds when it is started: it is in the container's cgroup, its stdio is the container's, descriptor N (3 unless
//! given) is a stream socket. A PID namespace to join may be passed as a descriptor: then the specification has one without a
//! path. `<bundle>/config.json` is the container's, and its rootfs is mounted.
//!
//! On the socket it writes one line of JSON: `{"pid":4711,"warnings":[…]}`, with the terminal's master attached when the
//! container has one; or `{"error":"what: why: …","exit_code":127}` (`exit_code` as a shell's: 127 for a program that is
//! not there, 126 for one that cannot be executed). The container's init keeps the socket, close-on-exec: after the start its end means
//! that the program runs, and a line with an error that it cannot.
//!
//! Start: connect to the socket `<state>/<id>/notify.sock`, write anything, close. That costs no process, so there is no
//! verb for it; nor is there one for deletion, since what stays is named here:
//! ```text
//! <state>/<id>/                    libcontainer's own record: state.json, youki_config.json, notify.sock
//! <bundle>/seccomp.bpf             the compiled filter, for exec (only with a filter)
//! ```
//! libcontainer must not be trusted with everything (ARCHITECTURE.md): capabilities, limits, the filter, the working
//! directory and the execution itself are done by [`executor`] with the code exec uses, and the specification it gets to
//! see is [`normalise`]d. It forks and runs ordinary code in the children, changes this process for good, and keeps its
//! errors' causes to itself ([`trace`]): that is why this is a process of its own, with one thread and one job.
//!
//! Unsafe is forbidden here: what needs it is slipway-sys's.
#![forbid(unsafe_code)]

mod create;
mod executor;
mod hook;
mod native;
mod normalise;
mod passwd;
mod points;
mod report;
mod seccomp;
mod stage;
mod trace;

use report::Report;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// Where the socket is that the report goes to.
const REPORT: i32 = 3;

/// What `create` was asked for.
struct Asked {
    bundle: PathBuf,
    id: String,
    state: PathBuf,
    pid_namespace_fd: Option<i32>,
}

#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("usage: slipway-runc create --bundle DIR --id ID --state DIR [--pid-namespace-fd N]")]
    Usage,
    #[error("{0} takes a value")]
    NoValue(&'static str),
    #[error("unknown argument {0}")]
    Unknown(String),
    #[error("--id must be letters, digits and any of _+-., at most 200 of them, and not \".\" or \"..\"")]
    Id,
    #[error("{0} must be an absolute path")]
    Path(&'static str),
    #[error("{0} must be a number from 3 to 63")]
    Fd(&'static str),
}

fn main() {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let code = match args.first().and_then(|a| a.to_str()) {
        Some("create") => match parse(&args[1..]) {
            Ok(asked) => create_and_report(&asked),
            Err(e) => usage(&e),
        },
        // What libcontainer runs in place of a hook: see `hook`.
        Some("hook") => hook::run(&args[1..]),
        Some("native") => native::run(&args[1..]),
        _ => usage(&UsageError::Usage),
    };
    // Without running anything more: what libcontainer left in this process dies with it.
    std::process::exit(code);
}

fn usage(e: &UsageError) -> i32 {
    eprintln!("slipway-runc: {e}");
    2
}

fn parse(args: &[OsString]) -> Result<Asked, UsageError> {
    let (mut bundle, mut id, mut state) = (None, None, None);
    let mut pid_namespace_fd = None;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = |name| args.next().ok_or(UsageError::NoValue(name));
        match arg.to_str() {
            Some("--bundle") => bundle = Some(PathBuf::from(value("--bundle")?)),
            Some("--state") => state = Some(PathBuf::from(value("--state")?)),
            Some("--id") => id = value("--id")?.to_str().map(str::to_string),
            Some("--pid-namespace-fd") => {
                pid_namespace_fd = Some(number("--pid-namespace-fd", value("--pid-namespace-fd")?)?);
            }
            _ => return Err(UsageError::Unknown(arg.to_string_lossy().into_owned())),
        }
    }
    let absolute = |path: Option<PathBuf>, name| match path {
        Some(path) if path.is_absolute() => Ok(path),
        Some(_) => Err(UsageError::Path(name)),
        None => Err(UsageError::Usage),
    };
    let id = id.filter(|id| is_id(id)).ok_or(UsageError::Id)?;
    Ok(Asked {
        bundle: absolute(bundle, "--bundle")?,
        id,
        state: absolute(state, "--state")?,
        pid_namespace_fd,
    })
}

fn number(name: &'static str, text: &OsStr) -> Result<i32, UsageError> {
    let number = text.to_str().and_then(|n| n.parse().ok());
    number.filter(|n| (3..64).contains(n)).ok_or(UsageError::Fd(name))
}

fn is_id(id: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'.');
    (1..=200).contains(&id.len()) && id != "." && id != ".." && id.bytes().all(plain)
}

fn create_and_report(asked: &Asked) -> i32 {
    // It was executed by the number of a descriptor.
    let _ = slipway_sys::process::set_name(c"slipway-runc");
    let report = match Report::take(REPORT) {
        Ok(report) => report,
        Err(e) => {
            eprintln!("slipway-runc: the report socket: {e}");
            return 2;
        }
    };
    match create::create(asked, &report) {
        Ok(created) => match report.created(&created) {
            Ok(()) => 0,
            Err(_) => 1, // whoever asked is gone; the container goes with its cgroup
        },
        Err(e) => {
            let _ = report.failed(&e);
            1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(list: &[&str]) -> Vec<OsString> {
        list.iter().map(OsString::from).collect()
    }

    #[test]
    fn arguments_are_checked_before_anything_is_done() {
        let good = parse(&args(&[
            "--bundle",
            "/b",
            "--id",
            "a-1",
            "--state",
            "/s",
            "--pid-namespace-fd",
            "6",
        ]));
        let good = good.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(good.id, "a-1");
        assert_eq!(good.pid_namespace_fd, Some(6));
        for bad in [
            &["--bundle", "/b", "--id", "../x", "--state", "/s"][..],
            &["--bundle", "b", "--id", "x", "--state", "/s"],
            &["--bundle", "/b", "--id", "x"],
            &[
                "--bundle",
                "/b",
                "--id",
                "x",
                "--state",
                "/s",
                "--pid-namespace-fd",
                "1",
            ],
            &["--bundle", "/b", "--id", "x", "--state", "/s", "--what"],
            &["--bundle"],
        ] {
            assert!(parse(&args(bad)).is_err(), "{bad:?}");
        }
    }
}
