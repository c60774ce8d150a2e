//! Cgroups of the machine the tests run on, as root.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use slipway_sys::cgroup::{Cgroup, CgroupError, CgroupPath, Join, Layout, Resources};
use slipway_sys::process::{self, Child, Program};
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A cgroup that is killed and removed, and proven gone, at the end of the test.
struct Guard(Cgroup);

impl Guard {
    fn new(what: &str) -> Guard {
        let path = CgroupPath::parse(&format!("/{}", common::unique(what))).unwrap();
        Guard(Cgroup::create(&Layout::detect().unwrap(), &path).unwrap())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait_empty(Duration::from_secs(5)).unwrap();
        self.0.remove(Duration::from_secs(5)).unwrap();
        assert!(!self.0.exists(), "{:?} is left", self.0);
    }
}

struct Reaped(Child);
impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = process::send_signal(self.0.pidfd.as_fd(), libc::SIGKILL);
        let _ = process::wait(self.0.pid);
    }
}

fn shell(cgroup: &Cgroup, script: &str) -> Reaped {
    shell_in(&cgroup.join().unwrap(), script)
}

fn shell_in(join: &Join, script: &str) -> Reaped {
    let args = ["busybox", "sh", "-c", script].map(OsStr::new);
    let program = Program {
        file: None,
        path: Path::new("/bin/busybox"),
        args: &args,
        env: &[],
        fds: &[],
        new_session: false,
        die_with_parent: false,
        cgroup: Some(join),
    };
    Reaped(process::spawn(&program).unwrap())
}

fn eventually(mut f: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        if f() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn root_limits_apply_and_update_and_nothing_is_left() {
    if !common::root() {
        return;
    }
    let g = Guard::new("limits");
    let apply = |json: &str| g.0.apply(&Resources::from_json(json).unwrap());
    apply(
        r#"{"memory":{"limit":67108864,"swap":67108864},"cpu":{"shares":512,"quota":50000,"period":100000,
            "cpus":"0","mems":"0"},"pids":{"limit":20},"hugepageLimits":[{"pageSize":"2MB","limit":0}],
            "devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rw"}]}"#,
    )
    .unwrap();
    let s = g.0.stats().unwrap();
    assert_eq!((s.memory_limit, s.pids_limit), (67_108_864, 20));
    apply(r#"{"memory":{"limit":134217728}}"#).unwrap();
    assert_eq!(g.0.stats().unwrap().memory_limit, 134_217_728);
    apply(r#"{"memory":{"limit":33554432,"swap":33554432}}"#).unwrap();
    apply(r#"{"memory":{"limit":268435456,"swap":536870912}}"#).unwrap();
    apply(r#"{"cpu":{"quota":200000,"period":200000}}"#).unwrap();
    apply(r#"{"cpu":{"quota":1000,"period":1000}}"#).unwrap();
    let e = apply(r#"{"cpu":{"cpus":"900"}}"#).unwrap_err();
    assert!(
        matches!(&e, CgroupError::Write { key, .. } if key == "cpu.cpus"),
        "{e:?}"
    );
    let child = shell(&g.0, "read x < /dev/null; cat /dev/zero > /dev/null; exit 3");
    let exited = process::wait(child.0.pid).unwrap();
    assert_ne!(exited.status.exit_code(), 0, "/dev/zero is not allowed");
    std::mem::forget(child);
}

#[test]
fn root_a_fork_bomb_is_killed_and_the_cgroup_removed() {
    if !common::root() {
        return;
    }
    let g = Guard::new("bomb");
    g.0.apply(&Resources::from_json(r#"{"pids":{"limit":3000}}"#).unwrap())
        .unwrap();
    let _child = shell(&g.0, "while :; do sleep 60 & done");
    assert!(eventually(|| g.0.procs().unwrap().len() > 20));
    g.0.kill().unwrap();
    g.0.wait_empty(Duration::from_secs(5)).unwrap();
    assert!(g.0.is_empty().unwrap());
}

#[test]
fn root_frozen_processes_are_still_killed() {
    if !common::root() {
        return;
    }
    let g = Guard::new("frozen");
    let _child = shell(&g.0, "while :; do :; done");
    assert!(eventually(|| g.0.procs().unwrap().len() == 1));
    g.0.freeze().unwrap();
    let used = g.0.stats().unwrap().cpu_usage_ns;
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(g.0.stats().unwrap().cpu_usage_ns, used);
    g.0.thaw().unwrap();
    g.0.freeze().unwrap();
    g.0.kill().unwrap();
    g.0.wait_empty(Duration::from_secs(5)).unwrap();
}

#[test]
fn root_a_cgroup_that_a_container_made_and_froze_is_killed_too() {
    if !common::root() {
        return;
    }
    let top = Path::new("/sys/fs/cgroup/freezer");
    if !top.join("cgroup.procs").exists() {
        return drop(writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: no freezer of v1 here ***\n"
        ));
    }
    let g = Guard::new("nested-frozen");
    let own = top.join(g.0.path().strip_prefix("/").unwrap());
    let (a, b) = (own.join("a"), own.join("a/b"));
    std::fs::create_dir_all(&b).unwrap();
    let children = [
        shell(&g.0, "sleep 60"),
        shell(&g.0, "sleep 60"),
        shell(&g.0, "sleep 60"),
    ];
    for (dir, child) in [(&a, &children[1]), (&b, &children[2])] {
        std::fs::write(dir.join("cgroup.procs"), child.0.pid.to_string()).unwrap();
        std::fs::write(dir.join("freezer.state"), "FROZEN").unwrap();
    }
    assert!(eventually(|| {
        std::fs::read_to_string(b.join("freezer.state")).unwrap().trim() == "FROZEN"
    }));
    g.0.kill().unwrap();
    g.0.wait_empty(Duration::from_secs(5)).unwrap();
}

#[test]
fn root_v2_a_process_joins_its_container_where_the_containers_init_went() {
    if !common::root() {
        return;
    }
    let Some(v2) = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .map(PathBuf::from)
        .into_iter()
        .find(|p| p.join("cgroup.controllers").exists())
    else {
        return drop(writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: no cgroup v2 here ***\n"
        ));
    };
    let g = Guard::new("moved");
    let init = shell(&g.0, "sleep 60");
    let of = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("0::").map(str::to_string));
        line.unwrap()
    };
    let before = shell_in(&g.0.join_where(init.0.pid).unwrap(), "sleep 60");
    assert_eq!(of(before.0.pid), of(init.0.pid), "one that has not moved");
    let sub = v2.join(g.0.path().strip_prefix("/").unwrap()).join("own/init");
    std::fs::create_dir_all(&sub).unwrap();
    std::fs::write(sub.join("cgroup.procs"), init.0.pid.to_string()).unwrap();
    let after = shell_in(&g.0.join_where(init.0.pid).unwrap(), "sleep 60");
    assert!(of(after.0.pid).ends_with("/own/init"));
    assert_eq!(of(after.0.pid), of(init.0.pid));
    assert!(g.0.procs().unwrap().contains(&after.0.pid));
    assert!(
        g.0.join_where(std::process::id()).is_err(),
        "a process of somebody else's leads nowhere"
    );
}

#[test]
fn root_sub_cgroups_made_by_a_container_are_emptied_and_removed_too() {
    if !common::root() {
        return;
    }
    let g = Guard::new("nested");
    let json = serde_json::to_string(&g.0).unwrap();
    let copy: Cgroup = serde_json::from_str(&json).unwrap();
    let layout = Layout::detect().unwrap();
    let sub = format!("{}/made/by/container", g.0.path().display());
    let (sub, made) = Cgroup::ensure(&layout, &CgroupPath::parse(&sub).unwrap()).unwrap();
    assert!(made);
    let _child = shell(&sub, "sleep 60");
    assert_eq!(copy.procs().unwrap().len(), 1);
    let again = Cgroup::create(
        &layout,
        &CgroupPath::parse(&g.0.path().display().to_string()).unwrap(),
    );
    assert!(matches!(again, Err(CgroupError::NotEmpty { .. })), "{again:?}");
    copy.kill().unwrap();
    copy.wait_empty(Duration::from_secs(5)).unwrap();
    copy.remove(Duration::from_secs(5)).unwrap();
    assert!(!g.0.exists());
}

#[test]
fn root_parents_made_on_the_way_go_with_the_cgroup() {
    if !common::root() {
        return;
    }
    let name = common::unique("parents");
    let layout = Layout::detect().unwrap();
    let cgroup = Cgroup::create(&layout, &CgroupPath::parse(&format!("/{name}/pod/c")).unwrap()).unwrap();
    cgroup.remove(Duration::from_secs(1)).unwrap();
    let top = Cgroup::open(&layout, &CgroupPath::parse(&format!("/{name}")).unwrap()).unwrap();
    assert!(!top.exists());
}

#[test]
fn root_a_shared_parent_is_left_to_the_others_and_goes_with_the_last() {
    if !common::root() {
        return;
    }
    let name = common::unique("shared");
    let layout = Layout::detect().unwrap();
    let path = |sub: &str| CgroupPath::parse(&format!("/{name}/pods{sub}")).unwrap();
    let (first, made) = Cgroup::ensure(&layout, &path("")).unwrap();
    assert!(made);
    let (second, made) = Cgroup::ensure(&layout, &path("")).unwrap();
    assert!(!made, "the second finds it");
    let theirs = Guard(Cgroup::create(&layout, &path("/theirs")).unwrap());
    let empty = Guard(Cgroup::create(&layout, &path("/empty")).unwrap());
    let mut child = shell(&theirs.0, "sleep 60");
    first.give_back();
    assert!(
        theirs.0.exists() && empty.0.exists(),
        "others' cgroups stay, also empty ones"
    );
    assert_eq!(theirs.0.procs().unwrap(), [child.0.pid], "and what runs in them");
    process::send_signal(child.0.pidfd.as_fd(), libc::SIGKILL).unwrap();
    process::wait(child.0.pid).unwrap();
    std::mem::forget(std::mem::replace(&mut child, shell(&empty.0, "exit 0")));
    process::wait(child.0.pid).unwrap();
    std::mem::forget(child);
    drop((theirs, empty));
    assert!(
        second.exists(),
        "a container takes no parent along that it did not make"
    );
    second.give_back();
    let top = Cgroup::open(&layout, &CgroupPath::parse(&format!("/{name}")).unwrap()).unwrap();
    assert!(!top.exists(), "the last one out leaves nothing");
}

#[test]
fn root_a_parent_of_somebody_elses_is_never_removed() {
    if !common::root() {
        return;
    }
    let name = common::unique("foreign");
    let layout = Layout::detect().unwrap();
    let top = CgroupPath::parse(&format!("/{name}")).unwrap();
    let foreign = Cgroup::open(&layout, &top).unwrap();
    let dirs: Vec<PathBuf> = std::fs::read_dir("/sys/fs/cgroup")
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .chain([PathBuf::from("/sys/fs/cgroup")])
        .filter(|dir| dir.join("cgroup.procs").exists())
        .map(|dir| dir.join(&name))
        .collect();
    for dir in &dirs {
        // Links like /sys/fs/cgroup/cpu lead to the same.
        let _ = std::fs::create_dir(dir);
    }
    let (ours, made) = Cgroup::ensure(&layout, &top).unwrap();
    ours.give_back();
    let stayed = foreign.exists();
    for dir in &dirs {
        let _ = std::fs::remove_dir(dir);
    }
    assert!(!made && stayed);
}

#[test]
fn root_cgroups_whose_parents_come_and_go_are_made_all_the_same() {
    if !common::root() {
        return;
    }
    let name = common::unique("churn");
    let layout = Layout::detect().unwrap();
    let path = |n: usize| CgroupPath::parse(&format!("/{name}/a/b/c{n}")).unwrap();
    std::thread::scope(|scope| {
        for n in 0..2 {
            let (layout, path) = (&layout, &path);
            scope.spawn(move || {
                for _ in 0..300 {
                    let made = Cgroup::create(layout, &path(n)).unwrap();
                    made.remove(Duration::from_secs(5)).unwrap();
                }
            });
        }
    });
    let (top, _) = Cgroup::ensure(&layout, &CgroupPath::parse(&format!("/{name}/a/b")).unwrap()).unwrap();
    top.give_back();
    assert!(!top.exists());
}

#[test]
fn root_the_oom_killer_is_heard_and_counted() {
    if !common::root() {
        return;
    }
    let g = Guard::new("oom");
    g.0.apply(&Resources::from_json(r#"{"memory":{"limit":8388608,"swap":8388608}}"#).unwrap())
        .unwrap();
    let mut watch = g.0.oom_watch(&Resources::default()).unwrap();
    assert_eq!(watch.take(&g.0).unwrap(), 0);
    let child = shell(&g.0, "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done");
    let exited = process::wait(child.0.pid).unwrap();
    std::mem::forget(child);
    assert_eq!(exited.status, process::Status::Signal(libc::SIGKILL));
    let mut poll = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
    let second = rustix::event::Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    assert_eq!(
        rustix::event::poll(&mut poll, Some(&second)).unwrap(),
        1,
        "the descriptor is readable"
    );
    assert_eq!(watch.take(&g.0).unwrap(), 1);
    assert_eq!(g.0.oom_kills(), 1);
    assert_eq!(watch.take(&g.0).unwrap(), 0);
}

#[test]
fn root_a_relative_path_lies_below_our_own_cgroup_in_each_hierarchy() {
    if !common::root() {
        return;
    }
    let path = CgroupPath::parse(&common::unique("relative")).unwrap();
    let g = Guard(Cgroup::create(&Layout::detect().unwrap(), &path).unwrap());
    let child = shell(&g.0, "cat /proc/self/cgroup >/dev/null; sleep 60");
    let ours = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let theirs = std::fs::read_to_string(format!("/proc/{}/cgroup", child.0.pid)).unwrap();
    for (ours, theirs) in ours.lines().zip(theirs.lines()) {
        assert_eq!(
            theirs.trim_end_matches('/'),
            format!("{}/{}", ours.trim_end_matches('/'), g.0.path().display())
        );
    }
}

/// A directory of the v2 hierarchy that passes for all of one.
struct V2(PathBuf);

impl V2 {
    fn new() -> Option<V2> {
        let detected = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let mount = detected
            .into_iter()
            .find(|p| p.join("cgroup.controllers").exists())?;
        let dir = mount.join(common::unique("v2"));
        std::fs::create_dir(&dir).unwrap();
        Some(V2(dir))
    }

    fn guard(&self, what: &str) -> Guard {
        let path = CgroupPath::parse(&format!("/{}", common::unique(what))).unwrap();
        Guard(Cgroup::create(&Layout::at(&[], Some(&self.0)), &path).unwrap())
    }
}

impl Drop for V2 {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).unwrap();
    }
}

#[test]
fn root_v2_device_programs_decide_as_their_rules_say_and_replace_each_other() {
    if !common::root() {
        return;
    }
    let Some(v2) = V2::new() else {
        return drop(writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: no cgroup v2 here ***\n"
        ));
    };
    let g = v2.guard("devices");
    let apply = |json: &str| g.0.apply(&Resources::from_json(json).unwrap());
    let reads = |device: &str| {
        let child = shell(
            &g.0,
            &format!("head -c1 {device} > /tmp/slipway-test-{}", std::process::id()),
        );
        let code = process::wait(child.0.pid).unwrap().status.exit_code();
        std::mem::forget(child);
        code == 0
    };
    if let Err(e) = apply(
        r#"{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":5,"access":"r"}]}"#,
    ) {
        return drop(writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this kernel loads no device programs: {e:?} ***\n"
        ));
    }
    assert!(reads("/dev/zero") && !reads("/dev/urandom"));
    apply(r#"{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":9,"access":"rw"}]}"#)
        .unwrap();
    assert!(
        !reads("/dev/zero") && reads("/dev/urandom"),
        "the second program took the place of the first"
    );
    apply(r#"{"devices":[{"allow":true,"access":"rwm"}]}"#).unwrap();
    assert!(reads("/dev/zero") && reads("/dev/urandom"));
    apply(r#"{"pids":{"limit":-1}}"#).unwrap();
    assert!(reads("/dev/zero"), "an update without devices leaves them alone");
    std::fs::remove_file(format!("/tmp/slipway-test-{}", std::process::id())).unwrap();
    drop(g);
}

#[test]
fn root_v2_is_killed_at_once_and_frozen() {
    if !common::root() {
        return;
    }
    let Some(v2) = V2::new() else {
        return drop(writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: no cgroup v2 here ***\n"
        ));
    };
    let g = v2.guard("kill");
    let _child = shell(&g.0, "while :; do sleep 60 & sleep 0.01; done");
    assert!(eventually(|| g.0.procs().unwrap().len() > 5));
    g.0.freeze().unwrap();
    let before = g.0.procs().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(g.0.procs().unwrap(), before, "nothing is born in a frozen cgroup");
    g.0.kill().unwrap();
    g.0.wait_empty(Duration::from_secs(5)).unwrap();
    drop(g);
}
