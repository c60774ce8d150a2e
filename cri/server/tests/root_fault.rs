//! `slipway.fault.v1` as its callers see it: a container is ended for a reason, whatever becomes of slipwayd meanwhile, and
//! nobody but root is listened to. With the real shim, as root.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is used")]

mod world;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use slipway_cri_api::v1;
use slipway_fault_api::v1::fail_container_response::Outcome;
use slipway_fault_api::v1::{FailContainerRequest, FailContainerResponse};
use tonic::{Code, Status};
use world::{World, ask_to_fail, cannot_run};

const SLEEP: &[&str] = &["sleep", "1000"];
const RUNNING: i32 = v1::ContainerState::ContainerRunning as i32;
const EXITED: i32 = v1::ContainerState::ContainerExited as i32;
const REASON: &str = "GpuXid79";
const MESSAGE: &str = "GPU 0 (GPU-1): XID 79: fallen off the bus";

fn socket(w: &World) -> PathBuf {
    w.path().join("state/fault/fault.sock")
}

fn request(pod: &str, id: &str) -> FailContainerRequest {
    FailContainerRequest {
        pod_uid: format!("uid-{pod}"),
        container: "main".into(),
        container_id: id.into(),
        reason: REASON.into(),
        message: MESSAGE.into(),
        only_announce: false,
        hold_seconds: 0,
    }
}

async fn fail(w: &World, pod: &str, id: &str) -> Result<FailContainerResponse, Status> {
    w.fail(request(pod, id)).await
}

/// A container that is created; its pod's id and its own.
async fn created(w: &World, name: &str, command: &[&str]) -> (String, String) {
    let pod = w.run_pod(w.pod_config(name, true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", command)).await.unwrap();
    (pod, id)
}

async fn running(w: &World, name: &str, command: &[&str]) -> (String, String) {
    let (pod, id) = created(w, name, command).await;
    w.start(&id).await.unwrap();
    (pod, id)
}

/// The processes of a container, by its cgroup.
fn processes(w: &World, name: &str, id: &str) -> Vec<u32> {
    let group = format!("{}/{name}/{id}", w.cgroup());
    let v1 = format!("/sys/fs/cgroup/pids{group}/cgroup.procs");
    let v2 = format!("/sys/fs/cgroup{group}/cgroup.procs");
    let text = std::fs::read_to_string(v1).or_else(|_| std::fs::read_to_string(v2));
    let text = text.unwrap_or_default();
    text.lines().filter_map(|pid| pid.parse().ok()).collect()
}

async fn until(what: &str, w: &World, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}\n{}", w.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// That it has ended by the fault, as kubelet sees it.
async fn assert_failed(w: &World, id: &str) {
    let status = w.wait_exit(id).await;
    let told = (status.exit_code, status.reason.as_str(), status.message.as_str());
    assert_eq!(told, (137, REASON, MESSAGE), "{}", w.log());
}

#[tokio::test]
async fn a_container_is_ended_with_all_its_processes_and_its_status_says_why() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    // Nothing in it can be asked to end.
    let script = "trap '' TERM INT HUP; setsid sleep 1000 & setsid sleep 1000 & while true; do sleep 1; done";
    let (pod, id) = running(&w, "all", &["sh", "-c", script]).await;
    until("it has all its processes", &w, async || {
        processes(&w, "all", &id).len() >= 3
    })
    .await;
    let exec = {
        let (runtime, id) = (w.runtime.clone(), id.clone());
        tokio::spawn(async move {
            let request = v1::ExecSyncRequest {
                container_id: id,
                cmd: vec!["sleep".into(), "1000".into()],
                timeout: 60,
            };
            runtime.clone().exec_sync(request).await
        })
    };
    until("the exec runs", &w, async || processes(&w, "all", &id).len() >= 5).await;
    let before = w.status(&id).await.unwrap();
    let began = Instant::now();
    let answer = fail(&w, "all", &id).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(answer.outcome(), Outcome::Failed);
    assert_eq!((answer.exit_code, answer.reason.as_str()), (137, REASON));
    assert_failed(&w, &id).await;
    assert_eq!(processes(&w, "all", &id), Vec::<u32>::new());
    let after = w.status(&id).await.unwrap();
    assert_eq!(after.started_at, before.started_at);
    assert!(after.finished_at > before.started_at && after.finished_at == answer.finished_at);
    // How the exec ended is its own matter; that it has is what counts.
    let _ = exec.await.unwrap();

    // Asked for again, for another reason: the first one stays.
    let mut again = request("all", &id);
    again.reason = "GpuLost".into();
    let answer = w.fail(again).await.unwrap();
    assert_eq!(
        (answer.outcome(), answer.reason.as_str()),
        (Outcome::Failed, REASON)
    );
    w.kill9();
    w.restart(&[]).await;
    assert_failed(&w, &id).await;

    // The next attempt of the same container is another container.
    let next = w.create(&pod, {
        let mut config = w.container_config("main", SLEEP);
        config.metadata.as_mut().unwrap().attempt = 1;
        config
    });
    let next = next.await.unwrap();
    w.start(&next).await.unwrap();
    w.remove(&id).await.unwrap();
    assert_eq!(fail(&w, "all", &id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(w.status(&next).await.unwrap().state, RUNNING);
    w.remove(&next).await.unwrap();
    w.terminate();
    let store = w.store();
    for kind in ["container", "container-state"] {
        assert_eq!(store.records().list(kind).unwrap().len(), 0, "{kind}");
    }
    drop(store);
    w.restart(&[]).await;
    w.finish().await;
}

#[tokio::test]
async fn what_had_ended_or_is_another_is_left_as_it_is() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let (_, ended) = running(&w, "ended", &["sh", "-c", "exit 3"]).await;
    let before = w.wait_exit(&ended).await;
    let answer = fail(&w, "ended", &ended).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::AlreadyExited);
    assert_eq!((answer.exit_code, answer.reason.as_str()), (3, "Error"));
    assert_eq!(w.status(&ended).await.unwrap(), before);

    let (_, id) = running(&w, "kept", SLEEP).await;
    type Harm<'a> = &'a dyn Fn(&mut FailContainerRequest);
    let harms: [(&str, Harm<'_>, Code); 7] = [
        ("another pod", &|r| r.pod_uid = "uid-ended".into(), Code::NotFound),
        ("another name", &|r| r.container = "side".into(), Code::NotFound),
        ("no such id", &|r| r.container_id = "f".repeat(64), Code::NotFound),
        ("a beginning", &|r| r.container_id.truncate(13), Code::NotFound),
        ("reason", &|r| r.reason = "no word".into(), Code::InvalidArgument),
        (
            "message",
            &|r| r.message = "x".repeat(1025),
            Code::InvalidArgument,
        ),
        ("container_id", &|r| r.container_id.clear(), Code::InvalidArgument),
    ];
    for (what, harm, code) in harms {
        let mut bad = request("kept", &id);
        harm(&mut bad);
        let error = w.fail(bad).await.unwrap_err();
        assert_eq!(error.code(), code, "{what}: {error}");
        if code == Code::InvalidArgument {
            assert!(error.message().starts_with(what), "{error}");
        }
    }
    assert_eq!(w.status(&id).await.unwrap().state, RUNNING);
    w.finish().await;
}

#[tokio::test]
async fn what_ends_while_its_output_is_held_has_ended_before_a_fault() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    for only_announce in [true, false] {
        let name = format!("ends-{only_announce}");
        let script = "while [ ! -e /go ]; do sleep 0.02; done; exit 3";
        let (_, id) = running(&w, &name, &["sh", "-c", script]).await;
        let pid = w.container_pid(&id).await;
        // For a second the shim waits for this to be closed before it tells of the end.
        let held = std::fs::File::options()
            .write(true)
            .open(format!("/proc/{pid}/fd/1"))
            .unwrap();
        w.exec(&id, &["touch", "/go"], 10).await.unwrap();
        until("its program does not end", &w, async || {
            !Path::new(&format!("/proc/{pid}")).exists()
        })
        .await;
        assert_eq!(w.status(&id).await.unwrap().state, RUNNING, "not told yet");
        let mut asked = request(&name, &id);
        asked.only_announce = only_announce;
        let outcome = w.fail(asked).await.unwrap().outcome();
        if !only_announce {
            assert_eq!(outcome, Outcome::AlreadyExited);
        }
        let status = w.wait_exit(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
        drop(held);
    }
    w.finish().await;
}

#[tokio::test]
async fn a_crash_between_the_reason_and_the_kill_is_made_good_by_the_next_start() {
    if cannot_run() {
        return;
    }
    for (point, alive) in [("after_record", true), ("after_kill", false)] {
        let points = format!("fail_container.{point}=kill");
        let mut w = World::new(&[("SLIPWAY_FAILPOINTS", &points)]).await;
        let (_, id) = running(&w, "crash", SLEEP).await;
        fail(&w, "crash", &id).await.unwrap_err();
        w.wait_end().await;
        assert_eq!(!processes(&w, "crash", &id).is_empty(), alive, "{point}");
        w.restart(&[]).await;
        assert_failed(&w, &id).await;
        w.finish().await;
    }
    // The shim dies with slipwayd: whoever buries it tells the reason all the same.
    let mut w = World::new(&[("SLIPWAY_FAILPOINTS", "fail_container.after_record=kill")]).await;
    let (_, id) = running(&w, "shim", SLEEP).await;
    fail(&w, "shim", &id).await.unwrap_err();
    w.wait_end().await;
    w.kill_shims();
    w.restart(&[]).await;
    assert_failed(&w, &id).await;
    w.finish().await;
    // A request that fails after the record is finished without another one.
    let w = World::new(&[("SLIPWAY_FAILPOINTS", "fail_container.after_record=error*1")]).await;
    let (_, id) = running(&w, "error", SLEEP).await;
    assert_eq!(fail(&w, "error", &id).await.unwrap_err().code(), Code::Internal);
    assert_failed(&w, &id).await;
    w.finish().await;
}

#[tokio::test]
async fn one_that_is_not_started_yet_never_is() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[("SLIPWAY_FAILPOINTS", "start_container.before_start=sleep:800*2")]).await;
    // A start is in progress: what comes of it is killed.
    let (_, id) = created(&w, "starting", SLEEP).await;
    let start = async {
        w.start(&id).await.unwrap();
    };
    let failed = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let answer = fail(&w, "starting", &id).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Failed);
    };
    tokio::join!(start, failed);
    assert_failed(&w, &id).await;

    // Also where its fault is only announced.
    let (_, id) = created(&w, "announced", SLEEP).await;
    let start = async {
        let error = w.start(&id).await.unwrap_err();
        assert!(error.message().contains(MESSAGE), "{error}");
    };
    let announced = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut asked = request("announced", &id);
        asked.only_announce = true;
        let answer = w.fail(asked).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Announced);
    };
    tokio::join!(start, announced);
    assert_failed(&w, &id).await;

    let (_, id) = created(&w, "created", SLEEP).await;
    let answer = fail(&w, "created", &id).await.unwrap();
    assert_eq!(
        (answer.outcome(), answer.reason.as_str()),
        (Outcome::Failed, REASON)
    );
    let status = w.status(&id).await.unwrap();
    assert_eq!((status.state, status.reason.as_str()), (EXITED, REASON));
    let error = w.start(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains(MESSAGE), "{error}");
    w.finish().await;
}

#[tokio::test]
async fn an_announced_fault_is_how_the_container_ends_when_it_is_stopped_or_failed() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let announce = |pod: &str, id: &str| FailContainerRequest {
        only_announce: true,
        ..request(pod, id)
    };
    // One that ends well when it is asked to: it is not asked.
    let script = &["sh", "-c", "trap 'exit 0' TERM; while true; do sleep 0.1; done"];
    let (_, stopped) = running(&w, "stopped", script).await;
    let (_, failed) = running(&w, "failed", script).await;
    let (_, created) = created(&w, "created", script).await;
    for (pod, id) in [("stopped", &stopped), ("failed", &failed), ("created", &created)] {
        for _ in 0..2 {
            let answer = w.fail(announce(pod, id)).await.unwrap();
            assert_eq!(
                (answer.outcome(), answer.reason.as_str()),
                (Outcome::Announced, "")
            );
        }
    }
    assert_eq!(
        w.start(&created).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    w.kill9();
    w.restart(&[]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(w.status(&stopped).await.unwrap().state, RUNNING);
    w.stop(&stopped, 60).await.unwrap();
    assert_failed(&w, &stopped).await;
    let mut other = request("failed", &failed);
    other.message = "later".into();
    let answer = w.fail(other).await.unwrap();
    assert_eq!(
        (answer.outcome(), answer.message.as_str()),
        (Outcome::Failed, MESSAGE)
    );
    assert_failed(&w, &failed).await;
    let answer = w.fail(announce("failed", &failed)).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Failed);
    w.finish().await;
}

#[tokio::test]
async fn a_held_name_has_no_successor_for_a_while() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let next = |w: &World, name: &str| {
        let mut config = w.container_config(name, SLEEP);
        config.metadata.as_mut().unwrap().attempt = 1;
        config
    };
    let (pod, id) = running(&w, "held", SLEEP).await;
    let held = |seconds| FailContainerRequest {
        hold_seconds: seconds,
        ..request("held", &id)
    };
    w.fail(held(2)).await.unwrap();
    w.kill9();
    w.restart(&[]).await;
    let error = w.create(&pod, next(&w, "main")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(
        error.message().contains(REASON) && error.message().contains(&id),
        "{error}"
    );
    // Nobody else is held back.
    w.create(&pod, next(&w, "side")).await.unwrap();
    until("it may be created again", &w, async || {
        w.create(&pod, next(&w, "main")).await.is_ok()
    })
    .await;
    // Longer, from now on; but not longer than there is the container.
    w.fail(held(600)).await.unwrap();
    let third = || {
        let mut config = next(&w, "main");
        config.metadata.as_mut().unwrap().attempt = 2;
        config
    };
    assert_eq!(
        w.create(&pod, third()).await.unwrap_err().code(),
        Code::Unavailable
    );
    w.remove(&id).await.unwrap();
    w.create(&pod, third()).await.unwrap();
    w.finish().await;
}

#[tokio::test]
async fn a_frozen_container_is_ended_too() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let (_, id) = running(&w, "frozen", SLEEP).await;
    let group = format!("{}/frozen/{id}", w.cgroup());
    let v1 = PathBuf::from(format!("/sys/fs/cgroup/freezer{group}/freezer.state"));
    if v1.exists() {
        std::fs::write(v1, "FROZEN").unwrap();
    } else {
        std::fs::write(format!("/sys/fs/cgroup{group}/cgroup.freeze"), "1").unwrap();
    }
    let answer = fail(&w, "frozen", &id).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Failed);
    assert_failed(&w, &id).await;
    w.finish().await;
}

#[tokio::test]
async fn a_full_disk_keeps_no_container_from_being_failed() {
    if cannot_run() {
        return;
    }
    let mut w = World::with(&[], Some("40m")).await;
    let (_, id) = running(&w, "full", SLEEP).await;
    let fill = &["sh", "-c", "cat /dev/zero > /fill; true"];
    let _ = w.exec(&id, fill, 30).await.unwrap();
    let filler = w.path().join("root/filler");
    let mut n = 0;
    while std::fs::write(filler.with_extension(n.to_string()), [0u8; 4096]).is_ok() {
        n += 1;
    }
    let answer = w.fail(request("full", &id)).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Failed);
    w.kill9();
    w.restart(&[]).await;
    assert_failed(&w, &id).await;
    w.finish().await;
}

/// Asks as nobody, from a thread that has become it.
fn as_nobody(socket: &Path, request: FailContainerRequest) -> Result<FailContainerResponse, Status> {
    let socket = socket.to_owned();
    let thread = std::thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65_534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(ask_to_fail(socket, request))
    });
    thread.join().unwrap()
}

#[tokio::test]
async fn nobody_but_root_is_listened_to_and_nothing_large() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let (_, id) = running(&w, "hostile", SLEEP).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let socket = socket(&w);
    assert_eq!(mode(&socket), 0o600);
    assert_eq!(mode(socket.parent().unwrap()), 0o700);
    let open = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for above in socket
        .ancestors()
        .skip(1)
        .take_while(|dir| *dir != Path::new("/var/tmp"))
    {
        open(above, 0o755);
    }
    let error = as_nobody(&socket, request("hostile", &id)).unwrap_err();
    assert!(error.message().contains("PermissionDenied"), "{error}");
    // Also where somebody has opened the socket to everyone.
    open(&socket, 0o666);
    let error = as_nobody(&socket, request("hostile", &id)).unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error}");
    assert!(error.message().contains("root"), "{error}");
    let mut huge = request("hostile", &id);
    huge.message = "x".repeat(8 << 20);
    let error = w.fail(huge).await.unwrap_err();
    assert!(
        matches!(error.code(), Code::OutOfRange | Code::ResourceExhausted),
        "{error}"
    );
    assert_eq!(w.status(&id).await.unwrap().state, RUNNING);
    fail(&w, "hostile", &id).await.unwrap();
    assert_failed(&w, &id).await;
    w.finish().await;
}
