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

#[tokio::test]
async fn a_container_cannot_change_the_runtimes_programs_through_proc_self_exe() -> Result<()> {
    let w = World::new("conf-exe").await?;
    let sum = || -> Result<Vec<Vec<u8>>> {
        ["slipway-runc", "containerd-shim-slipway-v1", "slipwayd"]
            .iter()
            .map(|p| Ok(std::fs::read(harness::lab::bin(p))?))
            .collect()
    };
    let before = sum()?;
    // The entrypoint is a link to /proc/self/exe: what runs is the runtime's own program, if anything.
    let mut c = container_config("exe", BUSYBOX, &["/proc/self/exe", "--help"]);
    c.args = vec![];
    let _ = w.pod_with("exe", c).await;
    let (_, id) = w
        .pod_with("exe2", container_config("exe2", BUSYBOX, &["sleep", "1000"]))
        .await?;
    let script =
        "for i in 1 2 3; do for p in /proc/[0-9]*/exe; do echo evil 2>/dev/null > $p; done; done; exit 0";
    w.cri.exec(&id, &["sh", "-c", script], 20).await?;
    assert!(before == sum()?, "the programs on the host are as they were");
    w.finish().await
}
