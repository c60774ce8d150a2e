//! Containers made by the worker, as root: what they are like, what goes wrong, and what hostile images get.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use common::Bundle;
use serde_json::{Value, json};
use slipway_sys::ns::{self, IdMap, IdMaps, NewNamespaces};
use slipway_sys::process::{self, Status};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

fn mount(b: &mut Bundle, value: Value) {
    b.config["mounts"].as_array_mut().unwrap().push(value);
}

#[test]
fn root_a_container_is_created_started_and_ends() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo pid $$ home $HOME a $A host $(cat /proc/sys/kernel/hostname); exit 7");
    let (code, out) = b.run();
    assert_eq!((code, out.trim()), (7, "pid 1 home /root a 1 host c"));
    // What the worker leaves is what it says it leaves.
    let left: Vec<_> = fs::read_dir(b.dir.path().join("state"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, [b.id.as_str()]);
}

#[test]
fn root_nothing_runs_before_the_start_and_a_kill_before_it_is_an_exit() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ran");
    b.create().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(b.out(), "");
    process::send_signal(b.init.as_ref().unwrap().pidfd.as_fd(), libc::SIGKILL).unwrap();
    assert_eq!(b.wait().status, Status::Signal(libc::SIGKILL));
    assert_eq!(b.out(), "");
}

#[test]
fn root_init_keeps_the_report_socket_until_it_runs_its_program() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("sleep 60");
    let (report, _, socket) = b.run_worker();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    b.init = Some(process::Child {
        pid,
        pidfd: process::pidfd_open(pid).unwrap(),
    });
    let mut socket = fs::File::from(socket);
    let ended = |s: &fs::File, ms: i64| {
        let mut poll = [rustix::event::PollFd::new(s, rustix::event::PollFlags::IN)];
        let spec = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: ms * 1_000_000,
        };
        rustix::event::poll(&mut poll, Some(&spec)).unwrap() == 1
    };
    assert!(!ended(&socket, 50), "not before the start");
    b.start();
    assert!(
        ended(&socket, 900),
        "the end of the stream says that the program runs"
    );
    let mut rest = String::new();
    socket.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
}

#[test]
fn root_a_program_that_is_not_there_is_told_at_create_and_one_that_cannot_run_at_start() {
    if !common::root() {
        return;
    }
    for (args, code) in [
        (json!(["nothing-like-it"]), Some(127)),
        (json!(["/etc"]), Some(126)),
        (json!([""]), None),
    ] {
        let mut b = Bundle::new("");
        b.config["process"]["args"] = args;
        let report = b.create().unwrap_err();
        assert_eq!(report["exit_code"].as_u64(), code, "{report}");
        assert!(
            !b.dir.path().join("state").join(&b.id).exists(),
            "a failed create leaves its record"
        );
    }
    let mut b = Bundle::new("");
    fs::write(b.rootfs().join("bin/garbage"), [7u8; 64]).unwrap();
    fs::set_permissions(b.rootfs().join("bin/garbage"), PermissionsExt::from_mode(0o755)).unwrap();
    b.config["process"]["args"] = json!(["garbage"]);
    let (report, _, socket) = b.run_worker();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    b.init = Some(process::Child {
        pid,
        pidfd: process::pidfd_open(pid).unwrap(),
    });
    b.start();
    let mut line = String::new();
    fs::File::from(socket).read_to_string(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(said["exit_code"].as_u64(), Some(126), "{said}");
    assert!(said["error"].as_str().unwrap().contains("garbage"), "{said}");
    assert_eq!(b.wait().status, Status::Code(126));
    assert_eq!(b.out(), "", "nothing of ours in the container's streams");
}

#[test]
fn root_a_program_only_its_owner_may_execute_runs_as_its_owner() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("");
    fs::create_dir(b.rootfs().join("own")).unwrap();
    fs::copy("/bin/busybox", b.rootfs().join("own/busybox")).unwrap();
    std::os::unix::fs::chown(b.rootfs().join("own/busybox"), Some(1000), Some(1000)).unwrap();
    fs::set_permissions(b.rootfs().join("own/busybox"), PermissionsExt::from_mode(0o500)).unwrap();
    b.config["process"]["args"] = json!(["/own/busybox", "id", "-u"]);
    b.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    assert_eq!(b.run(), (0, "1000\n".into()));
    let mut b = Bundle::new("");
    fs::create_dir(b.rootfs().join("own")).unwrap();
    fs::copy("/bin/busybox", b.rootfs().join("own/busybox")).unwrap();
    fs::set_permissions(b.rootfs().join("own/busybox"), PermissionsExt::from_mode(0o500)).unwrap();
    b.config["process"]["args"] = json!(["/own/busybox", "id", "-u"]);
    b.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    b.config["process"]["capabilities"] = Value::Null;
    let (report, _, _socket) = b.run_worker();
    let told = report["exit_code"].as_u64() == Some(126);
    assert!(told || report["pid"].is_u64(), "{report}");
}

#[test]
fn root_a_failure_names_its_cause() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("true");
    mount(
        &mut b,
        json!({"destination": "/data", "type": "bind", "source": "/no/such/source", "options": ["rbind"]}),
    );
    let report = b.create().unwrap_err();
    let error = report["error"].as_str().unwrap();
    assert!(
        error.contains("/no/such/source") && error.contains("No such file"),
        "{error}"
    );
    let mut b = Bundle::new("true");
    b.config["linux"]["rootfsPropagation"] = json!("sideways");
    assert!(
        b.create().unwrap_err()["error"]
            .as_str()
            .unwrap()
            .contains("sideways")
    );
    let mut b = Bundle::new("true");
    fs::remove_dir_all(b.rootfs()).unwrap();
    assert!(
        b.create().unwrap_err()["error"]
            .as_str()
            .unwrap()
            .contains("rootfs")
    );
}

#[test]
fn root_the_container_sees_its_own_cgroup_and_may_not_write_it() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new(
        "cd /sys/fs/cgroup; ls; cat memory/memory.limit_in_bytes memory.max 2>/dev/null; \
         echo 1 > memory/memory.limit_in_bytes; mkdir memory/x pids/x x; cat */cgroup.procs cgroup.procs 2>/dev/null | sort -u; ls /mnt /srv 2>&1",
    );
    let limits = r#"{"memory":{"limit":67108864}}"#;
    b.cgroup
        .apply(&slipway_sys::cgroup::Resources::from_json(limits).unwrap())
        .unwrap();
    let (_, out) = b.run();
    assert!(out.contains("67108864"), "its own limit: {out}");
    assert!(out.matches("Read-only file system").count() >= 3, "{out}");
    assert!(fs::metadata("/sys/fs/cgroup/container").is_err() && fs::metadata("/mnt/cgroup").is_err());
}

#[test]
fn root_a_container_that_binds_the_host_sees_the_machines_cgroups() {
    if !common::root() {
        return;
    }
    let mut b =
        Bundle::new("ls /host/sys/fs/cgroup; cat /host/sys/fs/cgroup/*/cgroup.procs | wc -l; ls /host/mnt");
    mount(
        &mut b,
        json!({"destination": "/host", "type": "bind", "source": "/", "options": ["rbind", "rslave", "ro"]}),
    );
    let (code, out) = b.run();
    let top: Vec<_> = fs::read_dir("/sys/fs/cgroup")
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    for name in top {
        assert!(out.contains(name.to_str().unwrap()), "{name:?} is not in {out}");
    }
    assert_eq!(code, 0, "{out}");
}

#[test]
fn root_a_mount_that_travels_back_reaches_the_host() {
    if !common::root() {
        return;
    }
    let shared = tempfile::tempdir().unwrap();
    slipway_sys::mount::tmpfs(shared.path(), 1 << 20, 0o755).unwrap();
    slipway_sys::mount::set_propagation(shared.path(), slipway_sys::mount::Propagation::Shared, false)
        .unwrap();
    fs::create_dir(shared.path().join("sub")).unwrap();
    let mut b = Bundle::new(
        "busybox mount -t tmpfs none /shared/sub && touch /shared/sub/here; echo ready; exec sleep 60",
    );
    let caps = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    b.config["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    let source = shared.path().to_str().unwrap();
    mount(
        &mut b,
        json!({"destination": "/shared", "type": "bind", "source": source, "options": ["rbind", "rshared"]}),
    );
    b.config["linux"]["rootfsPropagation"] = json!("rshared");
    b.run_until_ready();
    assert!(shared.path().join("sub/here").exists(), "{}", b.out());
    drop(b);
    for m in slipway_sys::mount::mounts_under(shared.path()).unwrap() {
        slipway_sys::mount::unmount(&m, true).unwrap();
    }
}

#[test]
fn root_id_mapped_mounts_show_mapped_owners_and_leave_nothing() {
    if !common::root() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    fs::write(data.path().join("f"), "x").unwrap();
    let mut b = Bundle::new("ls -ln /data; cat /data/f");
    let map = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    mount(
        &mut b,
        json!({"destination": "/data", "type": "bind", "source": data.path().to_str().unwrap(),
               "options": ["rbind", "idmap"], "uidMappings": map, "gidMappings": map}),
    );
    let (code, out) = b.run();
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("1000     1000"), "{out}");
    assert_eq!(fs::metadata(data.path().join("f")).unwrap().uid(), 0);
}

#[test]
fn root_a_user_namespace_container_works_below_directories_it_may_not_enter() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new(
        "cat /data/f; id -u; touch /made && ls -ln /made; cat /proc/self/uid_map; ls /sys/fs/cgroup; echo x > /dev/null",
    );
    let pins = tempfile::tempdir().unwrap();
    let data = tempfile::tempdir().unwrap();
    for dir in [pins.path(), data.path(), b.dir.path()] {
        fs::set_permissions(dir, PermissionsExt::from_mode(0o700)).unwrap();
    }
    fs::create_dir(data.path().join("in")).unwrap();
    fs::write(data.path().join("in/f"), "shown\n").unwrap();
    let map = vec![IdMap {
        container_id: 0,
        host_id: 500_000,
        length: 65536,
    }];
    let new = NewNamespaces {
        user: Some(IdMaps {
            uids: map.clone(),
            gids: map,
        }),
        net: true,
        ipc: true,
        uts: Some("pod".into()),
    };
    let pinned = ns::pin(&new, pins.path(), &[]).unwrap();
    let mut list = vec![
        json!({"type": "mount"}),
        json!({"type": "pid"}),
        json!({"type": "cgroup"}),
    ];
    for (kind, path) in &pinned {
        let name = if kind.name() == "net" {
            "network"
        } else {
            kind.name()
        };
        list.push(json!({"type": name, "path": path}));
    }
    b.config["linux"]["namespaces"] = json!(list);
    b.config["hostname"] = Value::Null;
    let ids = json!([{"containerID": 0, "hostID": 500_000, "size": 65536}]);
    b.config["linux"]["uidMappings"] = ids.clone();
    b.config["linux"]["gidMappings"] = ids;
    let source = data.path().join("in");
    mount(
        &mut b,
        json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind", "ro"]}),
    );
    chown_tree(&b.rootfs(), 500_000);
    let (code, out) = b.run();
    assert_eq!(code, 0, "{out}");
    assert!(out.starts_with("shown\n0\n") && out.contains("500000"), "{out}");
    assert_eq!(fs::metadata(b.rootfs().join("made")).unwrap().uid(), 500_000);
    for (_, path) in pinned {
        ns::unpin(&path).unwrap();
    }
}

fn chown_tree(path: &Path, id: u32) {
    std::os::unix::fs::lchown(path, Some(id), Some(id)).unwrap();
    if path.symlink_metadata().unwrap().is_dir() {
        fs::read_dir(path)
            .unwrap()
            .for_each(|e| chown_tree(&e.unwrap().path(), id));
    }
}

#[test]
fn root_a_terminal_comes_with_the_report() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new(
        "readlink /proc/self/fd/0; test -t 1 && echo tty; exec 3</dev/tty && echo controlling; cat > /dev/null & exit 5",
    );
    b.config["process"]["terminal"] = json!(true);
    let master = b.create().unwrap().expect("a terminal");
    b.start();
    let mut master = fs::File::from(master);
    master.write_all(b"hello\n").unwrap();
    let mut text = Vec::new();
    let mut some = [0u8; 512];
    while let Ok(n) = master.read(&mut some) {
        if n == 0 {
            break;
        }
        text.extend_from_slice(&some[..n]);
    }
    assert_eq!(b.wait().status, Status::Code(5));
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.contains("/dev/pts/0") && text.contains("tty") && text.contains("controlling"),
        "{text}"
    );
}

#[test]
fn root_missing_working_directories_are_made_also_on_mounts_and_read_only_roots() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("pwd");
    b.config["process"]["cwd"] = json!("/new/deep/dir");
    b.config["root"]["readonly"] = json!(true);
    assert_eq!(b.run(), (0, "/new/deep/dir\n".into()));
    let data = tempfile::tempdir().unwrap();
    let mut b = Bundle::new("pwd");
    b.config["process"]["cwd"] = json!("/data/x/y");
    b.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let source = data.path().to_str().unwrap();
    mount(
        &mut b,
        json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind"]}),
    );
    assert_eq!(b.run(), (0, "/data/x/y\n".into()));
    assert_eq!(fs::metadata(data.path().join("x/y")).unwrap().uid(), 0);
}

#[test]
fn root_cve_2024_21626_hostile_working_directories_are_refused() {
    if !common::root() {
        return;
    }
    for n in 0..14 {
        let mut b = Bundle::new("pwd");
        b.config["process"]["cwd"] = json!(format!("/proc/self/fd/{n}"));
        assert!(b.create().is_err(), "fd {n}");
    }
    for n in 0..14 {
        for target in ["", "/x"] {
            let mut b = Bundle::new("pwd; ls -a");
            symlink(format!("/proc/self/fd/{n}"), b.rootfs().join("work")).unwrap();
            b.config["process"]["cwd"] = json!(format!("/work{target}"));
            match b.create() {
                Err(_) => {}
                Ok(_) => {
                    // A path that happens to exist inside as well: then that is where it is.
                    b.start();
                    b.wait();
                    let out = b.out();
                    assert!(
                        out.starts_with('/') && !out.contains("config.json"),
                        "fd {n}{target}: {out}"
                    );
                }
            }
        }
    }
}

#[test]
fn root_cve_2025_31133_images_whose_system_directories_are_links_reach_nothing_outside() {
    if !common::root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("ptmx"), "precious").unwrap();
    for name in ["dev", "proc", "sys"] {
        for target in [outside.path().to_str().unwrap(), "../../../../../../etc", "/etc"] {
            let mut b = Bundle::new("true");
            fs::remove_dir(b.rootfs().join(name)).unwrap();
            symlink(target, b.rootfs().join(name)).unwrap();
            let report = b.create().unwrap_err();
            assert!(
                report["error"].as_str().unwrap().contains("no directory"),
                "{report}"
            );
        }
    }
    // Links below, which mounts or files cover, are harmless, or stay inside.
    let mut b = Bundle::new("cat /etc/hosts; ls -l /dev/null; echo x > /dev/null; test -c /dev/null");
    symlink(outside.path().join("ptmx"), b.rootfs().join("dev/null")).unwrap();
    symlink(outside.path().join("ptmx"), b.rootfs().join("dev/console")).unwrap();
    symlink(outside.path(), b.rootfs().join("dev/pts")).unwrap();
    // An absolute link that means something inside, and the same thing to somebody else outside.
    fs::rename(b.rootfs().join("etc"), b.rootfs().join("srv")).unwrap();
    symlink("/srv", b.rootfs().join("etc")).unwrap();
    symlink(outside.path().join("hosts"), b.rootfs().join("srv/hosts")).unwrap();
    let hosts = outside.path().join("hosts-for-it");
    fs::write(&hosts, "127.0.0.1 me\n").unwrap();
    let bind =
        json!({"destination": "/etc/hosts", "type": "bind", "source": hosts, "options": ["rbind", "ro"]});
    mount(&mut b, bind.clone());
    let refused = b.create();
    assert!(refused.is_err(), "a mount on a link that leads to nothing");
    drop(b);
    let mut b = Bundle::new("cat /etc/hosts; echo x > /dev/null; test -c /dev/null");
    symlink(outside.path().join("ptmx"), b.rootfs().join("dev/null")).unwrap();
    fs::rename(b.rootfs().join("etc"), b.rootfs().join("srv")).unwrap();
    symlink("/srv", b.rootfs().join("etc")).unwrap();
    mount(&mut b, bind);
    let (code, out) = b.run();
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("127.0.0.1 me"), "{out}");
    assert!(!Path::new("/srv/hosts").exists());
    assert_eq!(
        fs::read_to_string(outside.path().join("ptmx")).unwrap(),
        "precious"
    );
    let mut names: Vec<_> = fs::read_dir(outside.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["hosts-for-it", "ptmx"], "something was made outside");
    assert!(!Path::new("/etc/fd").exists() && !Path::new("/etc/stdin").exists());
}

#[test]
fn root_cve_2025_31133_devices_without_a_dev_mount_do_not_follow_an_images_links() {
    if !common::root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("target"), "precious").unwrap();
    let mut b = Bundle::new("true");
    b.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev"));
    symlink(outside.path().join("target"), b.rootfs().join("dev/null")).unwrap();
    let _ = b.create();
    assert_eq!(
        fs::read_to_string(outside.path().join("target")).unwrap(),
        "precious"
    );
    assert_eq!(
        fs::symlink_metadata(outside.path().join("target"))
            .unwrap()
            .nlink(),
        1
    );
}

#[test]
fn root_cve_2019_5736_the_worker_cannot_be_overwritten_from_inside() {
    if !common::root() {
        return;
    }
    let worker = common::worker();
    let before = fs::read(&worker).unwrap();
    // CVE-2019-5736: the program is a link to /proc/self/exe, so that it would be the runtime itself that runs.
    let mut b = Bundle::new("");
    symlink("/proc/self/exe", b.rootfs().join("bin/evil")).unwrap();
    b.config["process"]["args"] = json!(["/bin/evil", "features"]);
    let caps = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"]);
    b.config["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    if b.create().is_ok() {
        b.start();
        b.wait();
    }
    // And by a container that waits for an exec to come in.
    let mut b = Bundle::new(
        "echo ready; while :; do for p in /proc/[0-9]*; do echo evil 2>/dev/null > $p/exe; done; done",
    );
    b.config["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
    b.run_until_ready();
    for _ in 0..30 {
        let _ = b.exec(&b.script("true"));
    }
    let mut p = b.process();
    p.args = vec!["/proc/self/exe".into(), "features".into()];
    let _ = b.exec(&p);
    assert_eq!(fs::read(&worker).unwrap(), before, "the worker was changed");
}

#[test]
fn root_masked_and_read_only_paths_are() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new(
        "cat /proc/keys | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/panic; echo done",
    );
    let (_, out) = b.run();
    assert!(
        out.starts_with("0\n0\n") && out.contains("Read-only") && out.contains("done"),
        "{out}"
    );
}

#[test]
fn root_twenty_containers_at_once_are_created_and_removed() {
    if !common::root() {
        return;
    }
    let all: Vec<_> = std::thread::scope(|s| {
        let one = || {
            let mut b = Bundle::new("echo $$; exit 3");
            b.run()
        };
        let threads: Vec<_> = (0..20).map(|_| s.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(all.iter().all(|r| *r == (3, "1\n".to_string())), "{all:?}");
}
