//! Containers over the CRI: what their configuration honours, their logs, exec, limits and ends.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::Result;
use harness::cri::{container_config, pod_config};
use harness::image::BUSYBOX;
use harness::{World, v1};

const SLEEP: &[&str] = &["sleep", "1000"];

fn security(c: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    c.linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

fn code(e: &anyhow::Error) -> Option<tonic::Code> {
    e.downcast_ref::<tonic::Status>().map(tonic::Status::code)
}

#[tokio::test]
async fn logs_keep_streams_order_and_the_exit_code() -> Result<()> {
    let w = World::new("c-log").await?;
    let script = "echo one; echo two >&2; printf three; exit 7";
    let (pod, id) = w
        .pod_with("log", container_config("log", BUSYBOX, &["sh", "-c", script]))
        .await?;
    let s = w.cri.wait_exit(&id, Duration::from_secs(10)).await?;
    assert_eq!((s.exit_code, s.reason.as_str()), (7, "Error"));
    assert!(s.started_at >= s.created_at && s.finished_at >= s.started_at && s.created_at > 0);
    let log = w.log("log")?;
    let out: Vec<_> = log
        .iter()
        .filter(|l| l.stream == "stdout")
        .map(|l| l.text.as_str())
        .collect();
    let err: Vec<_> = log
        .iter()
        .filter(|l| l.stream == "stderr")
        .map(|l| l.text.as_str())
        .collect();
    assert_eq!((out, err), (vec!["one", "three"], vec!["two"]));
    w.cri.remove_pod(&pod).await?;
    w.finish().await
}

#[tokio::test]
async fn a_long_line_is_written_in_parts_that_join_to_itself() -> Result<()> {
    let w = World::new("c-long").await?;
    let script = "head -c 100000 /dev/zero | tr '\\0' x; echo; echo end";
    let (_, id) = w
        .pod_with("long", container_config("long", BUSYBOX, &["sh", "-c", script]))
        .await?;
    w.cri.wait_exit(&id, Duration::from_secs(10)).await?;
    let log = w.log("long")?;
    let (last, parts) = log.split_last().expect("lines");
    assert_eq!(last.text, "end");
    assert!(
        parts.len() > 1
            && parts[..parts.len() - 1].iter().all(|l| l.partial)
            && !parts[parts.len() - 1].partial
    );
    assert_eq!(parts.iter().map(|l| l.text.len()).sum::<usize>(), 100_000);
    w.finish().await
}

/// CVE-2023-25173: supplementary groups are those of the image and the config, and no others.
#[tokio::test]
async fn env_workdir_user_and_groups_come_from_the_image_and_the_config() -> Result<()> {
    let w = World::new("c-env").await?;
    let set = |c: &mut v1::ContainerConfig| {
        c.envs = vec![v1::KeyValue {
            key: "GREETING".into(),
            value: b"hello world".to_vec(),
        }];
        c.working_dir = "/made/for/it".into();
        let s = security(c);
        s.run_as_username = "appuser".into();
        s.supplemental_groups = vec![2000];
    };
    let (code, lines) = w
        .shell(
            "env",
            set,
            "id -u; id -g; id -G; pwd; echo $GREETING; echo $HOME; echo $PATH",
        )
        .await?;
    assert_eq!(code, 0);
    assert_eq!(lines[0], "1000");
    assert_eq!(lines[1], "1000");
    let mut groups: Vec<&str> = lines[2].split(' ').collect();
    groups.sort_unstable();
    assert_eq!(
        groups,
        ["1000", "2000", "44"],
        "the image's and the config's supplementary groups"
    );
    assert_eq!(
        &lines[3..],
        ["/made/for/it", "hello world", "/home/appuser", "/bin"]
    );
    w.finish().await
}

#[tokio::test]
async fn mounts_are_read_only_or_not_and_a_missing_source_is_an_error() -> Result<()> {
    let w = World::new("c-mounts").await?;
    w.lab.write("vol/file", "from the host\n")?;
    let mount = |ro: bool, host: &str, to: &str| v1::Mount {
        host_path: w.lab.join(host).display().to_string(),
        container_path: to.into(),
        readonly: ro,
        ..Default::default()
    };
    let set =
        |c: &mut v1::ContainerConfig| c.mounts = vec![mount(true, "vol", "/ro"), mount(false, "vol", "/rw")];
    let (_, lines) = w
        .shell(
            "m",
            set,
            "cat /ro/file; touch /ro/x 2>/dev/null || echo refused; echo back > /rw/back",
        )
        .await?;
    assert_eq!(lines, ["from the host", "refused"]);
    assert_eq!(std::fs::read_to_string(w.lab.join("vol/back"))?, "back\n");

    let mut c = container_config("missing", BUSYBOX, SLEEP);
    c.mounts = vec![mount(false, "not-there", "/x")];
    let e = w.pod_with("missing", c).await.expect_err("a missing source");
    assert!(format!("{e:#}").contains("not-there"), "{e:#}");
    assert!(!w.lab.join("not-there").exists());
    w.finish().await
}

#[tokio::test]
async fn a_read_only_root_stays_as_it_is() -> Result<()> {
    let w = World::new("c-ro").await?;
    let (_, lines) = w
        .shell(
            "ro",
            |c| security(c).readonly_rootfs = true,
            "touch /x 2>/dev/null && echo wrote || echo refused; touch /dev/shm/y && echo shm",
        )
        .await?;
    assert_eq!(lines, ["refused", "shm"]);
    w.finish().await
}

#[tokio::test]
async fn exec_answers_with_code_and_streams_and_kills_at_its_timeout() -> Result<()> {
    let w = World::new("c-exec").await?;
    let (_, id) = w
        .pod_with("exec", container_config("exec", BUSYBOX, SLEEP))
        .await?;
    let (code, out, err) = w
        .cri
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"], 10)
        .await?;
    assert_eq!((code, out.as_str(), err.as_str()), (3, "out\n", "err\n"));

    let e = w
        .cri
        .exec(&id, &["sleep", "7777"], 1)
        .await
        .expect_err("past its timeout");
    assert_eq!(self::code(&e), Some(tonic::Code::DeadlineExceeded), "{e:#}");
    let (_, ps, _) = w.cri.exec(&id, &["ps"], 10).await?;
    assert!(!ps.contains("7777"), "the timed-out process is gone: {ps}");

    // A program that is not there is an error, or the shell's 127; never a hang.
    match w.cri.exec(&id, &["/no/such/program"], 5).await {
        Ok((code, _, _)) => assert!(code == 126 || code == 127, "{code}"),
        Err(e) => assert!(format!("{e:#}").contains("/no/such/program"), "{e:#}"),
    }
    w.finish().await
}

#[tokio::test]
async fn exec_returns_although_a_background_child_holds_its_stdout() -> Result<()> {
    let w = World::new("c-bg").await?;
    let (_, id) = w.pod_with("bg", container_config("bg", BUSYBOX, SLEEP)).await?;
    let began = Instant::now();
    let (code, out, _) = w
        .cri
        .exec(&id, &["sh", "-c", "sleep 30 & echo started"], 20)
        .await?;
    assert_eq!((code, out.as_str()), (0, "started\n"));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    w.finish().await
}

#[tokio::test]
async fn cve_2022_31030_exec_output_is_bounded_and_so_is_memory() -> Result<()> {
    let w = World::new("c-big").await?;
    let (_, id) = w.pod_with("big", container_config("big", BUSYBOX, SLEEP)).await?;
    let r = v1::ExecSyncRequest {
        container_id: id.clone(),
        cmd: ["sh", "-c", "head -c 300000000 /dev/zero"]
            .map(str::to_owned)
            .to_vec(),
        timeout: 60,
    };
    let answer = w
        .cri
        .runtime
        .clone()
        .max_decoding_message_size(64 << 20)
        .exec_sync(r)
        .await;
    if let Ok(o) = answer {
        let o = o.into_inner();
        assert!(o.stdout.len() <= 16 << 20, "{} bytes", o.stdout.len());
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", w.daemon.pid()))?;
    let peak: u64 = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .and_then(|v| v.trim().trim_end_matches(" kB").parse().ok())
        .expect("VmHWM");
    assert!(peak < 200 * 1024, "slipwayd's peak memory is {peak} KiB");
    w.finish().await
}

#[tokio::test]
async fn stop_sends_the_stop_signal_then_kills() -> Result<()> {
    let w = World::new("c-stop").await?;
    let polite = "trap 'echo bye; exit 0' TERM; echo up; while true; do sleep 0.1; done";
    let (_, a) = w
        .pod_with(
            "polite",
            container_config("polite", BUSYBOX, &["sh", "-c", polite]),
        )
        .await?;
    wait_for_line(&w, "polite", "up").await?;
    w.cri.stop(&a, 10).await?;
    let s = w.cri.status(&a).await?;
    assert_eq!(
        (s.state, s.exit_code),
        (v1::ContainerState::ContainerExited as i32, 0)
    );
    assert!(w.log("polite")?.iter().any(|l| l.text == "bye"));

    let deaf = "trap '' TERM; echo up; while true; do sleep 0.1; done";
    let (_, b) = w
        .pod_with("deaf", container_config("deaf", BUSYBOX, &["sh", "-c", deaf]))
        .await?;
    wait_for_line(&w, "deaf", "up").await?;
    let began = Instant::now();
    w.cri.stop(&b, 1).await?;
    assert!(began.elapsed() >= Duration::from_millis(900) && began.elapsed() < Duration::from_secs(8));
    assert_eq!(w.cri.status(&b).await?.exit_code, 137);
    // Idempotent, and so is remove.
    w.cri.stop(&b, 1).await?;
    w.cri.remove(&b).await?;
    w.cri.remove(&b).await?;
    w.finish().await
}

async fn wait_for_line(w: &World, name: &str, line: &str) -> Result<()> {
    let began = Instant::now();
    while !w.log(name).unwrap_or_default().iter().any(|l| l.text == line) {
        anyhow::ensure!(
            began.elapsed() < Duration::from_secs(10),
            "{line:?} did not appear in {name}'s log"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_container_over_its_memory_limit_is_reported_as_oom_killed() -> Result<()> {
    let w = World::new("c-oom").await?;
    let mut c = container_config(
        "oom",
        BUSYBOX,
        &[
            "sh",
            "-c",
            "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}",
        ],
    );
    c.linux.get_or_insert_default().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        memory_swap_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let (_, id) = w.pod_with("oom", c).await?;
    let s = w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    assert_eq!(s.reason, "OOMKilled", "{s:?}");
    w.finish().await
}

#[tokio::test]
async fn limits_reach_the_cgroup_and_are_updated_live() -> Result<()> {
    let w = World::new("c-limits").await?;
    let mut c = container_config("lim", BUSYBOX, SLEEP);
    c.linux.get_or_insert_default().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        // kubelet always sends hugepage limits, zero where there is no controller.
        hugepage_limits: vec![v1::HugepageLimit {
            page_size: "2MB".into(),
            limit: 0,
        }],
        ..Default::default()
    });
    let (_, id) = w.pod_with("lim", c).await?;
    let read = async |file: &str| -> Result<String> {
        let script = format!("cat /sys/fs/cgroup/{file}");
        Ok(w.cri
            .exec(&id, &["sh", "-c", &script], 10)
            .await?
            .1
            .trim()
            .to_owned())
    };
    if std::path::Path::new("/sys/fs/cgroup/memory").exists() {
        assert_eq!(
            read("memory/memory.limit_in_bytes").await?,
            (64 << 20).to_string()
        );
        assert_eq!(read("cpu/cpu.cfs_quota_us").await?, "50000");
        assert_eq!(read("cpu/cpu.shares").await?, "512");
    }
    let r = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            cpu_shares: 1024,
            ..Default::default()
        }),
        ..Default::default()
    };
    w.cri.runtime.clone().update_container_resources(r).await?;
    if std::path::Path::new("/sys/fs/cgroup/memory").exists() {
        assert_eq!(
            read("memory/memory.limit_in_bytes").await?,
            (96 << 20).to_string()
        );
        assert_eq!(read("cpu/cpu.shares").await?, "1024");
        assert_eq!(
            read("cpu/cpu.cfs_quota_us").await?,
            "50000",
            "what the update does not name stays"
        );
    }
    let s = w
        .cri
        .runtime
        .clone()
        .container_stats(v1::ContainerStatsRequest {
            container_id: id.clone(),
        })
        .await?
        .into_inner();
    let s = s.stats.expect("stats");
    assert!(
        s.memory
            .and_then(|m| m.working_set_bytes)
            .is_some_and(|b| b.value > 0)
    );
    assert!(
        s.cpu
            .and_then(|c| c.usage_core_nano_seconds)
            .is_some_and(|n| n.value > 0)
    );
    w.finish().await
}

#[tokio::test]
async fn a_log_is_reopened_without_losing_a_line() -> Result<()> {
    let w = World::new("c-reopen").await?;
    let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); usleep 2000; done";
    let (_, id) = w
        .pod_with("rot", container_config("rot", BUSYBOX, &["sh", "-c", script]))
        .await?;
    let path = w.lab.join("logs/rot/rot/0.log");
    let mut all = Vec::new();
    for n in 0..3 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let rotated = w.lab.join(format!("logs/rot/rot/0.log.{n}"));
        std::fs::rename(&path, &rotated)?;
        w.cri
            .runtime
            .clone()
            .reopen_container_log(v1::ReopenContainerLogRequest {
                container_id: id.clone(),
            })
            .await?;
        all.push(rotated);
    }
    w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
    all.push(path);
    let mut lines = Vec::new();
    for p in all {
        lines.extend(harness::world::read_log(&p)?.into_iter().map(|l| l.text));
    }
    assert_eq!(lines, (0..400).map(|i| format!("line {i}")).collect::<Vec<_>>());
    w.finish().await
}

#[tokio::test]
async fn fast_and_endless_output_keeps_memory_bounded() -> Result<()> {
    let w = World::new("c-flood").await?;
    // One gigabyte: lines as fast as they come, then a line without end.
    let script = "yes 0123456789012345678901234567890123456789012345678901234567890123456789 | head -c 700000000; head -c 300000000 /dev/zero | tr '\\0' y";
    let (_, id) = w
        .pod_with("flood", container_config("flood", BUSYBOX, &["sh", "-c", script]))
        .await?;
    w.cri.wait_exit(&id, Duration::from_secs(120)).await?;
    for (pid, cmd) in harness::leftovers::processes_naming(w.daemon.state()) {
        let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
            continue;
        };
        let peak: u64 = status
            .lines()
            .find_map(|l| l.strip_prefix("VmHWM:"))
            .and_then(|v| v.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0);
        let most = if cmd.contains("shim") { 8 << 10 } else { 128 << 10 };
        assert!(peak < most, "{cmd}: peak memory {peak} KiB");
    }
    let size = std::fs::metadata(w.lab.join("logs/flood/flood/0.log"))?.len();
    assert!(size > 1_000_000_000, "every byte is in the log: {size}");
    w.finish().await
}

#[tokio::test]
async fn a_terminal_is_one_stream() -> Result<()> {
    let w = World::new("c-tty").await?;
    let (code, lines) = w
        .shell(
            "tty",
            |c| c.tty = true,
            "test -t 0 && test -t 1 && echo terminal; echo err >&2; echo $TERM",
        )
        .await?;
    assert_eq!(code, 0);
    let lines: Vec<_> = lines.iter().map(|l| l.trim_end_matches('\r')).collect();
    assert_eq!(lines, ["terminal", "err", "xterm"]);
    assert!(w.lab.join("logs").exists());
    w.finish().await
}

#[tokio::test]
async fn bad_input_is_refused_and_leaves_nothing() -> Result<()> {
    let w = World::new("c-bad").await?;
    let config = pod_config("bad", &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let base = || container_config("bad", BUSYBOX, SLEEP);
    let mut cases: Vec<(&str, v1::ContainerConfig)> = Vec::new();
    cases.push(("image", {
        let mut c = base();
        c.image = Some(v1::ImageSpec {
            image: "slipway.test/none:1".into(),
            ..Default::default()
        });
        c
    }));
    cases.push(("log path", {
        let mut c = base();
        c.log_path = "../../../etc/evil.log".into();
        c
    }));
    cases.push(("cwd", {
        let mut c = base();
        c.working_dir = "/proc/self/fd/7".into();
        c
    }));
    cases.push(("user", {
        let mut c = base();
        security(&mut c).run_as_username = "nosuchuser".into();
        c
    }));
    cases.push(("uid", {
        let mut c = base();
        security(&mut c).run_as_user = Some(v1::Int64Value { value: 4_294_967_295 });
        c
    }));
    cases.push(("program", {
        let mut c = base();
        c.command = vec!["/no/such/program".into()];
        c
    }));
    cases.push(("capability", {
        let mut c = base();
        security(&mut c).capabilities = Some(v1::Capability {
            add_capabilities: vec!["NO_SUCH".into()],
            ..Default::default()
        });
        c
    }));
    cases.push(("mount over proc", {
        let mut c = base();
        c.mounts = vec![v1::Mount {
            container_path: "/proc/1".into(),
            host_path: "/tmp".into(),
            ..Default::default()
        }];
        c
    }));
    for (what, c) in cases {
        let r = w.cri.run(&pod, c, config.clone()).await;
        let e = r.expect_err(what);
        assert!(
            !matches!(code(&e), Some(tonic::Code::Internal | tonic::Code::Unknown)) || what == "program",
            "{what}: {e:#}"
        );
        for c in w.cri.containers().await? {
            w.cri.remove(&c.id).await?;
        }
    }
    assert!(!std::path::Path::new("/etc/evil.log").exists());
    let id = w.cri.run(&pod, base(), config).await?;
    assert_eq!(w.cri.exec(&id, &["true"], 5).await?.0, 0, "the pod still works");
    w.finish().await
}

#[tokio::test]
async fn a_container_in_the_hosts_pid_namespace_takes_its_children_with_it() -> Result<()> {
    let w = World::new("c-hostpid").await?;
    let marker = format!("{}", 100_000 + std::process::id());
    let script = format!("(setsid sleep {marker} &) ; sleep 0.2; echo up; exit 0");
    let mut c = container_config("hp", BUSYBOX, &["sh", "-c", &script]);
    security(&mut c).namespace_options = Some(v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Node as i32,
        ..Default::default()
    });
    let (_, id) = w.pod_with("hp", c).await?;
    w.cri.wait_exit(&id, Duration::from_secs(10)).await?;
    let left = harness::leftovers::processes_naming(std::path::Path::new(&format!("sleep {marker}")));
    assert!(left.is_empty(), "{left:?}");
    w.finish().await
}
