//! The built-in init, looked at as a hostile container would.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use slipway_sys::init::{self, InitPlan};
use slipway_sys::ns::{self, IdMap, IdMaps, Kind, NewNamespaces};
use slipway_sys::process::{self, Child};
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

struct Init(Child);

impl Drop for Init {
    fn drop(&mut self) {
        let _ = process::send_signal(self.0.pidfd.as_fd(), libc::SIGKILL);
        let _ = process::wait(self.0.pid);
    }
}

fn read(pid: u32, file: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap()
}

fn assert_nothing_to_see(pid: u32, uid: u32) {
    let status = read(pid, "status");
    for expected in [
        format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "NSpid:".into(),
        "\t1\n".into(),
        "NoNewPrivs:\t1".into(),
        "Seccomp:\t2".into(),
        "CapPrm:\t0000000000000000".into(),
        "CapBnd:\t0000000000000000".into(),
        "Groups:\t \n".into(),
    ] {
        assert!(status.contains(&expected), "{expected:?} is not in {status}");
    }
    assert_eq!(read(pid, "environ"), "");
    assert_eq!(
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        0,
        "it has descriptors"
    );
    assert_eq!(
        fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(),
        0,
        "its root is not empty"
    );
    assert!(
        fs::write(format!("/proc/{pid}/root/x"), "").is_err(),
        "its root is writable"
    );
    let mounts = read(pid, "mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(
        fs::write(format!("/proc/{pid}/exe"), "x").is_err(),
        "its program is writable"
    );
    assert_eq!(
        fs::metadata(format!("/proc/{pid}/exe")).unwrap().len(),
        fs::read(format!("/proc/{pid}/exe")).unwrap().len() as u64
    );
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(exe.to_string_lossy().contains("memfd:slipway-init"), "{exe:?}");
    for kind in [Kind::Mnt, Kind::Pid, Kind::Cgroup] {
        let path = |p: &str| ns::identity(Path::new(&format!("/proc/{p}/ns/{kind}"))).unwrap();
        assert_ne!(path(&pid.to_string()), path("self"), "{kind}");
    }
}

#[test]
fn root_the_built_in_init_has_nothing_to_look_at() {
    if !common::root() {
        return;
    }
    let init = Init(
        init::spawn(&InitPlan {
            join: &[],
            cgroup: None,
            oom_score_adj: 100,
        })
        .unwrap(),
    );
    assert_nothing_to_see(init.0.pid, 65534);
    assert_eq!(read(init.0.pid, "oom_score_adj").trim(), "100");
    let memory: u64 = read(init.0.pid, "smaps_rollup")
        .lines()
        .find_map(|l| l.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap();
    // A page of code, and where the kernel puts the top of the stack at random, up to three of stack.
    assert!(memory <= 16, "{memory} KiB");
}

#[test]
fn root_the_built_in_init_lives_in_the_pods_namespaces() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let map = vec![IdMap {
        container_id: 0,
        host_id: 400_000,
        length: 65536,
    }];
    let maps = IdMaps {
        uids: map.clone(),
        gids: map,
    };
    let new = NewNamespaces {
        user: Some(maps),
        net: true,
        ipc: true,
        uts: Some("pod".into()),
    };
    let pinned = ns::pin(&new, dir.path(), &[]).unwrap();
    let join: Vec<(Kind, &Path)> = pinned.iter().map(|(k, p)| (*k, p.as_path())).rev().collect();
    let init = Init(
        init::spawn(&InitPlan {
            join: &join,
            cgroup: None,
            oom_score_adj: 0,
        })
        .unwrap(),
    );
    assert_nothing_to_see(init.0.pid, 465_534);
    for (kind, path) in &pinned {
        let theirs = ns::identity(Path::new(&format!("/proc/{}/ns/{kind}", init.0.pid))).unwrap();
        assert_eq!(theirs, ns::identity(path).unwrap(), "{kind}");
    }
    let pin = dir.path().join("pid");
    ns::pin_of(init.0.pid, Kind::Pid, &pin).unwrap();
    assert!(ns::is_pinned(&pin));
    ns::unpin(&pin).unwrap();
    drop(init);
    for (_, path) in pinned {
        ns::unpin(&path).unwrap();
    }
}

#[test]
fn root_the_built_in_init_reaps_orphans_and_heeds_only_signals_from_outside() {
    if !common::root() {
        return;
    }
    let init = Init(
        init::spawn(&InitPlan {
            join: &[],
            cgroup: None,
            oom_score_adj: 0,
        })
        .unwrap(),
    );
    let pid = init.0.pid.to_string();
    let inside = |script: &str| {
        let status = Command::new("busybox")
            .args(["nsenter", "-t", &pid, "-p", "sh", "-c", script])
            .status();
        assert!(status.unwrap().success(), "{script}");
    };
    for _ in 0..20 {
        inside("(sleep 0.02 &) ; (sleep 0 &)");
    }
    inside("kill -TERM 1; kill -INT 1; kill -CHLD 1; kill -HUP 1");
    let children = || read(init.0.pid, &format!("task/{pid}/children"));
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while !children().trim().is_empty() {
        assert!(std::time::Instant::now() < until, "zombies: {}", children());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(
        !process::has_ended(init.0.pidfd.as_fd()).unwrap(),
        "a signal from inside ended it"
    );
    process::send_signal(init.0.pidfd.as_fd(), libc::SIGTERM).unwrap();
    assert!(process::wait_ended(init.0.pidfd.as_fd(), Duration::from_secs(5)).unwrap());
}

#[test]
fn root_a_failed_start_of_the_init_leaves_nothing() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let wrong = dir.path().join("net");
    fs::write(&wrong, "").unwrap();
    let e = init::spawn(&InitPlan {
        join: &[(Kind::Net, &wrong)],
        cgroup: None,
        oom_score_adj: 0,
    })
    .unwrap_err();
    assert!(e.act.contains("namespaces"), "{e:?}");
}
