//! The life of pods and containers with the real shim, the real store and real CNI plugins, as root.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is used")]

mod world;

use std::time::{Duration, Instant};

use slipway_cri_api::v1;
use world::{World, cannot_run};

const SLEEP: &[&str] = &["sleep", "1000"];

#[tokio::test]
async fn a_pod_and_its_container_go_through_their_whole_life() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("life", true)).await.unwrap();
    let script = "echo hello; echo oops >&2; cat /data/seed; sleep 0.2; exit 7";
    let id = w
        .create(&pod, w.container_config("main", &["sh", "-c", script]))
        .await
        .unwrap();
    let status = w.status(&id).await.unwrap();
    assert_eq!(status.state, v1::ContainerState::ContainerCreated as i32);
    w.start(&id).await.unwrap();
    let output = w
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"], 10)
        .await
        .unwrap();
    assert_eq!(
        (output.exit_code, &output.stdout[..], &output.stderr[..]),
        (3, &b"out\n"[..], &b"err\n"[..])
    );
    let status = w.wait_exit(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
    let log = std::fs::read_to_string(w.path().join("logs/life/main/0.log")).unwrap();
    for line in [" stdout F hello", " stderr F oops", " stdout F from the image"] {
        assert!(log.contains(line), "{line} is not in\n{log}");
    }
    w.remove(&id).await.unwrap();
    w.remove(&id).await.unwrap();
    w.stop_pod(&pod).await.unwrap();
    w.stop_pod(&pod).await.unwrap();
    w.remove_pod(&pod).await.unwrap();
    w.remove_pod(&pod).await.unwrap();
    w.finish().await;
}

#[tokio::test]
async fn a_command_past_its_timeout_is_killed() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("exec", true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    let error = w.exec(&id, &["sleep", "7777"], 1).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    let began = Instant::now();
    let output = w
        .exec(&id, &["sh", "-c", "sleep 30 & echo started"], 20)
        .await
        .unwrap();
    assert_eq!(output.stdout, b"started\n");
    assert!(began.elapsed() < Duration::from_secs(5));
    let ps = w.exec(&id, &["ps"], 5).await.unwrap();
    assert!(!String::from_utf8_lossy(&ps.stdout).contains("7777"));
    w.finish().await;
}

#[tokio::test]
async fn pods_live_through_a_kill_of_slipwayd() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("net", false)).await.unwrap();
    let ip = w
        .pod_status(&pod)
        .await
        .unwrap()
        .status
        .unwrap()
        .network
        .unwrap()
        .ip;
    assert!(!ip.is_empty());
    let long = w.create(&pod, w.container_config("long", SLEEP)).await.unwrap();
    w.start(&long).await.unwrap();
    let short = w
        .create(
            &pod,
            w.container_config("short", &["sh", "-c", "sleep 0.5; exit 9"]),
        )
        .await
        .unwrap();
    w.start(&short).await.unwrap();
    w.kill9();
    tokio::time::sleep(Duration::from_secs(1)).await;
    w.restart(&[]).await;
    assert_eq!(w.wait_exit(&short).await.exit_code, 9);
    assert_eq!(
        w.status(&long).await.unwrap().state,
        v1::ContainerState::ContainerRunning as i32
    );
    let status = w.pod_status(&pod).await.unwrap().status.unwrap();
    assert_eq!(status.state, v1::PodSandboxState::SandboxReady as i32);
    assert_eq!(status.network.unwrap().ip, ip);
    assert_eq!(w.exec(&long, &["true"], 5).await.unwrap().exit_code, 0);
    w.finish().await;
}

#[tokio::test]
async fn a_killed_shim_is_told_as_an_exit_with_a_reason() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("shim", true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    w.kill_shims();
    let status = w.wait_exit(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "ShimDied"));
    let began = Instant::now();
    while w.pods().await[0].state != v1::PodSandboxState::SandboxNotready as i32 {
        assert!(began.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    w.finish().await;
}

/// One whole life, as kubelet would lead it.
async fn whole_life(w: &World, name: &str) -> Result<(), tonic::Status> {
    let pod = w.run_pod(w.pod_config(name, false)).await?;
    let id = w.create(&pod, w.container_config("main", SLEEP)).await?;
    w.start(&id).await?;
    w.exec(&id, &["true"], 5).await?;
    let limits = v1::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    w.update(&id, limits).await?;
    w.stats().await?;
    let side = w.create(&pod, w.container_config("side", SLEEP)).await?;
    w.start(&side).await?;
    let failed = w.fail(slipway_fault_api::v1::FailContainerRequest {
        pod_uid: format!("uid-{name}"),
        container: "side".into(),
        container_id: side.clone(),
        reason: "GpuXid79".into(),
        message: "the GPU is gone".into(),
        only_announce: false,
        hold_seconds: 0,
    });
    assert_eq!(failed.await?.reason, "GpuXid79");
    w.remove(&side).await?;
    w.stop(&id, 0).await?;
    w.remove(&id).await?;
    w.stop_pod(&pod).await?;
    w.remove_pod(&pod).await
}

#[tokio::test]
async fn a_kill_at_any_failpoint_leaks_nothing() {
    if cannot_run() {
        return;
    }
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_slipwayd"))
        .arg("failpoints")
        .output()
        .unwrap();
    let points = String::from_utf8(output.stdout).unwrap();
    let mut w = World::new(&[]).await;
    // Those of pulls, of the store and of a restart are tested elsewhere.
    let others = ["pull_image.", "store.", "recover."];
    let of_pods = |point: &&str| !others.iter().any(|other| point.starts_with(other));
    for point in points.lines().filter(of_pods) {
        w.terminate();
        w.restart(&[("SLIPWAY_FAILPOINTS", &format!("{point}=kill"))])
            .await;
        assert!(whole_life(&w, "fp").await.is_err(), "{point} was not reached");
        w.wait_end().await;
        w.restart(&[]).await;
        for pod in w.pods().await {
            w.remove_pod(&pod.id)
                .await
                .unwrap_or_else(|e| panic!("{point}: {e}\n{}", w.log()));
        }
        assert!(w.containers().await.is_empty(), "{point}");
        whole_life(&w, "fp")
            .await
            .unwrap_or_else(|e| panic!("{point}: {e}\n{}", w.log()));
        let left = w.left().await;
        assert!(left.is_empty(), "{point} leaves {left:#?}\n{}", w.log());
    }
    w.finish().await;
}

#[tokio::test]
async fn an_error_at_any_failpoint_undoes_the_rest() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_slipwayd"))
        .arg("failpoints")
        .output()
        .unwrap();
    let points = String::from_utf8(output.stdout).unwrap();
    for point in points
        .lines()
        .filter(|p| p.starts_with("run_pod") || p.starts_with("create_container"))
    {
        w.terminate();
        w.restart(&[("SLIPWAY_FAILPOINTS", &format!("{point}=error*1"))])
            .await;
        let error = whole_life(&w, "fe").await.unwrap_err();
        assert!(error.message().contains(point), "{error}");
        for pod in w.pods().await {
            w.remove_pod(&pod.id).await.unwrap();
        }
        assert!(w.containers().await.is_empty(), "{point}");
        let left = w.left().await;
        assert!(left.is_empty(), "{point} leaves {left:#?}\n{}", w.log());
        whole_life(&w, "fe")
            .await
            .unwrap_or_else(|e| panic!("{point}: {e}\n{}", w.log()));
    }
    w.finish().await;
}

#[tokio::test]
async fn a_full_disk_keeps_nothing_from_ending_and_being_removed() {
    if cannot_run() {
        return;
    }
    let w = World::with(&[], Some("40m")).await;
    let pod = w.run_pod(w.pod_config("full", true)).await.unwrap();
    let script = "trap 'exit 4' TERM; while true; do sleep 0.05; done";
    let id = w
        .create(&pod, w.container_config("main", &["sh", "-c", script]))
        .await
        .unwrap();
    w.start(&id).await.unwrap();
    let _ = w
        .exec(&id, &["sh", "-c", "cat /dev/zero > /fill; true"], 30)
        .await
        .unwrap();
    // The last pages go to whatever is smaller than a page of the file.
    let filler = w.path().join("root/filler");
    for n in 0..2000 {
        if std::fs::write(filler.with_extension(n.to_string()), [0u8; 4096]).is_err() {
            break;
        }
    }
    let error = w
        .create(&pod, w.container_config("more", SLEEP))
        .await
        .unwrap_err();
    assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error}");
    w.stop(&id, 10).await.unwrap();
    let status = w.status(&id).await.unwrap();
    assert_eq!(
        (status.state, status.exit_code),
        (v1::ContainerState::ContainerExited as i32, 4)
    );
    w.remove(&id).await.unwrap();
    w.remove_pod(&pod).await.unwrap();
    let pod = w.run_pod(w.pod_config("again", true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    w.finish().await;
}

#[tokio::test]
async fn a_network_that_will_not_be_released_holds_nobody_back_and_is_released_in_the_end() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("stubborn", false)).await.unwrap();
    let flag = w.path().join("stubborn");
    std::fs::write(&flag, "").unwrap();
    w.stop_pod(&pod).await.unwrap();
    w.remove_pod(&pod).await.unwrap();
    assert!(w.pods().await.is_empty());
    let request = v1::StatusRequest { verbose: true };
    let status = w.runtime.clone().status(request).await.unwrap().into_inner();
    assert!(status.info["networkReleasesPending"].contains(&pod), "{status:?}");
    let left = w.leftovers();
    assert!(
        left.iter()
            .any(|l| l.starts_with("mount") && l.contains("ns/net")),
        "{left:#?}"
    );

    w.kill9();
    w.restart(&[]).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!w.leftovers().is_empty(), "it is remembered over a restart");
    std::fs::remove_file(&flag).unwrap();
    let began = Instant::now();
    while !w.leftovers().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "{:#?}", w.leftovers());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    w.finish().await;
}

#[tokio::test]
async fn the_command_of_a_client_that_goes_away_is_killed() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("gone", true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    let request = v1::ExecSyncRequest {
        container_id: id.clone(),
        cmd: vec!["sleep".into(), "5555".into()],
        timeout: 0,
    };
    let mut runtime = w.runtime.clone();
    let call = tokio::spawn(async move { runtime.exec_sync(request).await });
    let runs = async || {
        let ps = w.exec(&id, &["ps"], 5).await.unwrap();
        String::from_utf8_lossy(&ps.stdout).contains("5555")
    };
    let began = Instant::now();
    while !runs().await {
        assert!(began.elapsed() < Duration::from_secs(5), "it never ran");
    }
    call.abort();
    let began = Instant::now();
    while runs().await {
        assert!(began.elapsed() < Duration::from_secs(5), "it still runs");
    }
    w.finish().await;
}
