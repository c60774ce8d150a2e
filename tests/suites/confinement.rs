//! Exec is confined exactly as the container's init is: both look around from inside, and see the same.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use harness::cri::container_config;
use harness::image::BUSYBOX;
use harness::{World, v1};

/// What a process says of itself, sorted by name.
const LOOK: &str = "grep -E '^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|Seccomp_filters|SigBlk|SigIgn):' /proc/self/status; \
    sed 's/^/uid_map:/' /proc/self/uid_map; sed 's/^/cgroup:/' /proc/self/cgroup; \
    for n in cgroup ipc mnt net pid user uts; do echo ns_$n:$(readlink /proc/self/ns/$n); done; \
    echo oom:$(cat /proc/self/oom_score_adj); echo cwd:$(pwd); ulimit -a | sed 's/^/limit:/'; umask | sed 's/^/umask:/'; \
    ls /proc/self/fd | wc -l | sed 's/^/fds:/'; env | grep -v -E '^(SHLVL|_|PWD|OLDPWD)=' | sort | sed 's/^/env:/'";

fn parse(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut m: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for l in text.lines() {
        let (k, v) = l.split_once(':').unwrap_or((l, ""));
        m.entry(k.into())
            .or_default()
            .push(v.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    m
}

async fn side_by_side(
    w: &World,
    name: &str,
    change: impl FnOnce(&mut v1::ContainerConfig),
) -> Result<BTreeMap<String, Vec<String>>> {
    let script = format!("{LOOK}; echo done:; sleep 1000");
    let mut c = container_config(name, BUSYBOX, &["sh", "-c", &script]);
    change(&mut c);
    let mut sandbox = harness::cri::pod_config(name, &w.lab, true);
    let privileged = c
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .is_some_and(|s| s.privileged);
    if let Some(s) = sandbox.linux.as_mut().and_then(|l| l.security_context.as_mut()) {
        s.privileged = privileged;
    }
    let pod = w.cri.run_pod(sandbox.clone()).await?;
    let id = w.cri.run(&pod, c, sandbox).await?;
    let mut init = String::new();
    for _ in 0..500 {
        init = w
            .log(name)
            .unwrap_or_default()
            .iter()
            .map(|l| format!("{}\n", l.text))
            .collect();
        if init.contains("done:") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (code, exec, err) = w
        .cri
        .exec(&id, &["sh", "-c", &format!("{LOOK}; echo done:")], 10)
        .await?;
    assert_eq!(code, 0, "{err}");
    let (init, exec) = (parse(&init), parse(&exec));
    assert_eq!(init, exec, "{name}: init and exec see the same");
    Ok(init)
}

fn security(c: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    c.linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

#[tokio::test]
async fn exec_is_confined_as_init_by_default() -> Result<()> {
    let w = World::new("conf-default").await?;
    let seen = side_by_side(&w, "plain", |c| {
        security(c).seccomp = Some(v1::SecurityProfile {
            profile_type: 0,
            localhost_ref: String::new(),
        });
    })
    .await?;
    assert_eq!(seen["Seccomp"], ["2"]);
    // 32 and 33 are the C library's own, which nobody can reset through it.
    let ignored = u64::from_str_radix(&seen["SigIgn"][0], 16)? & 0x7fff_ffff;
    assert_eq!((&seen["SigBlk"][0][..], ignored), ("0000000000000000", 0));
    // CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE
    assert_eq!(seen["CapBnd"], ["00000000000005fb"]);
    w.finish().await
}

#[tokio::test]
async fn exec_is_confined_as_init_for_a_user_without_privileges() -> Result<()> {
    let w = World::new("conf-user").await?;
    let seen = side_by_side(&w, "user", |c| {
        let s = security(c);
        s.seccomp = Some(v1::SecurityProfile {
            profile_type: 0,
            localhost_ref: String::new(),
        });
        s.run_as_user = Some(v1::Int64Value { value: 1000 });
        s.run_as_group = Some(v1::Int64Value { value: 3000 });
        s.supplemental_groups = vec![4000, 5000];
        s.no_new_privs = true;
        s.capabilities = Some(v1::Capability {
            drop_capabilities: vec!["ALL".into()],
            ..Default::default()
        });
    })
    .await?;
    assert_eq!(seen["Uid"], ["1000 1000 1000 1000"]);
    assert_eq!(seen["Gid"], ["3000 3000 3000 3000"]);
    assert_eq!(seen["CapBnd"], ["0000000000000000"]);
    assert_eq!(seen["NoNewPrivs"], ["1"]);
    assert_eq!(seen["Seccomp"], ["2"]);
    w.finish().await
}

#[tokio::test]
async fn exec_is_confined_as_init_when_unconfined_and_when_privileged() -> Result<()> {
    let w = World::new("conf-priv").await?;
    let seen = side_by_side(&w, "unconfined", |c| {
        security(c).seccomp = Some(v1::SecurityProfile {
            profile_type: 1,
            localhost_ref: String::new(),
        });
    })
    .await?;
    assert_eq!(seen["Seccomp"], ["0"]);
    let seen = side_by_side(&w, "privileged", |c| security(c).privileged = true).await?;
    assert_eq!(seen["Seccomp"], ["0"]);
    assert_ne!(seen["CapEff"], ["00000000000005fb"]);
    w.finish().await
}

#[tokio::test]
async fn a_local_seccomp_profile_refuses_what_it_names() -> Result<()> {
    let w = World::new("conf-local").await?;
    let profile = w.lab.write(
        "seccomp.json",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#,
    )?;
    let set = |c: &mut v1::ContainerConfig| {
        security(c).seccomp = Some(v1::SecurityProfile {
            profile_type: 2,
            localhost_ref: profile.display().to_string(),
        });
    };
    let (_, lines) = w
        .shell(
            "local",
            set,
            "mkdir /tmp/x 2>/dev/null && echo made || echo refused",
        )
        .await?;
    assert_eq!(lines, ["refused"]);
    let mut c = container_config("gone", BUSYBOX, &["true"]);
    security(&mut c).seccomp = Some(v1::SecurityProfile {
        profile_type: 2,
        localhost_ref: "/no/such/profile.json".into(),
    });
    let e = w.pod_with("gone", c).await.expect_err("no such profile");
    assert!(format!("{e:#}").contains("/no/such/profile.json"), "{e:#}");
    w.finish().await
}

#[tokio::test]
async fn kernel_paths_are_masked_and_read_only() -> Result<()> {
    let w = World::new("conf-mask").await?;
    let set = |c: &mut v1::ContainerConfig| {
        let s = security(c);
        s.masked_paths = vec![
            "/proc/kcore".into(),
            "/proc/timer_list".into(),
            "/sys/firmware".into(),
        ];
        s.readonly_paths = vec!["/proc/sys".into(), "/proc/sysrq-trigger".into()];
    };
    let script = "wc -c < /proc/timer_list; ls /sys/firmware | wc -l; echo 1 2>/dev/null > /proc/sys/kernel/domainname && echo wrote || echo refused; mknod /tmp/n c 1 3 2>/dev/null && echo made || echo refused";
    let (_, lines) = w.shell("mask", set, script).await?;
    assert_eq!(lines, ["0", "0", "refused", "refused"]);
    w.finish().await
}

/// Takes hold, by their `/proc/<pid>/exe`, of all processes that are neither busybox nor pid 1, says so, and writes to what it
/// holds when it is told to: when nothing runs it any more, so that the kernel has no other reason to refuse.
const OVERWRITE: &str = r#"for t in $(seq 250); do
  for p in /proc/[0-9]*; do
    [ $p = /proc/1 ] && continue
    cmp -s $p/exe /bin/busybox && continue
    [ -r $p/exe ] || continue
    (exec 3<$p/exe || exit 0
     echo held >> /tmp/held
     while [ ! -e /tmp/go ]; do usleep 20000; done
     for i in 1 2 3 4 5; do echo evil 2>/dev/null > /proc/self/fd/3 && echo WRITTEN; usleep 20000; done
     echo tried) 2>/dev/null &
  done
  [ -e /tmp/held ] && break
  # A container is made behind the answer to its creation.
  usleep 20000
done
wait"#;

#[tokio::test]
async fn cve_2019_5736_a_container_cannot_change_the_runtimes_programs() -> Result<()> {
    let mut w = World::new("conf-exe").await?;
    // Copies, which a runtime that can be changed may lose.
    let programs = ["slipway-runc", "containerd-shim-slipway-v1"].map(|name| w.lab.join(name));
    for program in &programs {
        let name = program.file_name().expect("a name");
        std::fs::copy(harness::lab::bin(&name.to_string_lossy()), program)?;
    }
    w.daemon.stop()?;
    w.restart(&harness::Setup {
        config: format!(
            "[runtime]\nworker = {:?}\nshim = {:?}\n",
            programs[0], programs[1]
        ),
        ..Default::default()
    })
    .await?;
    let sum = || -> Result<Vec<Vec<u8>>> { programs.iter().map(|p| Ok(std::fs::read(p)?)).collect() };
    let before = sum()?;

    let mut config = harness::cri::pod_config("exe", &w.lab, true);
    let shared = v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Pod as i32,
        ..Default::default()
    };
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .namespace_options = Some(shared.clone());
    let pod = w.cri.run_pod(config.clone()).await?;
    let in_pod = |name: &str, command: &[&str]| {
        let mut c = container_config(name, BUSYBOX, command);
        let s = security(&mut c);
        s.namespace_options = Some(shared.clone());
        // More than any container gets unasked: without it not even that much can be looked at.
        s.capabilities = Some(v1::Capability {
            add_capabilities: vec!["SYS_PTRACE".into()],
            ..Default::default()
        });
        c
    };
    let hostile = in_pod("hostile", &["sleep", "1000"]);
    let hostile = w.cri.run(&pod, hostile, config.clone()).await?;
    let sh = async |script: &str| w.cri.exec(&hostile, &["sh", "-c", script], 30).await;
    let held = async || -> Result<()> {
        for _ in 0..500 {
            if sh("test -s /tmp/held").await?.0 == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::bail!("the hostile container found nothing to hold")
    };

    // Another container's init, which waits for its start and is the worker until then.
    let victim = in_pod("victim", &["true"]);
    let victim = w.cri.create(&pod, victim, config.clone()).await?;
    let attack = async {
        held().await?;
        w.cri.remove(&victim).await?;
        sh("touch /tmp/go").await
    };
    let (tried, attacked) = tokio::join!(sh(OVERWRITE), attack);
    attacked?;
    let (_, out, _) = tried?;
    assert!(out.contains("tried") && !out.contains("WRITTEN"), "{out}");
    assert!(before == sum()?, "the worker was changed through a waiting init");

    // Whoever executes /proc/self/exe executes the runtime once more, in the container and by its rules: the worker as an
    // entrypoint, and the shim as an exec, here with a record that is a pipe and keeps it reading.
    let exe = in_pod("exe", &["/proc/self/exe"]);
    let exe = w.cri.run(&pod, exe, config.clone()).await?;
    w.cri.wait_exit(&exe, Duration::from_secs(10)).await?;
    sh("rm /tmp/held /tmp/go; mkdir /tmp/shim && mkfifo /tmp/shim/shim.json").await?;
    let again = ["/proc/self/exe", "cleanup", "--state-dir", "/tmp/shim"];
    let attack = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let attack = async {
            held().await?;
            sh("echo > /tmp/shim/shim.json; usleep 200000; touch /tmp/go").await
        };
        let (tried, attacked) = tokio::join!(sh(OVERWRITE), attack);
        attacked.and(tried)
    };
    let (ended, tried) = tokio::join!(w.cri.exec(&hostile, &again, 30), attack);
    assert_ne!(ended?.0, 0, "an empty line is no record");
    let (_, out, _) = tried?;
    assert!(out.contains("tried") && !out.contains("WRITTEN"), "{out}");
    assert!(before == sum()?, "the shim was changed through an exec of itself");
    w.finish().await
}

/// Of a file: which it is, and whose and how it may be used.
fn state(path: &str) -> Result<(u64, u64, u32, u32, i64)> {
    use std::os::unix::fs::MetadataExt;
    let m = std::fs::metadata(path)?;
    Ok((m.dev(), m.ino(), m.mode(), m.uid(), m.ctime()))
}

#[tokio::test]
async fn no_process_of_a_container_gets_hold_of_the_nodes_null_device() -> Result<()> {
    let w = World::new("conf-null").await?;
    let host = state("/dev/null")?;
    let (device, inode, ..) = host;
    // It looks before it tries: a node that other things run on must not lose its device to this test.
    let script = format!(
        "for n in 0 1 2; do \
           [ \"$(stat -L -c %d:%i /proc/$$/fd/$n)\" = {device}:{inode} ] && touch /nodes && exit 3; \
         done; chmod 000 /proc/self/fd/0 && echo tried >> /tried; chmod 666 /dev/null"
    );
    let init = format!("{script}; touch /looked; sleep 1000");
    let (_, id) = w
        .pod_with("null", container_config("null", BUSYBOX, &["sh", "-c", &init]))
        .await?;
    let sh = async |script: &str| w.cri.exec(&id, &["sh", "-c", script], 10).await;
    let mut looked = false;
    for _ in 0..500 {
        looked = sh("test -e /looked").await?.0 == 0;
        if looked {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(looked, "init has not come to its end");
    // Standard input of one that is asked for by itself; all three of a streamed one that has none; a terminal's.
    assert_eq!(sh(&script).await?.0, 0);
    let crictl = harness::Crictl::of(&w.daemon);
    crictl.run(&["exec", &id, "sh", "-c", &script])?.ok()?;
    assert_eq!(sh("test ! -e /nodes && wc -l < /tried").await?.1, "3\n");
    assert_eq!(state("/dev/null")?, host);
    // In a user namespace the device is the node's, bound, and its root owns nothing there.
    let mut sandbox = harness::cri::pod_config("null-users", &w.lab, true);
    let users = harness::cri::own_users(&mut sandbox);
    let pod = w.cri.run_pod(sandbox.clone()).await?;
    let mut c = container_config("null-users", BUSYBOX, &["sleep", "1000"]);
    security(&mut c).namespace_options = Some(v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        userns_options: Some(users),
        ..Default::default()
    });
    let id = w.cri.run(&pod, c, sandbox).await?;
    // The mode that it has: nothing is lost if it may.
    let (code, out, err) = w
        .cri
        .exec(
            &id,
            &["sh", "-c", "chmod 666 /proc/self/fd/0 && chmod 666 /dev/null"],
            10,
        )
        .await?;
    assert!(code != 0 && err.contains("not permitted"), "{code} {out} {err}");
    assert_eq!(state("/dev/null")?, host);
    w.finish().await
}

#[tokio::test]
async fn what_is_mounted_below_the_hosts_sys_is_as_locked_as_sys_in_a_user_namespace() -> Result<()> {
    let w = World::new("conf-sys").await?;
    let host = std::fs::read_to_string("/proc/self/mountinfo")?;
    // Not by the pod's namespace, so that the host's own is what is shown, with all that is below.
    let mut sandbox = harness::cri::pod_config("sys", &w.lab, true);
    let users = harness::cri::own_users(&mut sandbox);
    let pod = w.cri.run_pod(sandbox.clone()).await?;
    let mut c = container_config("sys", BUSYBOX, &["sleep", "1000"]);
    security(&mut c).namespace_options = Some(v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        userns_options: Some(users),
        ..Default::default()
    });
    let id = w.cri.run(&pod, c, sandbox).await?;
    let (_, seen, _) = w.cri.exec(&id, &["cat", "/proc/self/mountinfo"], 10).await?;
    let below = |info: &str| -> Vec<(String, String)> {
        let fields = info.lines().filter_map(|l| {
            let mut fields = l.split(' ').skip(4);
            Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
        });
        fields.filter(|(at, _)| at.starts_with("/sys")).collect()
    };
    assert!(
        below(&host).len() > 1,
        "this machine has nothing mounted below /sys"
    );
    let seen = below(&seen);
    assert!(seen.len() >= below(&host).len(), "{seen:?}");
    for (at, options) in seen {
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(options.split(',').any(|o| o == option), "{at} is {options}");
        }
    }
    w.finish().await
}

#[tokio::test]
async fn a_runtime_with_many_descriptors_gives_its_containers_the_usual_number() -> Result<()> {
    let mut w = World::new("conf-nofile").await?;
    w.daemon.stop()?;
    // As a unit with one figure for both limits starts it.
    let program = w.lab.write(
        "slipwayd",
        format!(
            "#!/bin/sh\nulimit -Sn \"$(ulimit -Hn)\" && exec {} \"$@\"\n",
            harness::lab::bin("slipwayd").display()
        ),
    )?;
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    w.restart(&harness::Setup {
        program: Some(program),
        ..Default::default()
    })
    .await?;
    let soft = |pid: &str| -> Result<String> {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let line = limits.lines().find(|l| l.starts_with("Max open files"));
        Ok(line
            .and_then(|l| l.split_whitespace().nth(3))
            .unwrap_or_default()
            .to_owned())
    };
    let many = soft(&w.daemon.pid().to_string())?;
    assert_ne!(many, "1024", "this test needs a machine that allows more");
    let seen = side_by_side(&w, "nofile", |_| ()).await?;
    let of_init = seen["limit"]
        .iter()
        .find(|l| l.contains("(-n)") || l.contains("nofiles"));
    assert!(of_init.is_some_and(|l| l.ends_with(" 1024")), "{of_init:?}");
    // The shim has them for itself.
    let shims: Vec<_> = harness::leftovers::processes_naming(w.daemon.state())
        .into_iter()
        .filter(|(_, cmd)| cmd.contains("--state-dir"))
        .collect();
    assert!(!shims.is_empty());
    for (pid, cmd) in shims {
        assert_eq!(soft(&pid.to_string())?, many, "{cmd}");
    }
    w.finish().await
}

#[tokio::test]
async fn cve_2020_15257_no_socket_of_ours_has_an_abstract_name() -> Result<()> {
    let w = World::new("conf-abstract").await?;
    let (_, id) = w
        .pod_with(
            "abstract",
            container_config("abstract", BUSYBOX, &["sleep", "1000"]),
        )
        .await?;
    w.cri.exec(&id, &["true"], 5).await?;
    // A container on the host's network sees every abstract name there is.
    let table = std::fs::read_to_string("/proc/net/unix")?;
    let abstract_inodes: std::collections::BTreeSet<&str> = table
        .lines()
        .filter_map(|l| {
            let mut fields = l.split_whitespace();
            let inode = fields.nth(6)?;
            fields.next()?.starts_with('@').then_some(inode)
        })
        .collect();
    let mut looked = 0;
    for (pid, cmd) in harness::leftovers::processes_naming(w.daemon.state()) {
        for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let Ok(target) = std::fs::read_link(fd.path()) else {
                continue;
            };
            let target = target.to_string_lossy().into_owned();
            if let Some(inode) = target.strip_prefix("socket:[").and_then(|t| t.strip_suffix(']')) {
                looked += 1;
                assert!(!abstract_inodes.contains(inode), "{cmd}");
            }
        }
    }
    assert!(looked > 2, "slipwayd and the shim have sockets");
    w.finish().await
}

#[tokio::test]
async fn cve_2021_41103_and_2024_25621_what_the_runtime_keeps_is_roots_alone() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let w = World::new("conf-modes").await?;
    w.pod_with("modes", container_config("modes", BUSYBOX, &["sleep", "1000"]))
        .await?;
    let mode = |p: &std::path::Path| std::fs::metadata(p).map(|m| m.permissions().mode() & 0o7777);
    for dir in [w.daemon.root(), w.daemon.state()] {
        assert_eq!(mode(dir)?, 0o700, "{}", dir.display());
    }
    let mut looked = 0;
    for below in ["pods", "containers"] {
        let below = w.daemon.state().join(below);
        assert_eq!(mode(&below)?, 0o700, "{}", below.display());
        for entry in std::fs::read_dir(&below)?.flatten() {
            assert_eq!(mode(&entry.path())? & 0o077, 0, "{}", entry.path().display());
            for secret in [
                "shim.sock",
                "shim.json",
                "shim.log",
                "config.json",
                "seccomp.bpf",
                "ns",
            ] {
                if let Ok(mode) = mode(&entry.path().join(secret)) {
                    // What lies in a directory that nobody may enter may be readable, not writable.
                    assert_eq!(mode & 0o022, 0, "{secret} of {}", entry.path().display());
                    looked += 1;
                }
            }
        }
    }
    assert!(looked >= 4, "the pod and its container have files");
    w.finish().await
}

#[tokio::test]
async fn cve_2022_4318_a_home_with_a_line_break_writes_no_user() -> Result<()> {
    let w = World::new("conf-home").await?;
    let set = |c: &mut v1::ContainerConfig| {
        c.envs.push(v1::KeyValue {
            key: "HOME".into(),
            value: b"/root\nevil:x:0:0::/root:/bin/sh".to_vec(),
        });
        // A user that the image does not know: for this one others add a line.
        security(c).run_as_user = Some(v1::Int64Value { value: 4242 });
    };
    let (_, lines) = w
        .shell(
            "home",
            set,
            "grep -c . /etc/passwd; grep -c evil /etc/passwd; id -u",
        )
        .await?;
    assert_eq!(lines, ["3", "0", "4242"]);
    w.finish().await
}

#[tokio::test]
async fn cve_2023_6476_annotations_set_no_limit_and_no_property() -> Result<()> {
    let w = World::new("conf-annotations").await?;
    let annotations = [
        ("org.systemd.property.MemoryMax", "'infinity'"),
        ("org.systemd.property.TasksMax", "uint64 5"),
        ("io.kubernetes.cri-o.LinkLogs", "/etc"),
        ("run.oci.systemd.subgroup", "x"),
        ("run.oci.keep_original_groups", "1"),
        ("module.wasm.image/variant", "compat"),
        ("io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw", "true"),
    ];
    let set = |c: &mut v1::ContainerConfig| {
        let pairs = annotations
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        c.annotations.extend(pairs);
        let linux = c.linux.get_or_insert_default();
        linux.resources = Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        });
    };
    let script = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; echo x 2>/dev/null > /sys/fs/cgroup/unified/cgroup.procs && echo wrote; grep ^Groups /proc/self/status";
    let (_, lines) = w.shell("annotations", set, script).await?;
    assert_eq!(
        lines[..2],
        [(64 << 20).to_string(), "max".to_owned()],
        "{lines:?}"
    );
    assert!(!lines.iter().any(|l| l == "wrote"), "{lines:?}");
    w.finish().await
}

#[tokio::test]
async fn cve_2024_5154_neither_an_images_links_nor_a_log_path_lead_out() -> Result<()> {
    let w = World::new("conf-links").await?;
    let victim = w.lab.write("victim", "precious\n")?;
    // /etc/mtab, and what else a runtime might put into an image's /etc, are links to a file of the host.
    let context = w.lab.join("links-context");
    for name in ["mtab", "resolv.conf", "hosts", "hostname"] {
        std::fs::create_dir_all(context.join("etc"))?;
        std::os::unix::fs::symlink(&victim, context.join("etc").join(name))?;
    }
    std::fs::write(
        context.join("Dockerfile"),
        format!("FROM {BUSYBOX}\nCOPY etc/ /etc/\n"),
    )?;
    let image = "slipway.test/links:1";
    harness::image::run_slipway(&w.lab, &["build", "-t", image, &context.display().to_string()])?.ok()?;
    let mut c = container_config("links", image, &["sh", "-c", "echo evil > /etc/hosts; echo ran"]);
    if let Ok((_, id)) = w.pod_with("links", c.clone()).await {
        w.cri.wait_exit(&id, Duration::from_secs(10)).await?;
    }
    assert_eq!(std::fs::read_to_string(&victim)?, "precious\n");
    // CVE-2025-0750: a log path that leads out of the pod's log directory.
    for path in ["../../victim", "/etc/victim", "a/../../victim"] {
        c.log_path = path.into();
        let e = w.pod_with("logs", c.clone()).await.expect_err("refused");
        assert!(format!("{e:#}").contains("log_path"), "{path}: {e:#}");
        for p in w.cri.pods().await? {
            w.cri.remove_pod(&p.id).await?;
        }
    }
    assert_eq!(std::fs::read_to_string(&victim)?, "precious\n");
    w.finish().await
}

#[tokio::test]
async fn every_container_and_command_has_a_session_keyring_of_its_own() -> Result<()> {
    const RING: &str = "#include <stdio.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n\
        int main(void) { printf(\"ring %ld\\n\", syscall(SYS_keyctl, 0, -3, 0)); return 0; }\n";
    let w = World::new("conf-keys").await?;
    let source = w.lab.write("ring/ring.c", RING)?;
    let program = source.with_file_name("ring");
    let compile = format!("gcc -static -Os -o {} {}", program.display(), source.display());
    harness::cmd::sh(&compile)?;
    let mut seen = vec![
        harness::cmd::sh(&program.display().to_string())?
            .trim()
            .to_owned(),
    ];
    for name in ["one", "other"] {
        let mut c = container_config(name, BUSYBOX, &["sh", "-c", "/ring/ring; sleep 1000"]);
        security(&mut c).seccomp = Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::Unconfined as i32,
            ..Default::default()
        });
        c.mounts.push(v1::Mount {
            container_path: "/ring".into(),
            host_path: w.lab.join("ring").display().to_string(),
            readonly: true,
            ..Default::default()
        });
        let (_, id) = w.pod_with(name, c).await?;
        let (code, out, err) = w.cri.exec(&id, &["/ring/ring"], 10).await?;
        assert_eq!(code, 0, "{err}");
        seen.push(out.trim().to_owned());
        // Its exec came after the start; what init said may still be on its way.
        let mut said = None;
        for _ in 0..500 {
            said = w.log(name).unwrap_or_default().into_iter().next();
            if said.is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        seen.push(said.map(|line| line.text).unwrap_or_default());
    }
    assert!(
        seen.iter()
            .all(|ring| ring.starts_with("ring ") && ring != "ring -1"),
        "{seen:?}"
    );
    let mut all = seen.clone();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), seen.len(), "{seen:?}");
    w.finish().await
}
