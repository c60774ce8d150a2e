//! Whatever is killed, and whenever: after a restart the truth is told, no log line is missing and nothing has leaked.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::cri::{container_config, pod_config};
use harness::image::BUSYBOX;
use harness::{Setup, World, v1};

const SLEEP: &[&str] = &["sleep", "1000"];

#[tokio::test]
async fn pods_live_through_a_kill_of_slipwayd_without_a_gap_in_their_logs() -> Result<()> {
    let mut w = World::new("crash-live").await?;
    let count = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); usleep 5000; done; exit 5";
    let (pod, counting) = w
        .pod_with("count", container_config("count", BUSYBOX, &["sh", "-c", count]))
        .await?;
    let net = pod_config("net", &w.lab, false);
    let net_pod = w.cri.run_pod(net.clone()).await?;
    let sleeping = w
        .cri
        .run(&net_pod, container_config("main", BUSYBOX, SLEEP), net)
        .await?;
    let ip = w
        .cri
        .pod_status(&net_pod)
        .await?
        .status
        .and_then(|s| s.network)
        .map(|n| n.ip);
    let quick = w
        .cri
        .run(
            &pod,
            container_config("quick", BUSYBOX, &["sh", "-c", "sleep 0.5; exit 9"]),
            pod_config("count", &w.lab, true),
        )
        .await?;

    w.daemon.kill9()?;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    w.restart(&Setup::default()).await?;

    assert_eq!(
        w.cri.wait_exit(&quick, Duration::from_secs(5)).await?.exit_code,
        9,
        "it ended while nobody watched"
    );
    let s = w.cri.wait_exit(&counting, Duration::from_secs(20)).await?;
    assert_eq!(s.exit_code, 5);
    let lines: Vec<String> = w.log("count")?.into_iter().map(|l| l.text).collect();
    assert_eq!(lines, (0..300).map(|i| format!("line {i}")).collect::<Vec<_>>());
    let s = w.cri.pod_status(&net_pod).await?.status.expect("a status");
    assert_eq!(s.state, v1::PodSandboxState::SandboxReady as i32);
    assert_eq!(s.network.map(|n| n.ip), ip);
    assert_eq!(w.cri.exec(&sleeping, &["true"], 5).await?.0, 0);
    w.finish().await
}

/// Every failpoint: slipwayd dies there, comes back, and the client tries again as kubelet would.
async fn dies_at(points: &[&str]) -> Result<()> {
    let mut w = World::new("crash-points").await?;
    for (n, point) in points.iter().enumerate() {
        w.daemon.stop()?;
        let setup = Setup {
            env: vec![("SLIPWAY_FAILPOINTS".into(), format!("{point}=kill"))],
            ..Default::default()
        };
        w.restart(&setup).await?;
        let name = format!("fp{n}");
        let config = pod_config(&name, &w.lab, false);
        let r = whole_life(&w, &config).await;
        assert!(
            r.is_err(),
            "{point}: slipwayd was to die there, so the client sees an error"
        );
        w.daemon
            .wait_end(Duration::from_secs(10))
            .await
            .with_context(|| format!("{point} was never reached: {r:?}"))?;
        w.restart(&Setup::default()).await?;
        // As kubelet: what is listed and not wanted is removed, then it tries again with the next attempt.
        for p in w.cri.pods().await? {
            w.cri
                .remove_pod(&p.id)
                .await
                .with_context(|| format!("{point}: {}", w.daemon.log_tail()))?;
        }
        assert!(w.cri.containers().await?.is_empty(), "{point}");
        whole_life(&w, &config)
            .await
            .with_context(|| format!("{point}: again after the crash"))?;
        let left: Vec<String> = harness::leftovers::find(&w.lab)
            .into_iter()
            .filter(|l| !l.contains("slipwayd --config") && !l.starts_with("cgroup"))
            .collect();
        assert!(left.is_empty(), "{point} leaves {left:?}");
    }
    w.finish().await
}

async fn whole_life(w: &World, config: &v1::PodSandboxConfig) -> Result<()> {
    let pod = w.cri.run_pod(config.clone()).await?;
    let id = w
        .cri
        .run(&pod, container_config("main", BUSYBOX, SLEEP), config.clone())
        .await?;
    w.cri.exec(&id, &["true"], 5).await?;
    w.cri.stop(&id, 0).await?;
    w.cri.remove(&id).await?;
    w.cri.remove_pod(&pod).await
}

fn points(prefix: &str) -> Result<Vec<String>> {
    let o = harness::cmd::run(
        &mut harness::cmd::command(harness::lab::bin("slipwayd"), ["failpoints"]),
        Duration::from_secs(10),
    )?
    .ok()?;
    let found: Vec<String> = o
        .stdout
        .lines()
        .filter(|l| l.starts_with(prefix))
        .map(str::to_owned)
        .collect();
    anyhow::ensure!(!found.is_empty(), "slipwayd knows no failpoint {prefix}*");
    Ok(found)
}

async fn dies_at_all(prefix: &str) -> Result<()> {
    let points = points(prefix)?;
    dies_at(&points.iter().map(String::as_str).collect::<Vec<_>>()).await
}

#[tokio::test]
async fn a_kill_at_any_point_of_run_pod_sandbox_leaks_nothing() -> Result<()> {
    dies_at_all("run_pod_sandbox.").await
}

#[tokio::test]
async fn a_kill_at_any_point_of_create_container_leaks_nothing() -> Result<()> {
    dies_at_all("create_container.").await
}

#[tokio::test]
async fn a_kill_at_any_point_of_start_container_leaks_nothing() -> Result<()> {
    dies_at_all("start_container.").await
}

#[tokio::test]
async fn a_kill_at_any_point_of_stop_pod_sandbox_leaks_nothing() -> Result<()> {
    dies_at_all("stop_pod_sandbox.").await
}

#[tokio::test]
async fn a_kill_at_any_point_of_remove_pod_sandbox_leaks_nothing() -> Result<()> {
    dies_at_all("remove_pod_sandbox.").await
}

#[tokio::test]
async fn an_error_at_any_point_of_run_pod_sandbox_undoes_the_rest() -> Result<()> {
    let mut w = World::new("crash-undo").await?;
    for (n, point) in points("run_pod_sandbox.")?.iter().enumerate() {
        w.daemon.stop()?;
        w.restart(&Setup {
            env: vec![("SLIPWAY_FAILPOINTS".into(), format!("{point}=error"))],
            ..Default::default()
        })
        .await?;
        let config = pod_config(&format!("undo{n}"), &w.lab, false);
        let e = w.cri.run_pod(config).await.expect_err("the failpoint");
        assert!(w.cri.pods().await?.is_empty(), "{point}: {e:#}");
        let left: Vec<String> = harness::leftovers::find(&w.lab)
            .into_iter()
            .filter(|l| !l.contains("slipwayd --config") && !l.starts_with("cgroup"))
            .collect();
        assert!(left.is_empty(), "{point} leaves {left:?}");
    }
    w.finish().await
}

#[tokio::test]
async fn a_killed_shim_is_an_exit_of_its_containers_with_a_reason() -> Result<()> {
    let w = World::new("crash-shim").await?;
    let marker = format!("{}", 200_000 + std::process::id());
    let mut c = container_config(
        "main",
        BUSYBOX,
        &["sh", "-c", &format!("(setsid sleep {marker} &); sleep {marker}")],
    );
    c.linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .namespace_options = Some(v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Node as i32,
        ..Default::default()
    });
    let (pod, id) = w.pod_with("shim", c).await?;
    let shims: Vec<u32> = harness::leftovers::processes_naming(w.daemon.state())
        .into_iter()
        .filter(|(_, c)| c.contains("containerd-shim-slipway-v1"))
        .map(|(p, _)| p)
        .collect();
    assert_eq!(shims.len(), 1, "one shim a pod");
    let shim = rustix::process::Pid::from_raw(i32::try_from(shims[0])?).expect("a pid");
    rustix::process::kill_process(shim, rustix::process::Signal::KILL)?;
    let s = w.cri.wait_exit(&id, Duration::from_secs(10)).await?;
    assert_eq!(s.exit_code, 137);
    assert!(!s.reason.is_empty() && !s.message.is_empty(), "{s:?}");
    let left = harness::leftovers::processes_naming(std::path::Path::new(&format!("sleep {marker}")));
    assert!(left.is_empty(), "{left:?}");
    let p = w.cri.pod_status(&pod).await?.status.expect("a status");
    assert_eq!(p.state, v1::PodSandboxState::SandboxNotready as i32);
    w.finish().await
}

/// The host's pids of a container, from the cgroup that has its id.
fn pids_of(lab: &harness::Lab, id: &str) -> Result<Vec<i32>> {
    let find = format!(
        "find /sys/fs/cgroup/pids{} -name cgroup.procs -path '*{id}*' -exec cat {{}} +",
        lab.cgroup()
    );
    let o = harness::cmd::sh(&find)?;
    Ok(o.lines().filter_map(|l| l.parse().ok()).collect())
}

/// Whether a process is the first of a PID namespace of its own.
fn is_first(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.is_some_and(|numbers| numbers.split_whitespace().collect::<Vec<_>>()[1..] == ["1"])
}

async fn kill_init(lab: &harness::Lab, id: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        // The worker that makes it is in there before it, and perhaps after.
        if let [pid] = pids_of(lab, id)?[..]
            && is_first(pid)
        {
            let pid = rustix::process::Pid::from_raw(pid).context("a pid")?;
            return Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?);
        }
        anyhow::ensure!(
            began.elapsed() < Duration::from_secs(10),
            "one init waits for its start: {:?}",
            pids_of(lab, id)?
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_init_killed_between_create_and_start_is_an_exit() -> Result<()> {
    let mut w = World::new("crash-early").await?;
    let config = pod_config("early", &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let create = async |w: &World, name: &str| {
        let c = container_config(name, BUSYBOX, SLEEP);
        w.cri.create(&pod, c, config.clone()).await
    };
    let ended = async |w: &World, id: &str| -> Result<()> {
        let s = w.cri.wait_exit(id, Duration::from_secs(10)).await?;
        assert_eq!((s.exit_code, s.started_at), (137, 0), "{s:?}");
        // It may be busy with letting go of what it held.
        let began = Instant::now();
        loop {
            let e = w.cri.start(id).await.expect_err("it has ended");
            if format!("{e:#}").contains("exited") {
                break;
            }
            anyhow::ensure!(began.elapsed() < Duration::from_secs(5), "{e:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    // When CreateContainer has long answered.
    let id = create(&w, "late").await?;
    kill_init(&w.lab, &id).await?;
    ended(&w, &id).await?;

    // With slipwayd dead meanwhile.
    let id = create(&w, "dead").await?;
    w.daemon.kill9()?;
    kill_init(&w.lab, &id).await?;
    w.restart(&Setup::default()).await?;
    ended(&w, &id).await?;

    // While CreateContainer does not know yet that there is an init: its end is told first.
    w.daemon.stop()?;
    w.restart(&Setup {
        env: vec![(
            "SLIPWAY_FAILPOINTS".into(),
            "create_container.after_create=sleep:1500".into(),
        )],
        ..Default::default()
    })
    .await?;
    let (id, killed) = tokio::join!(create(&w, "first"), kill_init(&w.lab, ""));
    killed?;
    let id = id?;
    ended(&w, &id).await?;
    // And what was told is remembered.
    w.daemon.kill9()?;
    w.restart(&Setup::default()).await?;
    ended(&w, &id).await?;
    w.finish().await
}

/// A world whose worker is busybox by another name: an applet that takes any arguments.
async fn with_worker(what: &str, applet: &str) -> Result<World> {
    let mut w = World::new(what).await?;
    let worker = w.lab.join(applet);
    std::fs::copy("/bin/busybox", &worker)?;
    w.daemon.stop()?;
    w.restart(&Setup {
        config: format!("[runtime]\nworker = {worker:?}\n"),
        ..Default::default()
    })
    .await?;
    Ok(w)
}

/// A container that cannot be made: its start says why, and nothing is left but the exited container, which goes.
async fn starts_nothing(w: &World, pod: &str, config: &v1::PodSandboxConfig) -> Result<String> {
    let c = container_config("main", BUSYBOX, SLEEP);
    let id = w.cri.create(pod, c, config.clone()).await?;
    let e = w.cri.start(&id).await.expect_err("the worker makes nothing");
    let status = e.downcast_ref::<tonic::Status>().context("a gRPC status")?;
    let s = w.cri.status(&id).await?;
    assert_eq!(
        (s.state, s.exit_code, s.reason.as_str(), s.started_at),
        (v1::ContainerState::ContainerExited as i32, 128, "StartError", 0)
    );
    assert_eq!(s.message, status.message(), "the whole error");
    assert!(s.finished_at > 0);
    let find = format!("find /sys/fs/cgroup/pids{} -mindepth 2 -type d", w.lab.cgroup());
    assert_eq!(harness::cmd::sh(&find)?, "", "{e:#}");
    let bundle = w.daemon.state().join("containers").join(&id);
    assert_eq!(
        harness::leftovers::mounts_under(&bundle),
        Vec::<String>::new(),
        "{e:#}"
    );
    assert_eq!(harness::leftovers::processes_naming(&bundle), [], "{e:#}");
    assert!(!bundle.join("state").exists(), "the worker's record");
    // Whoever starts it again is told the same.
    let again = w.cri.start(&id).await.expect_err("it has ended");
    let again = again.downcast_ref::<tonic::Status>().context("a gRPC status")?;
    assert_eq!(again.message(), status.message());
    w.cri.remove(&id).await?;
    let left = harness::cmd::sh(&format!("ls -A {}/containers", w.daemon.state().display()))?;
    assert_eq!(left, "", "{e:#}");
    Ok(format!("{e:#}"))
}

#[tokio::test]
async fn a_worker_that_dies_in_the_middle_of_a_create_leaves_nothing() -> Result<()> {
    // "sleep create --id …" complains and ends; "watch create --id …" goes on until it is killed.
    let w = with_worker("crash-worker", "sleep").await?;
    let config = pod_config("dies", &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let e = starts_nothing(&w, &pod, &config).await?;
    assert!(e.contains("worker") && e.contains("exit code"), "{e}");
    // The name is free again, and the pod is as good as before.
    starts_nothing(&w, &pod, &config).await?;
    w.finish().await?;

    let w = with_worker("crash-killed", "watch").await?;
    let config = pod_config("killed", &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let kill = async {
        loop {
            let pids = pids_of(&w.lab, "")?;
            for pid in pids.iter().filter_map(|pid| rustix::process::Pid::from_raw(*pid)) {
                match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
                    // What it runs now and then is gone by itself, sometimes just before it is killed.
                    Err(rustix::io::Errno::SRCH) => {}
                    killed => killed?,
                }
            }
            if !pids.is_empty() {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (e, killed) = tokio::join!(starts_nothing(&w, &pod, &config), kill);
    killed?;
    let e = e?;
    assert!(e.contains("worker") && e.contains("signal 9"), "{e}");
    w.finish().await
}

#[tokio::test]
async fn a_worker_that_hangs_in_the_middle_of_a_create_is_ended_at_its_deadline() -> Result<()> {
    let w = with_worker("crash-hang", "watch").await?;
    let config = pod_config("hangs", &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let began = Instant::now();
    let other = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let other = w.cri.run_pod(pod_config("other", &w.lab, true)).await?;
        w.cri.remove_pod(&other).await?;
        anyhow::Ok(began.elapsed())
    };
    let (e, other) = tokio::join!(starts_nothing(&w, &pod, &config), other);
    let e = e?;
    assert!(e.contains("worker") && e.contains("30s"), "{e}");
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
    assert!(other? < Duration::from_secs(20), "other pods do not wait for it");
    w.finish().await
}

#[tokio::test]
async fn a_full_log_disk_holds_no_container_up_and_the_loss_is_told() -> Result<()> {
    let w = World::new("crash-logdisk").await?;
    let logs = w.lab.join("logs/full");
    std::fs::create_dir_all(&logs)?;
    harness::cmd::sh(&format!(
        "mount -t tmpfs -o size=128k tmpfs {0} && head -c 65536 /dev/zero > {0}/ballast",
        logs.display()
    ))?;
    let script = "yes 0123456789 | head -c 3300000; echo > /tmp/done; while [ ! -e /tmp/go ]; do usleep 20000; done; echo last; exit 3";
    let told = async {
        let (_, id) = w
            .pod_with("full", container_config("full", BUSYBOX, &["sh", "-c", script]))
            .await?;
        let began = Instant::now();
        while w.cri.exec(&id, &["test", "-e", "/tmp/done"], 5).await?.0 != 0 {
            anyhow::ensure!(
                began.elapsed() < Duration::from_secs(20),
                "the container is held up by its log"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        std::fs::remove_file(logs.join("ballast"))?;
        w.cri.exec(&id, &["touch", "/tmp/go"], 5).await?;
        let s = w.cri.wait_exit(&id, Duration::from_secs(20)).await?;
        assert_eq!(s.exit_code, 3);
        w.log("full")
    }
    .await;
    let log = w.daemon.log();
    harness::cmd::sh(&format!("umount -l {}", logs.display()))?;
    let lines = told?;
    let losses: Vec<_> = lines
        .iter()
        .filter(|l| l.text.contains("bytes of log were lost here: No space left"))
        .collect();
    assert_eq!(losses.len(), 1, "the log itself says where something is missing");
    assert_eq!(lines.last().map(|l| l.text.as_str()), Some("last"));
    let whole = lines
        .iter()
        .filter(|l| !l.text.contains("lost here") && l.text != "last");
    assert!(whole.clone().count() > 100 && whole.clone().all(|l| l.text == "0123456789" && !l.partial));
    assert!(log.contains("log lines were lost"), "slipwayd says it too");
    w.finish().await
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_nothing_half_way() -> Result<()> {
    let mut w = World::new("crash-client").await?;
    w.daemon.stop()?;
    w.restart(&Setup {
        env: vec![(
            "SLIPWAY_FAILPOINTS".into(),
            "run_pod_sandbox.before_cni=sleep:3000".into(),
        )],
        ..Default::default()
    })
    .await?;
    let config = pod_config("gone", &w.lab, false);
    let (cri, c) = (w.daemon.cri().await?, config.clone());
    let call = tokio::spawn(async move { cri.run_pod(c).await });
    w.daemon
        .until_logged(&["failpoint passed", "run_pod_sandbox.before_cni"])
        .await?;
    call.abort();
    let _ = call.await;
    let e = w
        .cri
        .run_pod(config)
        .await
        .expect_err("the first call is still at it");
    assert_in_progress(&e);
    let began = Instant::now();
    loop {
        let pods = w.cri.pods().await?;
        if pods
            .iter()
            .any(|p| p.state == v1::PodSandboxState::SandboxReady as i32)
        {
            break;
        }
        anyhow::ensure!(
            began.elapsed() < Duration::from_secs(10),
            "the pod of the client that went away never came: {pods:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    w.finish().await
}

/// The answer to a call while an identical one is at work: told as such, and to be tried again.
fn assert_in_progress(e: &anyhow::Error) {
    let status = e.downcast_ref::<tonic::Status>().expect("a gRPC status");
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert!(status.message().contains("in progress"), "{status}");
}

#[tokio::test]
async fn containers_of_a_client_that_goes_away_are_made_and_started_all_the_same() -> Result<()> {
    let mut w = World::new("crash-client2").await?;
    w.daemon.stop()?;
    let points = "create_container.after_snapshot=sleep:3000*1;start_container.before_start=sleep:3000*1";
    w.restart(&Setup {
        env: vec![("SLIPWAY_FAILPOINTS".into(), points.into())],
        ..Default::default()
    })
    .await?;
    let pod = pod_config("gone", &w.lab, true);
    let id = w.cri.run_pod(pod.clone()).await?;
    let container = container_config("main", BUSYBOX, SLEEP);
    let create = async |cri: harness::cri::Cri| cri.create(&id, container.clone(), pod.clone()).await;
    let other = w.daemon.cri().await?;
    tokio::select! {
        called = create(other) => panic!("the client goes away in the middle: {called:?}"),
        waits = w.daemon.until_logged(&["failpoint passed", "create_container.after_snapshot"]) => waits?,
    }
    assert_in_progress(
        &create(w.cri.clone())
            .await
            .expect_err("the first call is still at it"),
    );
    let made = async |wanted: v1::ContainerState| {
        let began = Instant::now();
        loop {
            let all = w.cri.containers().await?;
            if let Some(c) = all.iter().find(|c| c.state == wanted as i32) {
                return Ok(c.id.clone());
            }
            anyhow::ensure!(
                began.elapsed() < Duration::from_secs(10),
                "never {wanted:?}: {all:?}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let container = made(v1::ContainerState::ContainerCreated).await?;
    let other = w.daemon.cri().await?;
    tokio::select! {
        called = other.start(&container) => panic!("the client goes away in the middle: {called:?}"),
        waits = w.daemon.until_logged(&["failpoint passed", "start_container.before_start"]) => waits?,
    }
    assert_in_progress(
        &w.cri
            .start(&container)
            .await
            .expect_err("the first call is still at it"),
    );
    assert_eq!(made(v1::ContainerState::ContainerRunning).await?, container);
    w.finish().await
}

/// Puts the programs where an installation would, replacing those there as a package's upgrade does: by rename, while
/// they run.
fn install(dir: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    for program in ["slipwayd", "containerd-shim-slipway-v1", "slipway-runc"] {
        let new = dir.join(format!("{program}.new"));
        std::fs::copy(harness::lab::bin(program), &new)?;
        std::fs::rename(new, dir.join(program))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_newer_slipwayd_takes_over_the_pods_of_the_older_one() -> Result<()> {
    let mut w = World::new("crash-upgrade").await?;
    let bin = w.lab.join("bin");
    install(&bin)?;
    let older = Setup {
        program: Some(bin.join("slipwayd")),
        ..Default::default()
    };
    let newer = Setup {
        env: vec![("SLIPWAY_AS_VERSION".into(), "99.1.0/99".into())],
        ..older.clone()
    };
    w.daemon.stop()?;
    w.restart(&older).await?;
    let version = async |w: &World| -> Result<String> {
        let r = w
            .cri
            .runtime
            .clone()
            .version(v1::VersionRequest::default())
            .await?;
        Ok(r.into_inner().runtime_version)
    };
    assert_ne!(version(&w).await?, "99.1.0");
    let count = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); usleep 5000; done; exit 5";
    let counting = container_config("count", BUSYBOX, &["sh", "-c", count]);
    let (_, counting) = w.pod_with("count", counting).await?;
    let net = pod_config("net", &w.lab, false);
    let old_pod = w.cri.run_pod(net.clone()).await?;
    let sleeping = container_config("main", BUSYBOX, SLEEP);
    let sleeping = w.cri.run(&old_pod, sleeping, net.clone()).await?;
    let ip = async |w: &World| -> Result<String> {
        let status = w.cri.pod_status(&old_pod).await?.status.context("a status")?;
        assert_eq!(status.state, v1::PodSandboxState::SandboxReady as i32);
        Ok(status.network.map(|n| n.ip).unwrap_or_default())
    };
    let address = ip(&w).await?;
    let quick = container_config("quick", BUSYBOX, &["sh", "-c", "sleep 0.6; exit 9"]);
    let quick = w.cri.run(&old_pod, quick, net.clone()).await?;

    w.daemon.stop()?;
    install(&bin)?;
    tokio::time::sleep(Duration::from_millis(700)).await;
    w.restart(&newer).await?;
    assert_eq!(version(&w).await?, "99.1.0");
    assert_eq!(
        w.cri.wait_exit(&quick, Duration::from_secs(5)).await?.exit_code,
        9
    );
    assert_eq!(
        w.cri
            .wait_exit(&counting, Duration::from_secs(20))
            .await?
            .exit_code,
        5
    );
    let lines: Vec<String> = w.log("count")?.into_iter().map(|l| l.text).collect();
    assert_eq!(lines, (0..400).map(|i| format!("line {i}")).collect::<Vec<_>>());
    assert_eq!(ip(&w).await?, address);
    assert_eq!(w.cri.exec(&sleeping, &["true"], 5).await?.0, 0);
    // The older shim makes more with the newer worker.
    let more = container_config("more", BUSYBOX, &["sh", "-c", "exit 3"]);
    let more = w.cri.run(&old_pod, more, net.clone()).await?;
    assert_eq!(w.cri.wait_exit(&more, Duration::from_secs(5)).await?.exit_code, 3);
    let (new_pod, new) = w.pod_with("new", container_config("new", BUSYBOX, SLEEP)).await?;

    // Back again: what only the newer one knows is left alone, and told of.
    w.daemon.kill9()?;
    w.restart(&older).await?;
    let pods = w.cri.pods().await?;
    assert!(
        pods.iter().any(|p| p.id == old_pod) && pods.iter().all(|p| p.id != new_pod),
        "{pods:?}"
    );
    let r = v1::StatusRequest { verbose: true };
    let status = w.cri.runtime.clone().status(r).await?.into_inner();
    assert!(status.info["unreadableRecords"].contains(&new_pod));
    assert!(w.cri.remove(&new).await.is_err());
    assert!(w.cri.remove_pod(&new_pod).await.is_err());

    w.daemon.kill9()?;
    w.restart(&newer).await?;
    assert_eq!(w.cri.exec(&new, &["true"], 5).await?.0, 0);
    assert_eq!(w.cri.exec(&sleeping, &["true"], 5).await?.0, 0);
    w.finish().await
}

#[tokio::test]
async fn a_reboot_is_told_from_a_restart_and_undone() -> Result<()> {
    let mut w = World::new("crash-boot").await?;
    let config = pod_config("boot", &w.lab, false);
    let pod = w.cri.run_pod(config.clone()).await?;
    let id = w
        .cri
        .run(&pod, container_config("main", BUSYBOX, SLEEP), config)
        .await?;
    w.daemon.kill9()?;
    // What a reboot does: every process of the pod dies, its mounts and state go; the root stays.
    for (pid, _) in harness::leftovers::processes_naming(w.daemon.state()) {
        if let Some(p) = rustix::process::Pid::from_raw(i32::try_from(pid)?) {
            let _ = rustix::process::kill_process(p, rustix::process::Signal::KILL);
        }
    }
    for pid in pids_of(&w.lab, "")? {
        if let Some(p) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(p, rustix::process::Signal::KILL);
        }
    }
    for m in harness::leftovers::mounts_under(w.daemon.state())
        .into_iter()
        .rev()
    {
        let _ = harness::cmd::run(
            &mut harness::cmd::command("umount", ["-l", &m]),
            Duration::from_secs(5),
        );
    }
    std::fs::remove_dir_all(w.daemon.state())?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    harness::leftovers::forget_as_a_reboot_does(&w.lab)?;
    let boot = w.lab.write("boot_id", "another-boot\n")?;
    w.restart(&Setup {
        args: vec!["--boot-id-file".into(), boot.display().to_string()],
        ..Default::default()
    })
    .await?;
    let s = w.cri.status(&id).await?;
    assert_eq!(s.state, v1::ContainerState::ContainerExited as i32);
    let p = w.cri.pod_status(&pod).await?.status.expect("a status");
    assert_eq!(p.state, v1::PodSandboxState::SandboxNotready as i32);
    w.finish().await
}

#[tokio::test]
async fn a_second_slipwayd_on_the_same_root_is_refused_by_name() -> Result<()> {
    let w = World::new("crash-two").await?;
    let o = harness::cmd::run(
        harness::cmd::command(harness::lab::bin("slipwayd"), ["--root"])
            .arg(w.daemon.root())
            .arg("--state")
            .arg(w.lab.join("state2"))
            .arg("--socket")
            .arg(w.lab.join("state2/slipwayd.sock")),
        Duration::from_secs(10),
    )?;
    assert_ne!(o.code, 0);
    assert!(
        o.stderr.contains(&w.daemon.pid().to_string()),
        "the holder is named: {}",
        o.stderr
    );
    w.finish().await
}

#[tokio::test]
async fn a_pod_that_could_not_be_caught_up_with_is_looked_at_again() -> Result<()> {
    let mut w = World::new("crash-follow").await?;
    let (_, id) = w
        .pod_with("follow", container_config("follow", BUSYBOX, SLEEP))
        .await?;
    w.daemon.kill9()?;
    w.restart(&Setup {
        env: vec![("SLIPWAY_FAILPOINTS".into(), "recover.follow=error*1".into())],
        ..Default::default()
    })
    .await?;
    kill_init(&w.lab, &id).await?;
    let s = w.cri.wait_exit(&id, Duration::from_secs(30)).await?;
    assert_eq!(s.exit_code, 137);
    w.finish().await
}
