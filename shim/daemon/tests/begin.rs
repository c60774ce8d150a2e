//! A creation that is only begun by Create: who hears how it ends, whatever comes meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use slipway_shim_client::{Code, Error, pod};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::{TestPod, cgroups_of, until};

/// Which worker a pod's containers are made by.
enum Worker {
    Real,
    /// The real one, once a file is there.
    Held,
    /// The real one, whose end of the report socket stays open for longer than it lives.
    Lingering,
    /// A script.
    Fake(&'static str),
}

struct Pod {
    pod: TestPod,
    dir: tempfile::TempDir,
}

impl std::ops::Deref for Pod {
    type Target = TestPod;
    fn deref(&self) -> &TestPod {
        &self.pod
    }
}

impl Pod {
    fn let_go(&self) {
        std::fs::write(self.dir.path().join("go"), "").unwrap();
    }

    fn is_at_work(&self) -> bool {
        self.dir.path().join("at-work").exists()
    }

    /// Nothing but the shim's memory of a container.
    fn assert_taken_back(&self, id: &str) {
        assert_eq!(
            cgroups_of(&format!("{}/{id}", self.cgroup)),
            Vec::<PathBuf>::new()
        );
        assert!(!self.path(&format!("bundle-{id}/state")).exists());
    }

    /// What the shim has told of exits.
    async fn exits(&self) -> Vec<pod::Exit> {
        let events = self.shim.events(0, Duration::ZERO).await.unwrap();
        let exit = |event: pod::Event| match event.what {
            Some(pod::event::What::Exit(exit)) => Some(exit),
            _ => None,
        };
        events.into_iter().filter_map(exit).collect()
    }
}

/// A pod with such a worker. `None`: skipped.
async fn pod(worker: Worker) -> Option<Pod> {
    if !support::is_root() {
        return None;
    }
    let real = support::worker()?;
    let dir = tempfile::tempdir().unwrap();
    let script = match worker {
        Worker::Real => {
            return Some(Pod {
                pod: made(real).await,
                dir,
            });
        }
        Worker::Held => format!(
            "touch {0}/at-work; while [ ! -e {0}/go ]; do /bin/busybox usleep 10000; done; exec {1} \"$@\"",
            dir.path().display(),
            real.display()
        ),
        Worker::Lingering => format!("/bin/busybox sleep 100 & exec {} \"$@\"", real.display()),
        Worker::Fake(script) => script.replace("DIR", dir.path().to_str().unwrap()),
    };
    let worker = support::fake_worker(dir.path(), &script);
    Some(Pod {
        pod: made(worker).await,
        dir,
    })
}

async fn made(worker: PathBuf) -> TestPod {
    let pod = support::pod_with(worker).await;
    pod.create_pod(|_| {}).await;
    pod
}

/// A start on its way.
fn starting(pod: &Pod, id: &str) -> tokio::task::JoinHandle<Result<u32, Error>> {
    let (shim, id) = (pod.shim.clone(), id.to_owned());
    tokio::spawn(async move { shim.start(&id).await })
}

#[tokio::test]
async fn root_a_start_waits_for_a_creation_and_another_is_refused() {
    let Some(pod) = pod(Worker::Held).await else {
        return;
    };
    let created = pod
        .shim
        .begin_create(pod.container("c", "echo hello; exit 3"))
        .await;
    assert_eq!(created.unwrap(), 0, "it is not known yet");
    until("the worker is at work", || pod.is_at_work()).await;
    let state = pod.state("c").await;
    assert_eq!((state.state(), state.pid), (pod::ContainerState::Creating, 0));
    let start = starting(&pod, "c");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = pod.shim.start("c").await.unwrap_err();
    assert!(second.is(Code::FailedPrecondition), "{second}");
    assert!(!start.is_finished());

    // What else comes meanwhile is answered at once, with what is true.
    let stats = pod.shim.stats(vec!["c".into()]).await.unwrap();
    assert_eq!(stats.containers.len(), 1);
    let limit = r#"{"pids":{"limit":77}}"#.to_owned();
    pod.shim.update("c", limit).await.unwrap();
    let request = pod::ExecRequest {
        container_id: "c".into(),
        args: vec!["true".into()],
        ..Default::default()
    };
    let exec = pod.shim.exec(request, vec![]).await.unwrap_err();
    assert!(exec.is(Code::FailedPrecondition), "{exec}");
    let request = pod::AttachRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    let attach = pod.shim.attach(request, vec![]).await.unwrap_err();
    assert!(attach.is(Code::FailedPrecondition), "{attach}");
    let term = pod.shim.kill("c", 15, false).await.unwrap_err();
    assert!(term.is(Code::FailedPrecondition), "{term}");

    let find = |file: &Path| std::fs::read_to_string(file).is_ok_and(|text| text.trim() == "77");
    let cgroups = cgroups_of(&format!("{}/c", pod.cgroup));
    assert!(
        cgroups.iter().any(|dir| find(&dir.join("pids.max"))),
        "{cgroups:?}"
    );
    pod.let_go();
    let pid = start.await.unwrap().unwrap();
    assert!(pid > 0);
    assert_eq!(pod.exit_of("c").await.code, 3);
    assert_eq!(pod.log_lines("c"), ["stdout F hello"]);
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_a_start_finds_a_creation_that_has_ended() {
    let Some(pod) = pod(Worker::Real).await else {
        return;
    };
    pod.shim.begin_create(pod.container("c", "exit 4")).await.unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    let mut state = pod.state("c").await;
    while state.state() != pod::ContainerState::Created {
        assert!(Instant::now() < end, "{state:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
        state = pod.state("c").await;
    }
    assert_eq!(pod.shim.start("c").await.unwrap(), state.pid);
    assert_eq!(pod.exit_of("c").await.code, 4);
    // One that dies before it is started has exited.
    pod.shim.begin_create(pod.container("d", "exit 4")).await.unwrap();
    while pod.state("d").await.state() != pod::ContainerState::Created {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    pod.shim.kill("d", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("d").await.code, 137);
    let late = pod.shim.start("d").await.unwrap_err();
    assert!(late.is(Code::FailedPrecondition), "{late}");
    assert!(pod.exits().await.iter().all(|exit| exit.failure.is_empty()));
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_what_can_be_told_at_once_fails_the_create_and_leaves_nothing() {
    let Some(pod) = pod(Worker::Real).await else {
        return;
    };
    let mut wrong = pod.container("c", "true");
    wrong.bundle = pod.bundle("c", "true", |config| {
        config["linux"]["resources"]["memory"] = serde_json::json!({"limit": -7});
        config["linux"]["resources"]["unified"] = serde_json::json!({"no.such": "1"});
    });
    let error = pod.shim.begin_create(wrong).await.unwrap_err();
    assert!(error.to_string().contains("create container c"), "{error}");
    assert!(pod.shim.info().await.unwrap().containers.is_empty());
    pod.assert_taken_back("c");
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_a_failure_is_kept_for_whoever_starts_it_and_told_as_an_exit() {
    let dies = "(sleep 1000 &) ; while [ ! -e DIR/go ]; do /bin/busybox usleep 10000; done; kill -9 $$";
    let Some(pod) = pod(Worker::Fake(dies)).await else {
        return;
    };
    pod.shim.begin_create(pod.container("c", "true")).await.unwrap();
    let start = starting(&pod, "c");
    tokio::time::sleep(Duration::from_millis(100)).await;
    pod.let_go();
    let error = start.await.unwrap().unwrap_err();
    pod.assert_taken_back("c");
    let text = error.to_string();
    assert!(
        text.contains("create container c") && text.contains("signal 9"),
        "{text}"
    );
    // Whoever asks later is told the same, by whatever way.
    let state = pod.state("c").await;
    assert_eq!(
        (state.state(), state.exit_code, state.failure),
        (pod::ContainerState::Stopped, 128, text.clone())
    );
    assert_eq!(pod.shim.start("c").await.unwrap_err().to_string(), text);
    assert_eq!(pod.exit_of("c").await.code, 128);
    let exits = pod.exits().await;
    assert_eq!(exits.len(), 1);
    assert_eq!((exits[0].exit_code, &exits[0].failure), (128, &text));
    // It goes, and its name is free again.
    assert_eq!(pod.shim.delete("c").await.unwrap().code, 128);
    assert!(pod.shim.info().await.unwrap().containers.is_empty());
    pod.shim.begin_create(pod.container("c", "true")).await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 128, "nobody has to start it");
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_a_program_has_run_whose_worker_is_slower_than_it() {
    let Some(pod) = pod(Worker::Lingering).await else {
        return;
    };
    let created = pod.shim.begin_create(pod.container("c", "exit 3")).await;
    created.unwrap();
    let pid = pod.shim.start("c").await.unwrap();
    assert!(pid > 0);
    let exit = pod.exit_of("c").await;
    assert_eq!(exit.code, 3);
    let state = pod.state("c").await;
    assert!(state.started_at_ns > 0, "{state:?}");
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_a_worker_that_reports_a_failure_is_quoted_by_the_start() {
    let reports = r#"printf '{"error":"mount /x: no such device"}\n' >&3; exit 1"#;
    let Some(pod) = pod(Worker::Fake(reports)).await else {
        return;
    };
    pod.shim.begin_create(pod.container("c", "true")).await.unwrap();
    let error = pod.shim.start("c").await.unwrap_err();
    assert_eq!(error.to_string(), "create container c: mount /x: no such device");
    pod.assert_taken_back("c");
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_a_creation_under_way_ends_when_it_is_killed_deleted_or_its_pod_stopped() {
    let Some(pod) = pod(Worker::Fake("(sleep 1000 &) ; touch DIR/at-work; sleep 1000")).await else {
        return;
    };
    let begin = async |id: &str| {
        pod.shim.begin_create(pod.container(id, "true")).await.unwrap();
        until("the worker is at work", || pod.is_at_work()).await;
        std::fs::remove_file(pod.dir.path().join("at-work")).unwrap();
    };
    let ended = |start: Result<u32, Error>| {
        let error = start.unwrap_err();
        assert!(
            error.is(Code::FailedPrecondition) && error.to_string().contains("signal 9"),
            "{error}"
        );
    };
    begin("killed").await;
    let start = starting(&pod, "killed");
    // One thread: it is on its way when this goes on.
    tokio::task::yield_now().await;
    pod.shim.kill("killed", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("killed").await.code, 137);
    ended(start.await.unwrap());
    assert_eq!(pod.state("killed").await.failure, "", "it has not failed");
    assert_eq!(
        cgroups_of(&format!("{}/killed", pod.cgroup))
            .iter()
            .map(|dir| std::fs::read_to_string(dir.join("cgroup.procs")).unwrap())
            .collect::<String>(),
        ""
    );

    begin("deleted").await;
    let start = starting(&pod, "deleted");
    tokio::task::yield_now().await;
    assert_eq!(pod.shim.delete("deleted").await.unwrap().code, 137);
    ended(start.await.unwrap());
    pod.assert_taken_back("deleted");

    begin("stopped").await;
    let start = starting(&pod, "stopped");
    tokio::task::yield_now().await;
    pod.shim.stop_pod().await.unwrap();
    ended(start.await.unwrap());
    assert_eq!(pod.state("stopped").await.exit_code, 137);
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_a_creation_goes_on_without_its_client_and_a_start_does_not() {
    let Some(mut pod) = pod(Worker::Held).await else {
        return;
    };
    pod.shim.begin_create(pod.container("c", "exit 5")).await.unwrap();
    let other = pod.launcher.connect(pod.pod.dir.path()).await.unwrap();
    let start = starting(&pod, "c");
    until("the worker is at work", || pod.is_at_work()).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    // The connection ends with its last handle.
    start.abort();
    let _ = start.await;
    pod.pod.shim = other;
    tokio::time::sleep(Duration::from_millis(100)).await;
    pod.let_go();
    let end = Instant::now() + Duration::from_secs(10);
    while pod.state("c").await.state() == pod::ContainerState::Creating {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(pod.state("c").await.state(), pod::ContainerState::Created);
    pod.shim.start("c").await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 5);
    pod.pod.finish().await;
}

#[tokio::test]
async fn root_a_shim_that_dies_is_cleaned_up_after_with_what_it_was_at_and_what_had_failed() {
    let script = "if [ -e DIR/failed ]; then touch DIR/at-work; sleep 1000; fi; exit 3";
    let Some(pod) = pod(Worker::Fake(script)).await else {
        return;
    };
    pod.shim
        .begin_create(pod.container("fails", "true"))
        .await
        .unwrap();
    pod.exit_of("fails").await;
    std::fs::write(pod.dir.path().join("failed"), "").unwrap();
    pod.shim
        .begin_create(pod.container("hangs", "true"))
        .await
        .unwrap();
    until("the worker is at work", || pod.is_at_work()).await;
    let start = starting(&pod, "hangs");
    let shim = pod.shim.info().await.unwrap().pid;
    let shim = rustix::process::Pid::from_raw(shim.try_into().unwrap()).unwrap();
    rustix::process::kill_process(shim, rustix::process::Signal::KILL).unwrap();
    assert!(matches!(start.await.unwrap(), Err(Error::Gone)));
    let dead = pod.launcher.cleanup(pod.pod.dir.path(), true).await.unwrap();
    let seen: Vec<_> = dead.iter().map(|d| (d.id.as_str(), d.exit_code)).collect();
    assert_eq!(seen, [("fails", 128), ("hangs", 137)]);
    assert!(dead[0].failure.contains("exit code 3"), "{dead:?}");
    assert_eq!(dead[1].failure, "");
    pod.assert_nothing_left();
}
