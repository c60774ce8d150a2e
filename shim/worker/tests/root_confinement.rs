//! What is executed in a container is confined exactly as its init: looked at from inside, side by side.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use common::Bundle;
use serde_json::json;
use slipway_sys::exec::ExecError;
use slipway_sys::ns::{self, IdMap, IdMaps, NewNamespaces};
use slipway_sys::process;
use std::io::Read;
use std::os::fd::AsFd;

/// Everything that confines a process, as the process itself sees it. `$1` is the pid to look at.
const LOOK: &str = r#"
look() {
  while read k v; do
    case $k in Cap*|Seccomp*|NoNewPrivs:|Groups:|Uid:|Gid:|Umask:|CoreDumping:|THP_enabled:|Speculation*) echo "$k $v";; esac
  done < /proc/$1/status
  for f in uid_map gid_map cgroup limits oom_score_adj loginuid; do echo "$f:"; cat /proc/$1/$f; done
  for n in user pid mnt net ipc uts cgroup time; do echo $n $(readlink /proc/$1/ns/$n); done
  echo root $(readlink /proc/$1/root) cwd $(readlink /proc/$1/cwd)
  cat /proc/$1/attr/current 2>/dev/null; echo
}
"#;

/// Init's own view of itself, then an exec's of itself: they must be the same line for line.
fn assert_same_confinement(b: &mut Bundle) -> String {
    b.config["process"]["args"] = json!([
        "/bin/sh",
        "-c",
        format!("{LOOK} look self; echo ready; exec sleep 60")
    ]);
    b.run_until_ready();
    let init = b.out().replace("ready\n", "");
    let (code, exec) = b.exec(&b.script(&format!("{LOOK} look self"))).unwrap();
    assert_eq!(code, 0, "{exec}");
    let (init_lines, exec_lines): (Vec<_>, Vec<_>) = (init.lines().collect(), exec.lines().collect());
    for (i, e) in init_lines.iter().zip(&exec_lines) {
        assert_eq!(i, e, "init and exec differ");
    }
    assert_eq!(init_lines.len(), exec_lines.len());
    assert!(
        init.contains("Seccomp:") && init.contains("user user:["),
        "{init}"
    );
    init
}

fn seccomp() -> serde_json::Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["chmod", "fchmod"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 1, "value": 0o7000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["fchmodat"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 2, "value": 0o7000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["no_such_call"], "action": "SCMP_ACT_ERRNO"}
        ]
    })
}

#[test]
fn root_exec_is_confined_as_init_with_defaults() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("");
    let seen = assert_same_confinement(&mut b);
    assert!(
        seen.contains("NoNewPrivs: 0") && seen.contains("Seccomp: 0"),
        "{seen}"
    );
    assert!(seen.contains("Groups:"), "no groups of the host's root: {seen}");
    assert!(seen.contains("CapEff: 00000000000005fb"), "{seen}");
}

#[test]
fn root_exec_is_confined_as_init_with_seccomp_but_without_no_new_privs() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("");
    b.config["linux"]["seccomp"] = seccomp();
    b.config["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 1001], "umask": 63});
    let seen = assert_same_confinement(&mut b);
    assert!(
        seen.contains("NoNewPrivs: 0") && seen.contains("Seccomp: 2"),
        "{seen}"
    );
    assert!(
        seen.contains("Groups: 5 1001") && seen.contains("Uid: 1000\t1000\t1000\t1000"),
        "{seen}"
    );
    let (_, out) = b
        .exec(&b.script("mkdir /tmp/x 2>&1; touch /tmp/f; chmod 755 /tmp/f && echo plain; chmod 4755 /tmp/f"))
        .unwrap();
    assert!(out.contains("not implemented") && out.contains("plain"), "{out}");
    assert!(
        out.contains("not permitted"),
        "a masked comparison compares what it should: {out}"
    );
}

#[test]
fn root_exec_is_confined_as_init_with_seccomp_no_new_privs_and_a_user() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("");
    b.config["linux"]["seccomp"] = seccomp();
    b.config["process"]["noNewPrivileges"] = json!(true);
    b.config["process"]["user"] = json!({"uid": 1000, "gid": 100});
    b.config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    b.config["process"]["oomScoreAdj"] = json!(321);
    let one = json!(["CAP_NET_BIND_SERVICE"]);
    b.config["process"]["capabilities"] =
        json!({"bounding": one, "effective": one, "permitted": one, "inheritable": one, "ambient": one});
    b.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "cgroup"}));
    let seen = assert_same_confinement(&mut b);
    assert!(
        seen.contains("NoNewPrivs: 1") && seen.contains("Seccomp: 2"),
        "{seen}"
    );
    assert!(
        seen.contains("CapEff: 0000000000000400") && seen.contains("CapBnd: 0000000000000400"),
        "{seen}"
    );
    assert!(
        seen.contains("CapAmb: 0000000000000400") && seen.contains("321"),
        "{seen}"
    );
    let (_, out) = b.exec(&b.script("mkdir /tmp/x")).unwrap();
    assert!(out.contains("not implemented"), "{out}");
}

#[test]
fn root_exec_is_confined_as_init_in_a_user_namespace() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("");
    let pins = tempfile::tempdir().unwrap();
    let map = vec![IdMap {
        container_id: 0,
        host_id: 300_000,
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
    let pinned = ns::pin(&new, pins.path(), &[]).unwrap();
    let mut list = vec![json!({"type": "mount"}), json!({"type": "pid"})];
    for (kind, path) in &pinned {
        let name = if kind.name() == "net" {
            "network"
        } else {
            kind.name()
        };
        list.push(json!({"type": name, "path": path}));
    }
    b.config["linux"]["namespaces"] = json!(list);
    b.config["hostname"] = serde_json::Value::Null;
    let ids = json!([{"containerID": 0, "hostID": 300_000, "size": 65536}]);
    b.config["linux"]["uidMappings"] = ids.clone();
    b.config["linux"]["gidMappings"] = ids;
    b.config["linux"]["seccomp"] = seccomp();
    b.config["process"]["cwd"] = json!("/made/here");
    own_by(&b.rootfs(), 300_000);
    let seen = assert_same_confinement(&mut b);
    assert!(seen.contains("300000"), "{seen}");
    assert!(
        seen.contains("Seccomp: 2") && seen.contains("cwd /made/here"),
        "{seen}"
    );
    let init = b.init.as_ref().unwrap().pid;
    let status = std::fs::read_to_string(format!("/proc/{init}/status")).unwrap();
    assert!(status.contains("Uid:\t300000\t300000"), "{status}");
    drop(b);
    for (_, path) in pinned {
        ns::unpin(&path).unwrap();
    }
}

fn own_by(path: &std::path::Path, id: u32) {
    std::os::unix::fs::lchown(path, Some(id), Some(id)).unwrap();
    if path.symlink_metadata().unwrap().is_dir() {
        for e in std::fs::read_dir(path).unwrap() {
            own_by(&e.unwrap().path(), id);
        }
    }
}

#[test]
fn root_cve_2024_21626_neither_init_nor_exec_inherits_a_descriptor() {
    if !common::root() {
        return;
    }
    let _leak = std::fs::File::open("/").unwrap();
    let mut b = Bundle::new("ls -l /proc/self/fd /proc/1/fd; echo ready; exec sleep 60");
    b.run_until_ready();
    // ls itself has the directory open as 3.
    let numbers = |text: &str| -> Vec<String> {
        let links = text
            .lines()
            .filter(|l| l.starts_with("l") && !l.starts_with("ls:"));
        links
            .filter_map(|l| l.split_whitespace().nth(8).map(str::to_string))
            .collect()
    };
    let seen = b.out();
    assert_eq!(numbers(&seen), ["0", "1", "2", "0", "1", "2", "3"], "{seen}");
    let (_, out) = b.exec(&b.script("exec ls -l /proc/self/fd")).unwrap();
    assert_eq!(numbers(&out), ["0", "1", "2", "3"], "{out}");
    assert!(
        out.contains("cannot read link") || out.contains("3 -> /proc/"),
        "the fourth is ls's own: {out}"
    );
}

#[test]
fn root_cve_2024_21626_a_working_directory_that_leads_outside_is_refused() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ready; exec sleep 60");
    std::os::unix::fs::symlink("/proc/self/fd/7", b.rootfs().join("trap")).unwrap();
    std::os::unix::fs::symlink("/proc/self/fd/4", b.rootfs().join("trap4")).unwrap();
    b.run_until_ready();
    for n in 0..20 {
        let mut p = b.script("pwd");
        p.cwd = format!("/proc/self/fd/{n}");
        let result = b.exec(&p);
        assert!(result.is_err(), "fd {n}: {result:?}");
    }
    for trap in ["/trap", "/trap4", "/proc/self/fd/../../../..//nothing"] {
        let mut p = b.script("pwd");
        p.cwd = trap.into();
        assert!(b.exec(&p).is_err(), "{trap}");
    }
    let mut p = b.script("pwd");
    p.cwd = "relative".into();
    assert!(matches!(b.exec(&p), Err(ExecError::Invalid { .. })));
}

#[test]
fn root_programs_that_cannot_be_run_are_told_apart() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ready; exec sleep 60");
    std::fs::write(b.rootfs().join("text"), "no program").unwrap();
    std::fs::write(b.rootfs().join("bin/garbage"), [0u8; 100]).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(b.rootfs().join("bin/garbage"), mode).unwrap();
    b.run_until_ready();
    let code = |args: &[&str]| {
        let mut p = b.process();
        p.args = args.iter().map(|a| a.to_string()).collect();
        b.exec(&p).unwrap_err().exit_code()
    };
    assert_eq!(code(&["nothing-like-it"]), Some(127));
    assert_eq!(code(&["/no/such/file"]), Some(127));
    assert_eq!(code(&["/text"]), Some(126));
    assert_eq!(code(&["/etc"]), Some(126));
    assert_eq!(code(&["garbage"]), Some(126));
    assert_eq!(code(&["/bin/sh/x"]), Some(127));
    assert_eq!(code(&[""]), None);
    let (code, out) = b.exec(&b.script("exit 9")).unwrap();
    assert_eq!((code, out.as_str()), (9, ""));
}

#[test]
fn root_an_exec_leaves_no_zombie_to_init_and_dies_with_it() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ready; exec sleep 60");
    b.run_until_ready();
    for _ in 0..20 {
        b.exec(&b.script("true")).unwrap();
    }
    let mut missing = b.process();
    missing.args = vec!["nothing".into()];
    b.exec(&missing).unwrap_err();
    let init = b.init.as_ref().unwrap().pid;
    let children = std::fs::read_to_string(format!("/proc/{init}/task/{init}/children")).unwrap();
    assert_eq!(children.trim(), "", "init has children it never made");
    let sleeper = b.spawn(&b.script("sleep 60"), [None; 3]).unwrap();
    let ours = std::fs::read_to_string(format!("/proc/{}/status", sleeper.pid)).unwrap();
    assert!(ours.contains(&format!("PPid:\t{}", std::process::id())), "{ours}");
    process::send_signal(b.init.as_ref().unwrap().pidfd.as_fd(), libc::SIGKILL).unwrap();
    assert_eq!(
        process::wait(sleeper.pid).unwrap().status,
        process::Status::Signal(libc::SIGKILL)
    );
    b.wait();
    assert!(matches!(b.exec(&b.script("true")), Err(ExecError::Gone)));
}

#[test]
fn root_an_exec_with_a_terminal_has_one_of_the_containers_own() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ready; exec sleep 60");
    b.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    b.run_until_ready();
    let mut p = b.script(
        "stty size; readlink /proc/self/fd/0; id -u; ls -ln /dev/pts; exec 3</dev/tty && echo tty; exit 4",
    );
    p.terminal = true;
    p.console_size = Some(slipway_sys::exec::ConsoleSize {
        height: 33,
        width: 111,
    });
    let spawned = b.spawn(&p, [None; 3]).unwrap();
    let mut master = std::fs::File::from(spawned.pty_master.unwrap());
    let mut text = Vec::new();
    let mut some = [0u8; 1024];
    while let Ok(n) = master.read(&mut some) {
        if n == 0 {
            break;
        }
        text.extend_from_slice(&some[..n]);
    }
    let text = String::from_utf8_lossy(&text);
    assert_eq!(
        process::wait(spawned.pid).unwrap().status.exit_code(),
        4,
        "{text}"
    );
    for expected in ["33 111", "/dev/pts/0", "1000", "tty"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn root_pipes_given_to_an_exec_can_be_opened_again_by_its_user() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo ready; exec sleep 60");
    b.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    b.run_until_ready();
    let (code, out) = b.exec(&b.script("echo again > /dev/stdout")).unwrap();
    assert_eq!((code, out.as_str()), (0, "again\n"));
}

#[test]
fn root_an_exec_has_the_containers_null_device_and_cannot_change_the_hosts() {
    use std::os::unix::fs::MetadataExt;
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("stat -L -c 'null %d:%i' /dev/null; echo ready; exec sleep 60");
    b.run_until_ready();
    let state = || {
        let m = std::fs::metadata("/dev/null").unwrap();
        (m.dev(), m.ino(), m.mode(), m.uid(), m.ctime(), m.ctime_nsec())
    };
    let host = state();
    let out = b.out();
    let own = out
        .lines()
        .find_map(|l| l.strip_prefix("null "))
        .unwrap()
        .to_owned();
    assert_ne!(own, format!("{}:{}", host.0, host.1), "init has one of its own");
    let look = |script: &str| {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let p = b.script(script);
        let spawned = b.spawn(&p, [None, Some(write.as_fd()), None]).unwrap();
        drop(write);
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(
            process::wait(spawned.pid).unwrap().status.exit_code(),
            0,
            "{text}"
        );
        text
    };
    // Which one it is comes first: what this test is about must not happen to the machine that it runs on.
    let which = look("stat -L -c %d:%i /proc/$$/fd/0 /proc/$$/fd/2");
    assert_eq!(which, format!("{own}\n{own}\n"));
    let tried = look("chmod 000 /proc/self/fd/0 && stat -c %a /dev/null; chmod 666 /dev/null; cat");
    assert_eq!(tried, "0\n", "it is the container's, who may");
    for hide in [
        "rm /dev/null",
        "ln -s /dev/zero /dev/null",
        "rm /dev/null; mkfifo /dev/null",
        "rm /dev/null; mkdir /dev/null",
        "rmdir /dev/null; echo text > /dev/null",
    ] {
        look(hide);
        let tried = look(
            "exec 3>&2 2>&1; chmod 666 /proc/self/fd/3; chown 0:0 /proc/self/fd/0; touch /proc/self/fd/0; cat; echo x >&3 && echo writes",
        );
        assert_eq!(
            tried.matches("Read-only file system").count(),
            3,
            "{hide}: {tried}"
        );
        assert!(tried.ends_with("\nwrites\n"), "{hide}: {tried}");
    }
    assert_eq!(state(), host);
}

#[test]
fn root_a_container_has_the_usual_limit_of_descriptors_whatever_the_runtime_has() {
    if !common::root() {
        return;
    }
    slipway_sys::exec::raise_descriptors().unwrap();
    let limits = "ulimit -Sn; ulimit -Hn";
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .maximum
        .unwrap();
    assert!(hard > 1024, "this machine allows no more than usual");
    let expected = format!("1024\n{hard}\n");
    let mut b = Bundle::new(&format!("{limits}; echo ready; exec sleep 60"));
    b.run_until_ready();
    assert_eq!(b.out().replace("ready\n", ""), expected);
    assert_eq!(b.exec(&b.script(limits)).unwrap().1, expected);
    // One that is asked for counts, for init and for exec.
    let mut b = Bundle::new(&format!("{limits}; echo ready; exec sleep 60"));
    b.config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 2000, "hard": 2001}]);
    b.run_until_ready();
    assert_eq!(b.out().replace("ready\n", ""), "2000\n2001\n");
    assert_eq!(b.exec(&b.script(limits)).unwrap().1, "2000\n2001\n");
}
