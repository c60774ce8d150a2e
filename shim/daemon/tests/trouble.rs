//! What goes wrong: dead shims, dead and hanging workers, slow readers, floods of output, lost clients.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use slipway_shim_client::{Code, DeadContainer, Error, pod};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use support::{TestPod, cgroups_of, pipe, until};

async fn kill_shim(pod: &TestPod) {
    let pid = pod.shim.info().await.unwrap().pid;
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    tokio::time::timeout(Duration::from_secs(5), pod.shim.closed())
        .await
        .unwrap();
    assert!(matches!(pod.shim.info().await, Err(Error::Gone)));
}

#[tokio::test]
async fn root_a_shim_killed_leaves_nothing_after_its_clean_up() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|r| {
        r.net = pod::NamespaceMode::Pod.into();
        r.ipc = pod::NamespaceMode::Pod.into();
        r.uts = pod::NamespaceMode::Pod.into();
    })
    .await;
    pod.run("runs", "sleep 1000 & setsid sleep 1000 & sleep 1000")
        .await;
    pod.run("ended", "exit 4").await;
    assert_eq!(pod.exit_of("ended").await.code, 4);
    kill_shim(&pod).await;
    // A child that another test has just forked may hold the listening socket for a moment.
    let end = Instant::now() + Duration::from_secs(5);
    while !matches!(pod.launcher.connect(pod.dir.path()).await, Err(Error::Gone)) {
        assert!(Instant::now() < end, "somebody listens for a dead shim");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let dead = pod.launcher.cleanup(pod.dir.path(), false).await.unwrap();
    let expected = [
        DeadContainer {
            id: "runs".into(),
            exit_code: 137,
            oom_killed: false,
            at_ns: 0,
        },
        DeadContainer {
            id: "ended".into(),
            exit_code: 4,
            oom_killed: false,
            at_ns: 0,
        },
    ];
    let untimed: Vec<_> = dead
        .iter()
        .map(|d| DeadContainer {
            at_ns: 0,
            ..d.clone()
        })
        .collect();
    assert_eq!(untimed, expected);
    assert!(dead.iter().all(|d| d.at_ns > 0), "the time of each end: {dead:?}");
    assert!(cgroups_of(&format!("{}/runs", pod.cgroup)).is_empty());
    assert!(
        pod.path("ns/net").exists(),
        "the network's is somebody else's to release"
    );
    assert!(!pod.path("ns/ipc").exists());
    assert!(!cgroups_of(&pod.cgroup).is_empty());

    let again = pod.launcher.cleanup(pod.dir.path(), true).await.unwrap();
    assert_eq!(again, expected, "a second clean-up says the same");
    assert!(!pod.path("ns/net").exists());
    pod.assert_nothing_left();
}

#[tokio::test]
async fn root_what_double_forked_in_the_hosts_pid_namespace_dies_with_its_container() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let mut container = pod.container("c", "");
    container.bundle = pod.bundle(
        "c",
        "(setsid sleep 1000 >/dev/null 2>&1 &) ; sleep 0.1; exit 2",
        |config| {
            config["linux"]["namespaces"] =
                serde_json::json!([{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]);
        },
    );
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 2);
    assert!(
        pod.shim.pids("c").await.unwrap().is_empty(),
        "the exit is reported when nothing is left"
    );
    pod.finish().await;
}

/// A handle on nothing.
async fn disconnected() -> slipway_shim_client::Shim {
    let dir = tempfile::tempdir().unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("shim.sock")).unwrap();
    let launcher = slipway_shim_client::Launcher {
        shim: "/x".into(),
        worker: "/x".into(),
    };
    launcher.connect(dir.path()).await.unwrap()
}

#[tokio::test]
async fn root_a_client_that_goes_away_ends_nothing_and_another_finds_everything() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "echo one; sleep 0.3; echo two; exit 9").await;
    // The old connection goes with its only handle, and nothing is connected for a while.
    let mut pod = pod;
    pod.shim = disconnected().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    pod.shim = pod.launcher.connect(pod.dir.path()).await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 9);
    assert_eq!(pod.log_lines("c"), ["stdout F one", "stdout F two"]);
    let events = pod.shim.events(0, Duration::ZERO).await.unwrap();
    assert_eq!(events.len(), 1, "the exit was kept");
    pod.finish().await;
}

fn fake_worker(dir: &std::path::Path, script: &str) -> PathBuf {
    let path = dir.join("worker");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn root_a_worker_that_dies_is_an_error_and_leaves_nothing() {
    if !support::is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pod = support::pod_with(fake_worker(dir.path(), "(sleep 1000 &) ; kill -9 $$")).await;
    pod.create_pod(|_| {}).await;
    let error = pod.shim.create(pod.container("c", "true")).await.unwrap_err();
    assert!(
        error.to_string().contains("create container c") && error.to_string().contains("signal 9"),
        "{error}"
    );
    assert!(
        cgroups_of(&format!("{}/c", pod.cgroup)).is_empty(),
        "its cgroup is gone when the error arrives"
    );
    assert!(!pod.path("bundle-c/state").exists());
    assert!(pod.shim.info().await.unwrap().containers.is_empty());
    // The name is free again.
    let again = pod.shim.create(pod.container("c", "true")).await.unwrap_err();
    assert!(again.to_string().contains("signal 9"), "{again}");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_worker_that_reports_a_failure_is_quoted() {
    if !support::is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let worker = fake_worker(
        dir.path(),
        r#"printf '{"error":"mount /x: no such device"}\n' >&3; exit 1"#,
    );
    let pod = support::pod_with(worker).await;
    pod.create_pod(|_| {}).await;
    let error = pod.shim.create(pod.container("c", "true")).await.unwrap_err();
    assert_eq!(error.to_string(), "create container c: mount /x: no such device");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_worker_that_hangs_does_not_hold_up_others_and_is_killed_with_the_pod() {
    if !support::is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pod = support::pod_with(fake_worker(dir.path(), "sleep 1000")).await;
    pod.create_pod(|_| {}).await;
    let (shim, container) = (pod.shim.clone(), pod.container("c", "true"));
    let creating = tokio::spawn(async move { shim.create(container).await });
    let end = Instant::now() + Duration::from_secs(5);
    while pod.shim.info().await.unwrap().containers.is_empty() {
        assert!(Instant::now() < end);
    }
    assert_eq!(pod.state("c").await.state(), pod::ContainerState::Creating);
    let begin = Instant::now();
    let refused = pod.shim.start("c").await.unwrap_err();
    assert!(refused.is(Code::FailedPrecondition), "{refused}");
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "calls are answered meanwhile"
    );
    pod.shim.stop_pod().await.unwrap();
    let error = creating.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("create container c"), "{error}");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_worker_that_hangs_is_killed_after_its_deadline() {
    if !support::is_root() || std::env::var_os("SLIPWAY_SLOW_TESTS").is_none() {
        eprintln!("SKIPPED: takes 30 s; set SLIPWAY_SLOW_TESTS");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pod = support::pod_with(fake_worker(dir.path(), "sleep 1000")).await;
    pod.create_pod(|_| {}).await;
    let begin = Instant::now();
    let error = pod.shim.create(pod.container("c", "true")).await.unwrap_err();
    assert!(error.is(Code::DeadlineExceeded), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(40));
    assert!(cgroups_of(&format!("{}/c", pod.cgroup)).is_empty());
    pod.finish().await;
}

#[tokio::test]
async fn root_one_endless_line_keeps_the_shims_memory_bounded() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let shim = pod.shim.info().await.unwrap().pid;
    pod.run("c", "yes | tr -d '\\n' | head -c 300000000").await;
    let mut most = 0;
    let exit = {
        let wait = pod.exit_of("c");
        tokio::pin!(wait);
        loop {
            tokio::select! {
                exit = &mut wait => break exit,
                () = tokio::time::sleep(Duration::from_millis(10)) => {
                    most = most.max(support::private_kib(shim));
                }
            }
        }
    };
    assert_eq!(exit.code, 0);
    let log = std::fs::metadata(pod.log("c")).unwrap().len();
    let lines = 300_000_000_u64.div_ceil(16384);
    assert_eq!(
        log,
        300_000_000 + lines * ("2026-01-01T00:00:00.000000000Z stdout P \n".len() as u64)
    );
    assert!(most < 8 * 1024, "the shim used {most} KiB of its own");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_log_is_reopened_without_losing_a_line() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done")
        .await;
    let mut parts = Vec::new();
    for n in 0..5 {
        tokio::time::sleep(Duration::from_millis(2)).await;
        let old = pod.path(&format!("c.log.{n}"));
        std::fs::rename(pod.log("c"), &old).unwrap();
        parts.push(old);
        if pod.shim.reopen_log("c").await.is_err() {
            break;
        }
    }
    pod.exit_of("c").await;
    parts.push(pod.log("c"));
    let all: String = parts
        .iter()
        .map(|p| std::fs::read_to_string(p).unwrap_or_default())
        .collect();
    let numbers: Vec<_> = all
        .lines()
        .filter_map(|l| l.rsplit_once(' ')?.1.parse::<u32>().ok())
        .collect();
    assert_eq!(numbers, (0..2000).collect::<Vec<_>>());

    std::fs::remove_file(pod.log("c")).ok();
    let ended = pod.shim.reopen_log("c").await.unwrap_err();
    assert!(ended.is_not_found(), "{ended}");
    assert!(!pod.log("c").exists(), "an error creates no file");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_slow_reader_does_not_hold_up_the_log() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let container = pod.container("c", "sleep 0.2; yes 0123456789 | head -c 1100000; echo; echo end");
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    let (_never_read, stdout) = pipe();
    let request = pod::AttachRequest {
        container_id: "c".into(),
        stdout: true,
        ..Default::default()
    };
    pod.shim.attach(request, vec![stdout]).await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 0);
    let lines = pod.log_lines("c");
    assert_eq!(
        lines.iter().filter(|l| *l == "stdout F 0123456789").count(),
        100_000
    );
    assert_eq!(lines.last().map(String::as_str), Some("stdout F end"));
    pod.finish().await;
}

#[tokio::test]
async fn root_a_full_log_disk_does_not_stop_the_container_and_is_told() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let small = pod.path("small");
    std::fs::create_dir(&small).unwrap();
    slipway_sys::mount::tmpfs(&small, 64 * 1024, 0o755).unwrap();
    let mut container =
        pod.container("c", "yes 0123456789 | head -c 1100000; echo filled > /tmp/done; while [ ! -e /tmp/go ]; do sleep 0.02; done; echo last");
    container.stdout = slipway_shim_client::Output::CriLog(small.join("c.log"));
    let ballast = small.join("ballast");
    std::fs::write(&ballast, vec![0; 32 * 1024]).unwrap();
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    let done = pod.path("bundle-c/rootfs/tmp/done");
    until("the container has written everything", || done.exists()).await;
    std::fs::remove_file(&ballast).unwrap();
    std::fs::write(pod.path("bundle-c/rootfs/tmp/go"), "").unwrap();
    assert_eq!(pod.exit_of("c").await.code, 0);
    let log = std::fs::read_to_string(small.join("c.log")).unwrap();
    assert_eq!(
        log.lines()
            .filter(|l| l.contains("bytes of log were lost here"))
            .count(),
        1,
        "{log}"
    );
    assert!(log.ends_with("stdout F last\n"));
    let events = pod.shim.events(0, Duration::ZERO).await.unwrap();
    let told: u64 = events
        .iter()
        .filter_map(|e| match &e.what {
            Some(pod::event::What::LogLoss(loss)) => Some(loss.bytes),
            _ => None,
        })
        .sum();
    let lost = pod.state("c").await.log_bytes_lost;
    assert!(lost > 1_000_000 && told == lost, "lost {lost}, told {told}");
    slipway_sys::mount::unmount(&small, true).unwrap();
    pod.finish().await;
}

#[tokio::test]
async fn root_many_clients_and_calls_at_once_are_all_answered() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let mut tasks = Vec::new();
    for n in 0..20u32 {
        let shim = pod.launcher.connect(pod.dir.path()).await.unwrap();
        tasks.push(tokio::spawn(async move {
            for _ in 0..5 {
                let request = pod::ExecRequest {
                    container_id: "c".into(),
                    args: ["/bin/sh", "-c", &format!("exit {n}")]
                        .map(str::to_owned)
                        .to_vec(),
                    ..Default::default()
                };
                let (response, _) = shim.exec(request, vec![]).await.unwrap();
                assert_eq!(response.exit_code, n);
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    pod.finish().await;
}
