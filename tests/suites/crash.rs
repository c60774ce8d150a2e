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

#[tokio::test]
async fn a_client_that_goes_away_cancels_nothing_half_way() -> Result<()> {
    let mut w = World::new("crash-client").await?;
    w.daemon.stop()?;
    w.restart(&Setup {
        env: vec![(
            "SLIPWAY_FAILPOINTS".into(),
            "run_pod_sandbox.before_cni=sleep:1500".into(),
        )],
        ..Default::default()
    })
    .await?;
    let config = pod_config("gone", &w.lab, false);
    let (cri, c) = (w.daemon.cri().await?, config.clone());
    let call = tokio::spawn(async move { cri.run_pod(c).await });
    tokio::time::sleep(Duration::from_millis(400)).await;
    call.abort();
    let _ = call.await;
    let e = w
        .cri
        .run_pod(config)
        .await
        .expect_err("the first call is still at it");
    assert!(format!("{e:#}").contains("gone"), "{e:#}");
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
    harness::cmd::sh(
        "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null | grep -qx 'sleep 1000 ' && grep -q slipway-test- $p/cgroup 2>/dev/null && kill -9 ${p#/proc/}; done; true",
    )?;
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
    w.restart(&Setup {
        env: vec![("SLIPWAY_BOOT_ID".into(), "another-boot".into())],
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
