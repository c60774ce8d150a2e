//! The specification as libcontainer can be trusted with it: what it does wrong is taken out and done by us, what it
//! stumbles over is put right. Pure.

use libcontainer::oci_spec::runtime::Spec;
use slipway_sys::exec::Process;
use std::path::{Component, Path, PathBuf};

/// What the machine and the bundle say.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Whether AppArmor is enabled.
    pub apparmor: bool,
    /// What libcontainer is to take for the container's cgroup.
    pub cgroup: PathBuf,
    /// The user's home directory in the image.
    pub home: String,
}

/// What cannot be created, whatever one does to it.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A mandatory part is missing.
    #[error("config.json has no {0}")]
    Missing(&'static str),
    /// CVE-2024-21626.
    #[error("the working directory {0} lies in /proc, where it can lead outside the container")]
    CwdInProc(String),
    /// Neither the specification nor libcontainer has it.
    #[error("rootfsPropagation {0} is not known")]
    Propagation(String),
}

/// Changes `spec` for libcontainer and `process` for our own part.
pub fn normalise(spec: &mut Spec, process: &mut Process, facts: &Facts) -> Result<(), SpecError> {
    set_home(process, &facts.home);
    let theirs = spec.process_mut().as_mut().ok_or(SpecError::Missing("process"))?;
    // Ours, by the code that confines an exec: see `executor`. libcontainer's seccomp swaps mask and value of masked
    // comparisons; its lookup of HOME loads libraries from the container; a limit set early would bind itself.
    theirs.set_capabilities(None);
    theirs.set_rlimits(None);
    theirs.set_oom_score_adj(None);
    theirs.set_cwd(PathBuf::from("/"));
    theirs.set_env(Some(process.env.clone()));
    // It takes "false", written out, for true when it decides when to load a filter.
    if theirs.no_new_privileges() != Some(true) {
        theirs.set_no_new_privileges(None);
    }
    if !facts.apparmor || theirs.apparmor_profile().as_deref() == Some("") {
        theirs.set_apparmor_profile(None);
    }
    let linux = spec.linux_mut().as_mut().ok_or(SpecError::Missing("linux"))?;
    // Made, limited and joined already.
    linux.set_resources(None);
    linux.set_cgroups_path(Some(facts.cgroup.clone()));
    if linux
        .seccomp()
        .as_ref()
        .is_some_and(|s| !crate::seccomp::has_listener(s))
    {
        linux.set_seccomp(None);
    }
    if let Some(propagation) = linux.rootfs_propagation().as_deref() {
        let known = match propagation {
            "" => None,
            "shared" | "rshared" => Some("shared"),
            "slave" | "rslave" => Some("slave"),
            "private" | "rprivate" => Some("private"),
            "unbindable" | "runbindable" => Some("unbindable"),
            other => return Err(SpecError::Propagation(other.to_string())),
        };
        linux.set_rootfs_propagation(known.map(str::to_string));
    }
    Ok(())
}

/// Whether a path lies on one of the mounts, so that the directory below in the rootfs will not be seen.
pub fn is_on_a_mount(spec: &Spec, path: &str) -> bool {
    let destinations = spec.mounts().iter().flatten().map(|m| lexical(m.destination()));
    let path = lexical(Path::new(path));
    destinations
        .into_iter()
        .any(|d| d != Path::new("/") && path.starts_with(d))
}

/// Refuses a working directory in /proc, however it is written.
pub fn check_cwd(cwd: &str) -> Result<(), SpecError> {
    if lexical(Path::new(cwd)).starts_with("/proc") {
        Err(SpecError::CwdInProc(cwd.to_string()))
    } else {
        Ok(())
    }
}

/// Without ".", ".." and doubled slashes, as the path is written.
fn lexical(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::from("/"), |mut out, part| {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
        out
    })
}

fn set_home(process: &mut Process, home: &str) {
    if !process
        .env
        .iter()
        .any(|e| e.starts_with("HOME=") && e.len() > "HOME=".len())
    {
        process.env.retain(|e| !e.starts_with("HOME="));
        process.env.push(format!("HOME={home}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            apparmor: false,
            cgroup: "/c".into(),
            home: "/root".into(),
        }
    }

    fn run(json: &str) -> Result<(Spec, Process), SpecError> {
        let mut spec: Spec = serde_json::from_str(json).expect("a specification");
        let value: serde_json::Value = serde_json::from_str(json).expect("JSON");
        let mut process: Process = serde_json::from_value(value["process"].clone()).expect("a process");
        normalise(&mut spec, &mut process, &facts()).map(|()| (spec, process))
    }

    fn json(process: &str, linux: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},"process":{{"args":["a"],"user":{{"uid":0,"gid":0}},{process}}},
                "linux":{{{linux}}}}}"#
        )
    }

    #[test]
    fn what_libcontainer_stumbles_over_is_put_right() {
        let text = json(
            r#""cwd":"/w","noNewPrivileges":false,"apparmorProfile":"x","oomScoreAdj":-998,"env":["HOME="],
               "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2}]"#,
            r#""rootfsPropagation":"rslave","cgroupsPath":"/kube/x","resources":{"pids":{"limit":3}},
               "seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}"#,
        );
        let (spec, process) = run(&text).expect("normalised");
        let theirs = spec.process().as_ref().expect("process");
        assert_eq!(theirs.no_new_privileges(), None);
        assert!(theirs.apparmor_profile().is_none() && theirs.oom_score_adj().is_none());
        assert!(theirs.rlimits().is_none() && theirs.capabilities().is_none());
        assert_eq!(process.env, ["HOME=/root"]);
        assert_eq!((process.cwd.as_str(), process.rlimits.len()), ("/w", 1));
        let linux = spec.linux().as_ref().expect("linux");
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("slave"));
        assert!(linux.resources().is_none() && linux.seccomp().is_none());
    }

    #[test]
    fn a_filter_with_a_listener_stays_libcontainers() {
        let text = json(
            r#""cwd":"/","noNewPrivileges":true"#,
            r#""seccomp":{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/s"}"#,
        );
        let (spec, _) = run(&text).expect("normalised");
        assert!(spec.linux().as_ref().is_some_and(|l| l.seccomp().is_some()));
        assert_eq!(
            spec.process().as_ref().and_then(|p| p.no_new_privileges()),
            Some(true)
        );
    }

    #[test]
    fn a_working_directory_in_proc_is_refused_however_it_is_written() {
        for cwd in ["/proc/self/fd/7", "/./proc//self", "/x/../proc/1/root", "/proc"] {
            assert!(matches!(check_cwd(cwd), Err(SpecError::CwdInProc(_))), "{cwd}");
        }
        assert!(check_cwd("/process").is_ok() && check_cwd("").is_ok());
    }

    #[test]
    fn directories_on_mounts_are_told_apart() {
        let text = r#"{"ociVersion":"1.2.0","mounts":[{"destination":"/data/","source":"x"},{"destination":"/","source":"y"}]}"#;
        let spec: Spec = serde_json::from_str(text).expect("a specification");
        assert!(is_on_a_mount(&spec, "/data/x/../y"));
        assert!(!is_on_a_mount(&spec, "/database"));
        assert!(!is_on_a_mount(&spec, "/"));
    }
}
