//! Hooks that a specification brings: what each of them is run with, for how long, and what it said when it failed.
//!
//! libcontainer runs hooks, but lets them take for ever unless told, writes their stderr to the container's log, and gives
//! those of `startContainer` the container's environment. So each hook of the moments before the pivot is put behind this
//! program's verb `hook` ([`guard`]), which runs it ([`run`]) in a process group of its own, with the environment that the
//! specification gives and no other (CVE-2025-23266), kills all of it when its time is over, and notes the failure in a
//! file on the stage, where `create` finds it. Those of `startContainer` run inside the container, where neither this
//! program nor the stage can be reached: they get their environment and their time only.

use crate::native;
use libcontainer::oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a hook may take that does not say.
const DEFAULT_SECONDS: i64 = 10;
/// The longest that all of them may, together: below the 30 s that a create has, so that it is told whose time was over.
const MAX_SECONDS: i64 = 20;
/// The same of those that run in the start, which has 10 s.
const MAX_START_SECONDS: i64 = 8;
/// What is kept of a hook's stderr: its end, where the error is.
const MAX_STDERR: usize = 4096;
/// The file on the stage.
const FAILURES: &str = "hook-failures";

/// Puts the specification's hooks behind `hook`. `dir` is where failures are noted; the hooks' first users may write there.
pub fn guard(spec: &mut Spec, dir: &Path) -> io::Result<()> {
    let root = spec.root().as_ref().map(|r| r.path().clone());
    let env = spec.process().as_ref().and_then(|p| p.env().clone());
    let Some(hooks) = spec.hooks_mut() else {
        return Ok(());
    };
    let env = env.unwrap_or_default();
    if let Some(list) = hooks.create_runtime_mut() {
        native::without_idle_limits(list, &env)?;
    }
    if let Some(list) = hooks.create_container_mut() {
        native::without_idle_limits(list, &env)?;
    }
    if let (Some(root), Some(list)) = (root, hooks.create_container_mut()) {
        native::replace(list, &root);
    }
    let log = dir.join(FAILURES);
    let until = now() + Duration::from_secs(MAX_SECONDS.unsigned_abs());
    let mut any = false;
    let mut guarded = |moment, list: &mut Option<Vec<Hook>>| {
        for hook in list.iter_mut().flatten() {
            behind(moment, hook, until, &log);
            any = true;
        }
    };
    #[allow(deprecated, reason = "specifications still name prestart hooks")]
    guarded("prestart", hooks.prestart_mut());
    guarded("createRuntime", hooks.create_runtime_mut());
    guarded("createContainer", hooks.create_container_mut());
    let at_start = hooks.start_container().iter().flatten().count();
    let each = MAX_START_SECONDS / i64::try_from(at_start).unwrap_or(MAX_START_SECONDS).max(1);
    for hook in hooks.start_container_mut().iter_mut().flatten() {
        hook.set_timeout(Some(seconds(hook).min(each.max(1))));
        hook.set_env(Some(hook.env().clone().unwrap_or_default()));
    }
    if any {
        // In a user namespace a hook is not root to this file.
        fs::File::create(&log)?.set_permissions(fs::Permissions::from_mode(0o666))?;
    }
    Ok(())
}

/// What the hooks noted, without the last line's end; empty when nothing failed.
pub fn failures(dir: &Path) -> String {
    let mut text = Vec::new();
    let read =
        fs::File::open(dir.join(FAILURES)).and_then(|f| f.take(4 * MAX_STDERR as u64).read_to_end(&mut text));
    read.map(|_| String::from_utf8_lossy(&text).trim_end().to_string())
        .unwrap_or_default()
}

/// How long it may take.
pub(crate) fn seconds(hook: &Hook) -> i64 {
    hook.timeout()
        .filter(|t| *t > 0)
        .unwrap_or(DEFAULT_SECONDS)
        .min(MAX_SECONDS)
}

/// Since the machine's start, the same for every process.
fn now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn behind(moment: &str, hook: &mut Hook, until: Duration, log: &Path) {
    let mut args: Vec<String> = ["slipway-runc", "hook", moment].map(str::to_owned).into();
    args.push(seconds(hook).to_string());
    args.push(until.as_millis().to_string());
    args.push(log.display().to_string());
    args.push(hook.path().display().to_string());
    args.extend(hook.args().iter().flatten().cloned());
    hook.set_args(Some(args));
    hook.set_path(PathBuf::from("/proc/self/exe"));
    hook.set_env(Some(hook.env().clone().unwrap_or_default()));
    hook.set_timeout(None);
}

/// `hook MOMENT SECONDS UNTIL FAILURES PATH [ARGS…]`: runs PATH with ARGS (the zeroth included); our exit code. UNTIL is
/// when the time of all hooks together is over, in milliseconds of the monotonic clock.
pub fn run(args: &[OsString]) -> i32 {
    let [moment, seconds, until, log, path, args @ ..] = args else {
        return 2;
    };
    let number = |text: &OsStr| text.to_str().and_then(|s| s.parse().ok());
    let own = Duration::from_secs(number(seconds).unwrap_or(1));
    let left = Duration::from_millis(number(until).unwrap_or(0)).saturating_sub(now());
    let Err(mut why) = attempt(Path::new(path), args, own.min(left)) else {
        return 0;
    };
    if left < own && now().as_millis() >= u128::from(number(until).unwrap_or(0)) {
        why = format!("{why} (all hooks together have {MAX_SECONDS} s)");
    }
    let path = native::name(Path::new(path));
    let text = format!("{} hook {} {why}\n", moment.to_string_lossy(), path.display());
    let note = fs::OpenOptions::new().append(true).open(log);
    let _ = note.and_then(|mut file| file.write_all(text.as_bytes()));
    1
}

fn attempt(path: &Path, args: &[OsString], limit: Duration) -> Result<(), String> {
    let (zeroth, rest): (&OsStr, &[OsString]) = match args {
        [zeroth, rest @ ..] => (zeroth, rest),
        [] => (path.as_os_str(), &[]),
    };
    // Only what the specification gave this process is passed on; stdin is the container's state.
    let mut child = Command::new(path)
        .arg0(zeroth)
        .args(rest)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("cannot be executed: {e}"))?;
    let stderr = child.stderr.take();
    let mut said = Said::default();
    let ended = wait(&child, stderr, limit, &mut said);
    // What it left behind holds nothing up and is not waited for, but does not stay. The group's number is nobody else's
    // as long as its first process is not reaped.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    let status = child.wait();
    match ended.and_then(|ended| Ok((ended, status?))) {
        Ok((true, status)) if status.success() => Ok(()),
        Ok((true, status)) => Err(format!("{}{}", described(status), said.text())),
        Ok((false, _)) => Err(format!(
            "did not end within {} s{}",
            limit.as_secs_f32().round(),
            said.text()
        )),
        Err(e) => Err(format!("cannot be waited for: {e}")),
    }
}

fn described(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Whether it has ended before its time was over. It is not reaped.
fn wait(
    child: &Child,
    mut stderr: Option<ChildStderr>,
    limit: Duration,
    said: &mut Said,
) -> io::Result<bool> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    if let Some(stderr) = &stderr {
        rustix::io::ioctl_fionbio(stderr, true)?;
    }
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let spec = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = vec![PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        if let Some(stderr) = &stderr {
            fds.push(PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, Some(&spec)) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let exited = !fds[0].revents().is_empty();
        if let Some(pipe) = &mut stderr
            && said.hear(pipe)
        {
            stderr = None;
        }
        if exited {
            return Ok(true);
        }
    }
}

/// The end of what a hook wrote to its stderr.
#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
}

impl Said {
    /// Reads what is there now, a bounded amount of it; whether nothing more can come.
    fn hear(&mut self, pipe: &mut ChildStderr) -> bool {
        let mut buffer = [0; 4096];
        for _ in 0..16 {
            match pipe.read(&mut buffer) {
                Ok(0) => return true,
                Ok(n) => {
                    self.bytes.extend_from_slice(&buffer[..n]);
                    let surplus = self.bytes.len().saturating_sub(MAX_STDERR);
                    self.bytes.drain(..surplus);
                }
                Err(e) => {
                    return e.kind() != io::ErrorKind::WouldBlock && e.kind() != io::ErrorKind::Interrupted;
                }
            }
        }
        false
    }

    /// For the end of a sentence: on one line, without what a terminal would obey.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.bytes);
        let words: Vec<&str> = text
            .split(|c: char| c.is_control() || c == ' ')
            .filter(|w| !w.is_empty())
            .collect();
        if words.is_empty() {
            String::new()
        } else {
            format!(": {}", words.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, seconds: &str, dir: &Path) -> (i32, String) {
        let log = dir.join(FAILURES);
        fs::File::create(&log).expect("a file");
        let until = (now() + Duration::from_secs(100)).as_millis().to_string();
        shell_until(script, seconds, &until, log)
    }

    fn shell_until(script: &str, seconds: &str, until: &str, log: PathBuf) -> (i32, String) {
        let dir = log.parent().expect("a directory").to_owned();
        let args = [
            "createContainer",
            seconds,
            until,
            "",
            "/bin/sh",
            "sh",
            "-c",
            script,
        ];
        let mut args: Vec<OsString> = args.iter().map(OsString::from).collect();
        args[3] = log.into();
        (run(&args), failures(&dir))
    }

    #[test]
    fn all_hooks_together_have_one_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join(FAILURES);
        fs::File::create(&log).expect("a file");
        let began = Instant::now();
        let until = (now() + Duration::from_secs(1)).as_millis().to_string();
        let (code, said) = shell_until("sleep 60", "20", &until, log.clone());
        assert_eq!(code, 1);
        assert!(
            said.ends_with("did not end within 1 s (all hooks together have 20 s)"),
            "{said}"
        );
        let (code, said) = shell_until("sleep 60", "20", &until, log);
        assert_eq!(code, 1);
        assert!(
            said.ends_with("within 0 s (all hooks together have 20 s)"),
            "{said}"
        );
        assert!(began.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_failure_is_told_with_its_code_and_its_last_words() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(shell("echo fine >&2", "5", dir.path()), (0, String::new()));
        let (code, said) = shell(
            "printf 'no\\033[31m such\\nthing\\n' >&2; exit 3",
            "5",
            dir.path(),
        );
        assert_eq!(code, 1);
        assert_eq!(
            said,
            "createContainer hook /bin/sh ended with exit code 3: no [31m such thing"
        );
        let (_, said) = shell(
            "yes 0123456789 | head -c 1000000 >&2; echo last >&2; exit 1",
            "5",
            dir.path(),
        );
        assert!(said.len() < 6000 && said.ends_with("last"), "{}", said.len());
    }

    #[test]
    fn a_hook_that_does_not_end_is_killed_with_its_children() {
        let dir = tempfile::tempdir().expect("a directory");
        let marker = format!("{}", 400_000_000 + std::process::id());
        let began = Instant::now();
        let (code, said) = shell(&format!("sleep {marker} & sleep {marker}"), "1", dir.path());
        assert!(began.elapsed() < Duration::from_secs(5));
        assert_eq!(
            (code, said.as_str()),
            (1, "createContainer hook /bin/sh did not end within 1 s")
        );
    }

    #[test]
    fn a_child_in_the_background_holds_nothing_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let began = Instant::now();
        let (code, _) = shell("sleep 30 & exit 0", "20", dir.path());
        assert!(code == 0 && began.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn hooks_are_put_behind_the_verb_with_an_environment_and_a_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.2.0","hooks":{
                "createContainer":[{"path":"/h","args":["h","x"],"env":["A=1"],"timeout":3},{"path":"/g"}],
                "startContainer":[{"path":"/s","timeout":999},{"path":"/t","timeout":1}]}}"#,
        )
        .expect("a specification");
        guard(&mut spec, dir.path()).expect("guarded");
        let hooks = spec.hooks().as_ref().expect("hooks");
        let create = hooks.create_container().as_ref().expect("createContainer");
        let log = dir.path().join(FAILURES).display().to_string();
        assert_eq!(
            create[0].args().as_ref().expect("arguments")[..4],
            ["slipway-runc", "hook", "createContainer", "3"]
        );
        assert_eq!(
            create[0].args().as_ref().expect("arguments")[5..],
            [&log, "/h", "h", "x"]
        );
        assert_eq!(create[0].env(), &Some(vec!["A=1".to_owned()]));
        assert_eq!(create[1].env(), &Some(vec![]));
        assert_eq!(create[1].path(), Path::new("/proc/self/exe"));
        let start = &hooks.start_container().as_ref().expect("startContainer");
        assert_eq!((start[0].timeout(), start[0].env()), (Some(4), &Some(vec![])));
        assert_eq!(start[1].timeout(), Some(1));
        assert_eq!(failures(dir.path()), "");
    }
}
