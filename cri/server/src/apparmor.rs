//! AppArmor on this node: the runtime's own profile, loaded while it is needed, and whether a profile that a container
//! names is there. Knows nothing of containers: the specification carries the name, the kernel does the rest.
//!
//! A profile is a node's, not ours: whoever loads policies again (`aa-teardown`, a package's upgrade) may take it away
//! under us, so that it is looked for at every create. What was loaded is remembered in the state directory, which a
//! reboot empties as it empties the kernel: the same text is not compiled twice, another one replaces it.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use slipway_spec::HostFacts;

use crate::error::Error;

/// The name of our own profile.
pub const OWN: &str = "slipway-default";
/// What the kernel has: a profile and its mode a line.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// Compiling a profile takes about 0.1 s, on a busy node seconds.
const PARSER_LIMIT: Duration = Duration::from_secs(30);
const PARSERS: [&str; 3] = [
    "/usr/sbin/apparmor_parser",
    "/sbin/apparmor_parser",
    "/usr/bin/apparmor_parser",
];
/// With this the parser takes `network` as it was before sockets of the unix family had rules of their own.
const ABI: &str = "/etc/apparmor.d/abi/3.0";

/// Our profile. `@SELF@` is its name, `@DAEMON@` what lets whoever ends containers do so.
const PROFILE: &str = r"profile @SELF@ flags=(attach_disconnected,mediate_deleted) {
  # A container's files, sockets and capabilities are bounded elsewhere: by its mounts, namespaces and sets.
  file,
  network,
  unix,
  capability,
  umount,
  deny mount,

  # The node's processes manage those in here, and those in here one another.
  signal (receive) peer=unconfined,
@DAEMON@  signal (send, receive) peer=@SELF@,
  ptrace (readby, tracedby) peer=unconfined,
  ptrace (read, readby, trace, tracedby) peer=@SELF@,

  # /proc: only what belongs to a process may be written, and the limits of shared memory.
  deny /proc/* w,
  deny /proc/[^0-9s]*/** w,
  deny /proc/s[^y]*/** w,
  deny /proc/sy[^s]*/** w,
  deny /proc/sys[^/]*/** w,
  deny /proc/sys/[^k]** w,
  deny /proc/sys/kernel/[^s]** w,
  deny /proc/sys/kernel/s[^h]** w,
  deny /proc/sys/kernel/sh[^m]** w,
  deny /proc/{kcore,kmem,mem,sysrq-trigger} rwklx,

  # /sys: only cgroups, and no firmware, power meters or security modules at all.
  deny /sys/[^f]** wklx,
  deny /sys/f[^s]** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/fs/c[^g]** wklx,
  deny /sys/fs/cg[^r]** wklx,
  deny /sys/{firmware,devices/virtual/powercap,kernel/security}/** rwklx,
}
";

/// AppArmor, as far as containers need it.
#[derive(Debug)]
pub struct Apparmor {
    /// The profile of containers that ask for none; `None`: they run without one.
    default: Option<String>,
    parser: Option<PathBuf>,
    /// What of ours was loaded last, in this boot.
    remembered: PathBuf,
    /// Two compilers at once would only take twice as long.
    loading: Mutex<()>,
}

impl Apparmor {
    /// Looks at the host and loads our profile, where `wanted` is its name. What goes wrong is logged: create says it
    /// again to whoever asks for the profile.
    pub fn start(host: &HostFacts, wanted: &str, state: &Path) -> Apparmor {
        let mut this = Apparmor {
            default: None,
            parser: PARSERS.iter().map(PathBuf::from).find(|path| path.exists()),
            remembered: state.join("apparmor-profile"),
            loading: Mutex::new(()),
        };
        if !host.apparmor || wanted.is_empty() {
            return this;
        }
        if loaded().is_none() || !host.has("CAP_MAC_ADMIN") {
            tracing::warn!(
                "AppArmor is on, but this is no place to load profiles from: containers that name no profile run without one"
            );
            return this;
        }
        if wanted == OWN && this.parser.is_none() {
            tracing::warn!(
                "AppArmor is on, but there is no apparmor_parser: containers that name no profile run without one; install apparmor"
            );
            return this;
        }
        this.default = Some(wanted.to_owned());
        if let Err(error) = this.ensure_default(wanted) {
            tracing::error!(
                error = error.chain(),
                "containers that name no AppArmor profile will fail"
            );
        }
        this
    }

    /// The profile for containers that name none.
    pub fn default_profile(&self) -> Option<String> {
        self.default.clone()
    }

    /// Makes sure that the kernel has the profile which a specification names. Blocks.
    ///
    /// # Errors
    /// It has not: a container's own profile is somebody else's to load, the default is loaded again here.
    pub fn ensure(&self, profile: &str) -> Result<(), Error> {
        if self.default.as_deref() == Some(profile) {
            return self.ensure_default(profile);
        }
        match loaded() {
            Some(all) if !has(&all, profile) => Err(Error::Apparmor {
                profile: profile.to_owned(),
                why: "it is not loaded on this node".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn ensure_default(&self, profile: &str) -> Result<(), Error> {
        let failed = |why: String| Error::Apparmor {
            profile: profile.to_owned(),
            why,
        };
        let there = || loaded().is_some_and(|all| has(&all, profile));
        if profile != OWN {
            return if there() {
                Ok(())
            } else {
                Err(failed(
                    "the configuration names it and it is not loaded on this node".to_owned(),
                ))
            };
        }
        let text = text(&own_label(), Path::new(ABI).exists());
        let current = || std::fs::read_to_string(&self.remembered).is_ok_and(|last| last == text);
        if there() && current() {
            return Ok(());
        }
        let _one = self
            .loading
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if there() && current() {
            return Ok(());
        }
        let parser = self
            .parser
            .as_deref()
            .ok_or_else(|| failed("there is no apparmor_parser to load it".to_owned()))?;
        replace(parser, &text).map_err(|why| failed(format!("{}: {why}", parser.display())))?;
        tracing::info!(profile, "AppArmor profile loaded");
        // Lost, the profile is only compiled once more.
        if let Err(error) = std::fs::write(&self.remembered, &text) {
            tracing::warn!(%error, path = %self.remembered.display(), "cannot remember the AppArmor profile");
        }
        Ok(())
    }
}

/// Names and modes of what the kernel has; `None` where that is not to be seen.
fn loaded() -> Option<String> {
    std::fs::read_to_string(LOADED).ok()
}

/// The kernel's lines are `NAME (MODE)`; a name may hold blanks.
fn has(all: &str, profile: &str) -> bool {
    all.lines()
        .any(|line| line.rsplit_once(" (").map_or(line, |(name, _)| name) == profile)
}

/// Under which profile we ourselves run: whoever sends the signals that end containers.
fn own_label() -> String {
    let label = std::fs::read_to_string("/proc/self/attr/apparmor/current")
        .or_else(|_| std::fs::read_to_string("/proc/self/attr/current"))
        .unwrap_or_default();
    let label = label.trim_end_matches(['\n', '\0']);
    label.rsplit_once(" (").map_or(label, |(name, _)| name).to_owned()
}

/// The profile as the parser takes it.
fn text(daemon: &str, abi: bool) -> String {
    let daemon =
        if matches!(daemon, "" | "unconfined") || daemon.contains(|c: char| c.is_control() || c == '"') {
            String::new()
        } else {
            // A label is a pattern to the parser (apparmor.d(5)), and ours is meant as it stands: a child profile's ("a//b"), one of a
            // snap's or of LXD's ("lxd-x_</var/lib/lxd>"), one with blanks.
            let special = |c: char| "*?[]{}\\".contains(c);
            let escaped = daemon
                .chars()
                .flat_map(|c| special(c).then_some('\\').into_iter().chain([c]));
            format!("  signal (receive) peer=\"{}\",\n", escaped.collect::<String>())
        };
    let abi = if abi { "abi <abi/3.0>,\n" } else { "" };
    format!("{abi}{PROFILE}")
        .replace("@DAEMON@", &daemon)
        .replace("@SELF@", OWN)
}

/// Has the parser load `text` in the place of what has its name; why it could not.
fn replace(parser: &Path, text: &str) -> Result<(), String> {
    let mut child = Command::new(parser)
        // No cache: it would outlive what it was made from.
        .args(["--replace", "--skip-cache", "--quiet"])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    slipway_sys::exec::give_usual_descriptors(child.id());
    let mut said = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(pipe) = said.as_mut() {
            // More than a page of complaints helps nobody.
            let _ = pipe.take(4096).read_to_end(&mut text);
            let _ = std::io::copy(pipe, &mut std::io::sink());
        }
        String::from_utf8_lossy(&text).trim().to_owned()
    });
    // Smaller than a pipe: this does not wait for the parser to read.
    let given = child
        .stdin
        .take()
        .map_or(Ok(()), |mut pipe| pipe.write_all(text.as_bytes()));
    let began = Instant::now();
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if began.elapsed() > PARSER_LIMIT => {
                let _ = child.kill();
                let _ = child.wait();
                break Err(format!("it did not end within {} s", PARSER_LIMIT.as_secs()));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => break Err(error.to_string()),
        }
    };
    let said = reader.join().unwrap_or_default();
    match (ended?, given) {
        (status, Ok(())) if status.success() => Ok(()),
        (status, Err(error)) if status.success() => Err(format!("it did not read the profile: {error}")),
        (status, _) => Err(format!("{status}: {said}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loaded_profile_is_found_by_its_whole_name() {
        let all = "slipway-default (enforce)\n/usr/bin/man (complain)\na name (kill)\n";
        assert!(has(all, "slipway-default") && has(all, "a name"));
        assert!(!has(all, "slipway") && !has(all, "name") && !has(all, "slipway-default (enforce)"));
    }

    #[test]
    fn the_profile_lets_the_daemon_in_where_it_is_confined_itself() {
        let text = text("/usr/bin/slipwayd", true);
        assert!(text.starts_with("abi <abi/3.0>,\nprofile slipway-default flags="));
        assert!(text.contains("  signal (receive) peer=\"/usr/bin/slipwayd\",\n"));
        assert!(!text.contains('@'));
        let odd = super::text("lxd a_</x>//{b,c}*", false);
        assert!(
            odd.contains(r#"  signal (receive) peer="lxd a_</x>//\{b,c\}\*","#),
            "{odd}"
        );
        for nobody in ["", "unconfined", "x,\n file", "x\", file, \""] {
            let text = super::text(nobody, false);
            assert!(text.starts_with("profile ") && !text.contains('@'));
            assert_eq!(text.matches("signal (receive)").count(), 1);
        }
    }

    #[test]
    fn the_parsers_verdict_and_its_complaint_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            path
        };
        replace(&script("good", "grep -q x"), "x\n").unwrap();
        let error = replace(&script("bad", "cat > /dev/null; echo line 3 >&2; exit 1"), "x\n").unwrap_err();
        assert!(error.contains("line 3"), "{error}");
        assert!(replace(&dir.path().join("none"), "x\n").is_err());
    }
}
