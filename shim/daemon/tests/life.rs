//! Containers' lives through a real shim and worker: create, start, log, signal, exit, exec, delete.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use slipway_shim_client::{Code, Exit, Output, Stdin, pod};
use std::time::{Duration, Instant};
use support::{pipe, read_available, until};

#[tokio::test]
async fn root_a_container_is_created_runs_logs_exits_and_is_deleted() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let pid = pod
        .shim
        .create(pod.container("c", "echo out; echo err >&2; printf half; exit 7"))
        .await
        .unwrap();
    let before = pod.state("c").await;
    assert_eq!((before.pid, before.state()), (pid, pod::ContainerState::Created));
    assert_eq!(
        pod.log_lines("c"),
        Vec::<String>::new(),
        "nothing runs before the start"
    );
    pod.shim.start("c").await.unwrap();
    let exit = pod.exit_of("c").await;
    assert_eq!((exit.code, exit.oom_killed), (7, false));
    let mut lines = pod.log_lines("c");
    lines.sort();
    assert_eq!(lines, ["stderr F err", "stdout F out", "stdout P half"]);
    let after = pod.state("c").await;
    assert_eq!(
        (after.exit_code, after.state()),
        (7, pod::ContainerState::Stopped)
    );
    assert!(after.exited_at_ns >= after.started_at_ns && after.started_at_ns >= after.created_at_ns);

    let events = pod.shim.events(0, Duration::from_secs(1)).await.unwrap();
    let [
        pod::Event {
            seq: 1,
            what: Some(pod::event::What::Exit(told)),
            ..
        },
    ] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!(
        (told.exit_code, told.exited_at_ns, told.started_at_ns),
        (7, after.exited_at_ns, after.started_at_ns)
    );
    assert!(
        pod.shim.events(1, Duration::ZERO).await.unwrap().is_empty(),
        "acknowledged"
    );

    assert_eq!(pod.shim.delete("c").await.unwrap(), exit);
    assert!(pod.shim.wait("c").await.unwrap_err().is_not_found());
    pod.finish().await;
}

#[tokio::test]
async fn root_an_end_that_is_told_late_has_its_own_time() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let pid = pod.run("c", "while [ ! -e /go ]; do sleep 0.02; done").await;
    // Somebody outside holds its output.
    let held = std::fs::File::options()
        .write(true)
        .open(format!("/proc/{pid}/fd/1"))
        .unwrap();
    pod.exec("c", "touch /go").await;
    let mut events = Vec::new();
    while events.is_empty() {
        events = pod.shim.events(0, Duration::from_secs(5)).await.unwrap();
    }
    let Some(pod::event::What::Exit(told)) = &events[0].what else {
        panic!("{events:?}")
    };
    let late = events[0].time_ns - told.exited_at_ns;
    assert!(late > 500_000_000, "{late} ns");
    assert!(told.started_at_ns > 0 && told.started_at_ns < told.exited_at_ns);
    drop(held);
    pod.finish().await;
}

#[tokio::test]
async fn root_signals_reach_init_and_are_exit_codes() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("kill", "sleep 1000").await;
    pod.shim.kill("kill", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("kill").await.code, 137);
    assert!(pod.shim.kill("kill", 9, false).await.unwrap_err().is_not_found());

    pod.run(
        "term",
        "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done",
    )
    .await;
    until("the trap is set", || {
        pod.log_lines("term").iter().any(|l| l.ends_with("ready"))
    })
    .await;
    pod.shim.kill("term", 15, false).await.unwrap();
    assert_eq!(pod.exit_of("term").await.code, 3);
    pod.finish().await;
}

#[tokio::test]
async fn root_a_created_container_can_be_deleted_without_a_start() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.shim.create(pod.container("c", "echo no")).await.unwrap();
    let Exit { code, .. } = pod.shim.delete("c").await.unwrap();
    assert_eq!(code, 137);
    assert_eq!(pod.log_lines("c"), Vec::<String>::new());
    pod.finish().await;
}

#[tokio::test]
async fn root_acts_out_of_phase_are_refused_by_name() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let again = pod.shim.create(pod.container("c", "true")).await.unwrap_err();
    assert!(again.is(Code::AlreadyExists), "{again}");
    let start = pod.shim.start("c").await.unwrap_err();
    assert!(
        start.is(Code::FailedPrecondition) && start.to_string().contains("container c"),
        "{start}"
    );
    assert!(
        pod.shim
            .delete("c")
            .await
            .unwrap_err()
            .is(Code::FailedPrecondition)
    );
    assert!(
        pod.shim
            .resume("c")
            .await
            .unwrap_err()
            .is(Code::FailedPrecondition)
    );
    assert!(
        pod.shim
            .kill("nobody", 9, false)
            .await
            .unwrap_err()
            .is_not_found()
    );
    let mut bad = pod.container("../x", "true");
    bad.bundle = "/nonexistent".into();
    assert!(pod.shim.create(bad).await.unwrap_err().is(Code::InvalidArgument));
    assert!(
        pod.shim
            .shutdown()
            .await
            .unwrap_err()
            .is(Code::FailedPrecondition)
    );
    pod.finish().await;
}

#[tokio::test]
async fn root_a_program_that_is_not_there_is_an_error_and_leaves_nothing() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let mut container = pod.container("c", "");
    container.bundle = pod.bundle("c", "", |config| {
        config["process"]["args"] = serde_json::json!(["/bin/nope"])
    });
    let error = match pod.shim.create(container).await {
        Err(error) => error,
        Ok(_) => pod.shim.start("c").await.unwrap_err(),
    };
    assert!(
        error.is_not_found() && error.to_string().contains("/bin/nope"),
        "{error}"
    );
    pod.finish().await;
}

#[tokio::test]
async fn root_a_paused_container_stands_still_and_dies_of_sigkill() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "while :; do echo tick; sleep 0.01; done").await;
    until("it ticks", || pod.log_lines("c").len() > 2).await;
    pod.shim.pause("c").await.unwrap();
    assert_eq!(pod.state("c").await.state(), pod::ContainerState::Paused);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let before = pod.log_lines("c").len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(pod.log_lines("c").len(), before);
    pod.shim.resume("c").await.unwrap();
    until("it ticks again", || pod.log_lines("c").len() > before).await;
    pod.shim.pause("c").await.unwrap();
    pod.shim.kill("c", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 137);
    pod.finish().await;
}

#[tokio::test]
async fn root_an_exec_runs_in_the_container_and_gives_its_code() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let (response, out) = pod.exec("c", "echo $0 $PATH; exit 5").await;
    assert_eq!(
        (response.exit_code, response.timed_out, out.as_str()),
        (5, false, "/bin/sh /bin\n")
    );
    let missing = pod::ExecRequest {
        container_id: "c".into(),
        args: vec!["/bin/nope".into()],
        ..Default::default()
    };
    let error = pod.shim.exec(missing, vec![]).await.unwrap_err();
    assert!(
        error.is_not_found() && error.to_string().contains("/bin/nope"),
        "{error}"
    );
    pod.finish().await;
}

#[tokio::test]
async fn root_an_exec_returns_at_its_exit_although_a_background_child_holds_its_stdout() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let begin = Instant::now();
    let (response, out) = pod.exec("c", "sleep 1000 & echo done").await;
    assert_eq!((response.exit_code, out.as_str()), (0, "done\n"));
    assert!(begin.elapsed() < Duration::from_secs(5));
    pod.finish().await;
}

#[tokio::test]
async fn root_an_exec_that_takes_too_long_is_killed_with_what_it_started() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let request = pod::ExecRequest {
        container_id: "c".into(),
        args: [
            "/bin/sh",
            "-c",
            "sleep 2000 & sleep 3000 & setsid sleep 4000 & wait",
        ]
        .map(str::to_owned)
        .to_vec(),
        timeout_ms: 300,
        ..Default::default()
    };
    let (response, _) = pod.shim.exec(request, vec![]).await.unwrap();
    assert!(response.timed_out);
    assert_eq!(response.exit_code, 137);
    // Zombies, which this container's pid 1 does not reap, have no arguments.
    let (_, out) = pod.exec("c", "sleep 0.1; ps | grep '[s]leep [1-4]000'").await;
    assert_eq!(out.lines().count(), 1, "only init's is left: {out}");
    pod.finish().await;
}

#[tokio::test]
async fn root_an_exec_gets_its_streams_and_can_be_killed_by_its_id() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let ((stdin, feed), (out, stdout), (err, stderr)) = (pipe(), pipe(), pipe());
    rustix::io::write(&feed, b"hello").unwrap();
    drop(feed);
    let request = pod::ExecRequest {
        container_id: "c".into(),
        args: ["/bin/sh", "-c", "cat; echo $EXTRA >&2; pwd >&2"]
            .map(str::to_owned)
            .to_vec(),
        env: vec!["EXTRA=more".into()],
        cwd: "/tmp".into(),
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    let (response, _) = pod.shim.exec(request, vec![stdin, stdout, stderr]).await.unwrap();
    assert_eq!(response.exit_code, 0);
    assert_eq!(
        (read_available(&out), read_available(&err)),
        ("hello".to_owned(), "more\n/tmp\n".to_owned())
    );

    let request = pod::ExecRequest {
        container_id: "c".into(),
        exec_id: "named".into(),
        args: ["/bin/sleep", "1000"].map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let shim = pod.shim.clone();
    let running = tokio::spawn(async move { shim.exec(request, vec![]).await });
    let end = Instant::now() + Duration::from_secs(5);
    while let Err(error) = pod.shim.kill_exec("c", "named", 15).await {
        assert!(error.is_not_found() && Instant::now() < end, "{error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(running.await.unwrap().unwrap().0.exit_code, 143);
    pod.finish().await;
}

/// Starts an exec that starts others, and waits until it has.
fn family(shim: &slipway_shim_client::Shim, out: std::os::fd::OwnedFd) -> tokio::task::JoinHandle<u32> {
    let request = pod::ExecRequest {
        container_id: "c".into(),
        exec_id: "family".into(),
        args: [
            "/bin/sh",
            "-c",
            "sleep 2000 & setsid sleep 4000 & echo begun; wait",
        ]
        .map(str::to_owned)
        .to_vec(),
        stdout: true,
        ..Default::default()
    };
    let shim = shim.clone();
    tokio::spawn(async move {
        shim.exec(request, vec![out])
            .await
            .map_or(0, |(r, _)| r.exit_code)
    })
}

async fn has_begun(out: &std::os::fd::OwnedFd) {
    let end = Instant::now() + Duration::from_secs(5);
    while !read_available(out).contains("begun") {
        assert!(Instant::now() < end, "the exec never began");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What runs of the family: its shell, whose arguments name the others, and those.
async fn sleepers(pod: &support::TestPod) -> usize {
    let (_, out) = pod.exec("c", "ps | grep '[s]leep [24]000'").await;
    out.lines().count()
}

#[tokio::test]
async fn root_an_exec_is_killed_with_what_it_started() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let (out, stdout) = pipe();
    let running = family(&pod.shim, stdout);
    has_begun(&out).await;
    assert_eq!(sleepers(&pod).await, 3);
    pod.shim.kill_exec_tree("c", "family").await.unwrap();
    assert_eq!(running.await.unwrap(), 137);
    assert_eq!(sleepers(&pod).await, 0);
    let error = pod.shim.kill_exec_tree("c", "family").await.unwrap_err();
    assert!(error.is_not_found(), "{error}");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_caller_whose_connection_ends_takes_its_execs_with_it_and_nothing_else() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let other = pod.launcher.connect(pod.dir.path()).await.unwrap();
    let (out, stdout) = pipe();
    let running = family(&other, stdout);
    has_begun(&out).await;
    assert_eq!(sleepers(&pod).await, 3);
    running.abort();
    drop((running.await, other));
    let end = Instant::now() + Duration::from_secs(5);
    while sleepers(&pod).await > 0 {
        assert!(
            Instant::now() < end,
            "the processes of a caller that is gone run on"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let info = pod.shim.info().await.unwrap();
    assert_eq!(info.containers[0].state, pod::ContainerState::Running as i32);
    pod.finish().await;
}

#[tokio::test]
async fn root_a_terminal_of_an_exec_comes_while_it_runs() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let request = pod::ExecRequest {
        container_id: "c".into(),
        args: ["/bin/sh", "-c", "stty size; read line; echo got $line"]
            .map(str::to_owned)
            .to_vec(),
        columns: 123,
        rows: 45,
        ..Default::default()
    };
    let (master, done) = pod.shim.exec_terminal(request).await.unwrap();
    rustix::io::write(&master, b"hi\n").unwrap();
    let response = tokio::time::timeout(Duration::from_secs(5), done)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(response.exit_code, 0);
    let said = read_available(&master);
    assert!(said.contains("45 123") && said.contains("got hi"), "{said}");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_terminal_of_a_container_is_logged_as_stdout_and_can_be_attached() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let mut container = pod.container("c", "");
    container.bundle = pod.bundle("c", "read line; echo got $line; stty size", |config| {
        config["process"]["terminal"] = true.into();
    });
    container.terminal = true;
    container.stdin = Stdin::Keep;
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    pod.shim.resize("c", 100, 40).await.unwrap();
    let ((stdin, feed), (out, stdout)) = (pipe(), pipe());
    let request = pod::AttachRequest {
        container_id: "c".into(),
        stdin: true,
        stdout: true,
        stderr: false,
    };
    assert!(
        pod.shim.attach(request, vec![stdin, stdout]).await.unwrap(),
        "it has a terminal"
    );
    rustix::io::write(&feed, b"hi\n").unwrap();
    assert_eq!(pod.exit_of("c").await.code, 0);
    let lines = pod.log_lines("c");
    assert!(
        lines.contains(&"stdout F got hi".to_owned()) && lines.contains(&"stdout F 40 100".to_owned()),
        "{lines:?}"
    );
    assert!(read_available(&out).contains("got hi"));
    pod.finish().await;
}

#[tokio::test]
async fn root_a_kept_stdin_is_fed_by_attach_and_ends_with_it() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let mut container = pod.container("c", "cat; echo end");
    container.stdin = Stdin::KeepOnce;
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    let ((stdin, feed), (out, stdout)) = (pipe(), pipe());
    let request = pod::AttachRequest {
        container_id: "c".into(),
        stdin: true,
        stdout: true,
        stderr: false,
    };
    assert!(!pod.shim.attach(request, vec![stdin, stdout]).await.unwrap());
    rustix::io::write(&feed, b"through\n").unwrap();
    drop(feed);
    assert_eq!(pod.exit_of("c").await.code, 0);
    assert_eq!(pod.log_lines("c"), ["stdout F through", "stdout F end"]);
    assert_eq!(read_available(&out), "through\nend\n");
    pod.finish().await;
}

#[tokio::test]
async fn root_output_can_go_straight_into_descriptors() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let ((out, stdout), (err, stderr)) = (pipe(), pipe());
    let mut container = pod.container("c", "echo out; echo err >&2");
    container.stdout = Output::Pipes { stdout, stderr };
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 0);
    assert_eq!(
        (read_available(&out), read_available(&err)),
        ("out\n".to_owned(), "err\n".to_owned())
    );
    pod.finish().await;
}

#[tokio::test]
async fn root_limits_are_updated_and_stats_tell_of_use() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "while :; do :; done").await;
    pod.shim
        .update("c", r#"{"memory":{"limit":67108864},"pids":{"limit":50}}"#.into())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let stats = pod.shim.stats(vec!["c".into()]).await.unwrap();
    let c = &stats.containers[0];
    assert_eq!((c.memory_limit, c.pids_limit), (67_108_864, 50));
    assert!(c.cpu_usage_ns > 0 && c.memory_usage > 0 && c.processes >= 1);
    assert!(stats.pod.is_some());
    let bad = pod.shim.update("c", "nonsense".into()).await.unwrap_err();
    assert!(bad.is(Code::InvalidArgument), "{bad}");
    assert_eq!(pod.shim.pids("c").await.unwrap().len(), 1);
    pod.finish().await;
}

#[tokio::test]
async fn root_a_container_out_of_memory_says_so() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let mut container = pod.container("c", "");
    container.bundle = pod.bundle(
        "c",
        "x=$(yes | tr -d '\\n' | head -c 200000000); echo $x | head -c 1",
        |config| {
            config["linux"]["resources"]["memory"] = serde_json::json!({"limit": 33554432, "swap": 33554432});
        },
    );
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    let exit = pod.exit_of("c").await;
    assert!(exit.oom_killed, "{exit:?}");
    let events = pod.shim.events(0, Duration::from_secs(1)).await.unwrap();
    assert!(
        events
            .iter()
            .any(|e| matches!(e.what, Some(pod::event::What::Oom(_)))),
        "{events:?}"
    );
    pod.finish().await;
}
