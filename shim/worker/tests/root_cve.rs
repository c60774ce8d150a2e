//! What other runtimes had to learn the hard way: images and volumes that turn a create against the host. Each test has the
//! number of the vulnerability in its name; more of them stand with what they are about.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use common::Bundle;
use rustix::fs::{CWD, RenameFlags};
use serde_json::{Value, json};
use slipway_sys::ns::{self, IdMap, IdMaps, NewNamespaces};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exchanges two names for as long as something else goes on.
fn while_swapping<T>(a: &Path, b: &Path, act: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        let swap = s.spawn(|| {
            let mut swaps = 0u64;
            while !over.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
                swaps += 1;
                std::thread::sleep(std::time::Duration::from_micros(swaps % 7 * 20));
            }
            swaps
        });
        let result = act();
        over.store(true, Ordering::Relaxed);
        assert!(swap.join().unwrap() > 0, "there was no race");
        result
    })
}

fn mounts(b: &mut Bundle) -> &mut Vec<Value> {
    b.config["mounts"].as_array_mut().unwrap()
}

fn bind(source: &Path, destination: &str) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rw"]})
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    names
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn root_cve_2021_30465_a_mount_target_swapped_for_a_link_leads_nowhere() {
    if !common::root() {
        return;
    }
    // A volume of two containers: one of them swaps a directory in it for a link while the other one is created, which
    // has another mount in that directory.
    let volume = tempfile::tempdir().unwrap();
    let (outside, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(source.path().join("marker"), "x").unwrap();
    let (real, link) = (volume.path().join("real"), volume.path().join("link"));
    fs::create_dir(&real).unwrap();
    symlink(outside.path(), &link).unwrap();
    let before = slipway_sys::mount::mounts_under(outside.path()).unwrap();
    let made = while_swapping(&real, &link, || {
        let mut made = 0;
        for n in 0..60 {
            let mut b = Bundle::new("cat /proc/self/mountinfo");
            let inner = format!("/volume/real/inner{n}");
            let all = [bind(volume.path(), "/volume"), bind(source.path(), &inner)];
            mounts(&mut b).extend(all);
            if b.create().is_err() {
                continue;
            }
            made += 1;
            b.start();
            b.wait();
            let out = b.out();
            let root = outside.path().to_str().unwrap();
            assert!(
                !out.lines()
                    .any(|l| l.split(' ').nth(4).is_some_and(|at| at.starts_with(root))),
                "{out}"
            );
        }
        made
    });
    assert_eq!(
        names(outside.path()),
        Vec::<String>::new(),
        "a target was made outside"
    );
    assert_eq!(slipway_sys::mount::mounts_under(outside.path()).unwrap(), before);
    eprintln!("{made} of 60 were created");
}

#[test]
fn root_cve_2019_19921_a_proc_swapped_for_a_link_is_the_kernels_or_none() {
    if !common::root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir(outside.path().join("self")).unwrap();
    fs::write(outside.path().join("self/status"), "forged\n").unwrap();
    for n in 0..40 {
        let mut b = Bundle::new("read line < /proc/self/status; echo \"$line\"");
        let (real, link) = (b.rootfs().join("proc"), b.rootfs().join("link"));
        symlink(outside.path(), &link).unwrap();
        let created = while_swapping(&real, &link, || {
            let created = b.create().is_ok();
            std::thread::sleep(std::time::Duration::from_millis(2));
            created
        });
        if created {
            b.start();
            b.wait();
            assert!(!b.out().contains("forged"), "round {n}: {}", b.out());
        }
    }
    let mut left = names(outside.path());
    left.sort();
    assert_eq!(left, ["self"]);
    assert_eq!(names(&outside.path().join("self")), ["status"]);
    assert_eq!(
        fs::read_to_string(outside.path().join("self/status")).unwrap(),
        "forged\n"
    );
}

/// A file that nobody in a container may change, and what it was.
fn precious(dir: &Path) -> (std::path::PathBuf, impl Fn() + use<>) {
    use std::os::unix::fs::MetadataExt;
    let path = dir.join("precious");
    fs::write(&path, "precious").unwrap();
    let look = |path: &Path| {
        let m = fs::symlink_metadata(path).unwrap();
        (m.mode(), m.uid(), m.gid(), m.nlink(), fs::read(path).unwrap())
    };
    let (before, same) = (look(&path), path.clone());
    (path, move || assert_eq!(look(&same), before))
}

#[test]
fn root_cve_2025_52565_a_console_that_is_a_link_leads_nowhere() {
    if !common::root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let (target, is_unchanged) = precious(outside.path());
    for dev_is_mounted in [true, false] {
        let mut b = Bundle::new("echo hello > /dev/console; echo there");
        b.config["process"]["terminal"] = true.into();
        if !dev_is_mounted {
            mounts(&mut b).retain(|m| m["destination"] != "/dev");
            fs::create_dir_all(b.rootfs().join("dev/pts")).unwrap();
        }
        for name in ["console", "ptmx", "tty"] {
            symlink(&target, b.rootfs().join("dev").join(name)).unwrap();
        }
        if b.create().is_ok() {
            b.start();
            b.wait();
        }
        is_unchanged();
    }
}

#[test]
fn root_cve_2025_52881_and_2026_41579_an_image_cannot_turn_writes_to_proc_elsewhere() {
    if !common::root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let (target, is_unchanged) = precious(outside.path());
    let domain = || fs::read_to_string("/proc/sys/kernel/domainname").unwrap();
    let before = domain();
    let hostile = |dir: &Path| {
        for file in [
            "sys/kernel/domainname",
            "self/attr/exec",
            "self/oom_score_adj",
            "self/loginuid",
            "thread-self/attr/exec",
        ] {
            let path = dir.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(&target, path).unwrap();
        }
    };
    // No proc at all but the image's; then one over whose parts the image's are mounted.
    for covered in [false, true] {
        let mut b = Bundle::new("echo ran");
        b.config["linux"]["sysctl"] = json!({"kernel.domainname": "evil"});
        b.config["process"]["oomScoreAdj"] = json!(500);
        let forged = tempfile::tempdir().unwrap();
        if covered {
            hostile(forged.path());
            let sys = bind(&forged.path().join("sys"), "/proc/sys");
            mounts(&mut b).push(sys);
        } else {
            mounts(&mut b).retain(|m| m["destination"] != "/proc");
            b.config["linux"]["maskedPaths"] = json!([]);
            b.config["linux"]["readonlyPaths"] = json!([]);
            hostile(&b.rootfs().join("proc"));
        }
        if b.create().is_ok() {
            b.start();
            b.wait();
        }
        is_unchanged();
        assert_eq!(domain(), before, "the host's");
    }
}

#[test]
fn root_cve_2025_47291_a_container_in_a_user_namespace_is_in_its_own_cgroup() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ready; exec sleep 60");
    let pins = tempfile::tempdir().unwrap();
    let map = vec![IdMap {
        container_id: 0,
        host_id: 200_000,
        length: 65536,
    }];
    let new = NewNamespaces {
        user: Some(IdMaps {
            uids: map.clone(),
            gids: map,
        }),
        net: true,
        ipc: true,
        ..NewNamespaces::default()
    };
    let pinned = ns::pin(&new, pins.path(), &[]).unwrap();
    let mut list = vec![
        json!({"type": "mount"}),
        json!({"type": "pid"}),
        json!({"type": "cgroup"}),
    ];
    for (kind, path) in &pinned {
        let name = if *kind == ns::Kind::Net {
            "network"
        } else {
            kind.name()
        };
        list.push(json!({"type": name, "path": path}));
    }
    b.config["linux"]["namespaces"] = list.into();
    b.config["hostname"] = Value::Null;
    let maps = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
    b.config["linux"]["uidMappings"] = maps.clone();
    b.config["linux"]["gidMappings"] = maps;
    b.run_until_ready();
    let pid = b.init.as_ref().unwrap().pid;
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let wrong: Vec<_> = cgroups
        .lines()
        .filter(|line| !line.ends_with(&format!("/{}", b.id)))
        .collect();
    assert!(wrong.is_empty(), "in every hierarchy: {wrong:?}");
    let (_, out) = b.exec(&b.script("cat /proc/self/cgroup")).unwrap();
    assert!(
        out.lines().all(|l| l.ends_with(&b.id) || l.ends_with(":/")),
        "{out}"
    );
    drop(b);
    for (_, path) in pinned {
        ns::unpin(&path).unwrap();
    }
}
