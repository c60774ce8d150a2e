//! Scopes and slices asked of a real systemd. Needs cgroup v2 alone and systemd as pid 1 (a QEMU guest, or any usual node).
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use slipway_sys::cgroup::{Cgroup, CgroupError, CgroupPath, Layout, Resources};
use slipway_sys::process::{self, Program};
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

fn here() -> bool {
    let there = common::root()
        && Path::new("/run/systemd/private").exists()
        && Layout::detect().is_ok_and(|layout| layout.is_v2());
    if !there {
        let _ = writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this test needs systemd and cgroup v2 alone ***\n"
        );
    }
    there
}

fn shell(cgroup: &Cgroup, script: &str) -> process::Child {
    let join = cgroup.join().unwrap();
    let args = ["sh", "-c", script].map(OsStr::new);
    let program = Program {
        file: None,
        path: Path::new("/bin/sh"),
        args: &args,
        env: &[OsStr::new("PATH=/bin:/usr/bin")],
        fds: &[],
        new_session: false,
        die_with_parent: false,
        cgroup: Some(&join),
    };
    process::spawn(&program).unwrap()
}

fn has_controller(cgroup: &Cgroup, file: &str) -> bool {
    Path::new("/sys/fs/cgroup")
        .join(cgroup.path().strip_prefix("/").unwrap())
        .join(file)
        .exists()
}

#[test]
fn root_a_scope_holds_its_container_keeps_its_limits_and_goes() {
    if !here() {
        return;
    }
    let layout = Layout::detect().unwrap();
    let name = common::unique("scope");
    let slice = format!("slipwaytest{}.slice", std::process::id());
    let (pod, made) = Cgroup::ensure(&layout, &CgroupPath::parse(&slice).unwrap()).unwrap();
    assert!(made && pod.exists());
    assert!(
        !Cgroup::ensure(&layout, &CgroupPath::parse(&slice).unwrap())
            .unwrap()
            .1,
        "the second time it is there"
    );
    let path = CgroupPath::parse(&format!("{slice}:slipway:{name}")).unwrap();
    let mut scope = Cgroup::create(&layout, &path).unwrap();
    assert!(
        scope.exists() && scope.path().starts_with(pod.path()),
        "{scope:?}"
    );
    let limits = r#"{"memory":{"limit":67108864,"swap":67108864},"pids":{"limit":50},
        "cpu":{"shares":512,"quota":50000,"period":100000,"cpus":"0","mems":"0"}}"#;
    let applied = scope.apply(&Resources::from_json(limits).unwrap());
    if has_controller(&scope, "memory.max") {
        applied.unwrap();
        let s = scope.stats().unwrap();
        assert_eq!((s.memory_limit, s.pids_limit), (67_108_864, 50));
        // What systemd believes, it would write again at its next reload.
        let _ = std::process::Command::new("systemctl")
            .arg("daemon-reload")
            .status();
        let s = scope.stats().unwrap();
        assert_eq!((s.memory_limit, s.pids_limit), (67_108_864, 50), "after a reload");
    } else {
        // systemd took the properties; there is nothing here to enforce them.
        assert!(
            matches!(applied, Err(CgroupError::Unsupported { .. })),
            "{applied:?}"
        );
        let _ = writeln!(
            std::io::stderr(),
            "\n*** PARTLY SKIPPED: no memory controller here ***\n"
        );
    }
    let child = shell(&scope, "exec sleep 60");
    scope.settle();
    assert_eq!(scope.procs().unwrap(), [child.pid], "the first process is gone");
    let sub = Cgroup::ensure(
        &layout,
        &CgroupPath::parse(&format!("{}/inner", scope.path().display())).unwrap(),
    );
    let (sub, _) = sub.unwrap();
    scope.kill().unwrap();
    process::wait(child.pid).unwrap();
    scope.wait_empty(Duration::from_secs(5)).unwrap();
    scope.remove(Duration::from_secs(5)).unwrap();
    assert!(!scope.exists() && !sub.exists());
    scope.remove(Duration::from_secs(5)).unwrap();
    pod.remove(Duration::from_secs(5)).unwrap();
    assert!(!pod.exists(), "the slice is left");
}

#[test]
fn root_a_scope_left_by_a_crash_is_replaced() {
    if !here() {
        return;
    }
    let layout = Layout::detect().unwrap();
    let path = CgroupPath::parse(&format!("system.slice:slipway:{}", common::unique("again"))).unwrap();
    let mut first = Cgroup::create(&layout, &path).unwrap();
    let child = shell(&first, "exec sleep 60");
    first.settle();
    assert!(Cgroup::create(&layout, &path).is_err(), "it has processes");
    first.kill().unwrap();
    process::wait(child.pid).unwrap();
    let second = Cgroup::create(&layout, &path).unwrap();
    assert!(second.exists());
    second.remove(Duration::from_secs(5)).unwrap();
    assert!(!second.exists());
}
