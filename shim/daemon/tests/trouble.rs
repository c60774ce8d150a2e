//! What goes wrong: dead shims, dead and hanging workers, slow readers, floods of output, lost clients.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use slipway_shim_client::{Code, DeadContainer, Error, pod};
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use support::{TestPod, cgroups_of, fake_worker, pipe, until};

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
            failure: String::new(),
        },
        DeadContainer {
            id: "ended".into(),
            exit_code: 4,
            oom_killed: false,
            at_ns: 0,
            failure: String::new(),
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
    assert_eq!(again, dead, "a second clean-up says the same");
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
    // The worker has 30 s.
    assert!(
        begin.elapsed() < Duration::from_secs(5),
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
        let _ = writeln!(std::io::stderr(), "SKIPPED: takes 30 s; set SLIPWAY_SLOW_TESTS");
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
async fn root_attached_streams_that_nobody_reads_or_writes_are_bounded() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let shim = pod.shim.info().await.unwrap().pid;
    let mut container = pod.container(
        "c",
        "while [ ! -e /tmp/go ]; do sleep 0.02; done; yes 0123456789 | head -c 11000000; echo >/tmp/done; sleep 1000",
    );
    container.stdin = slipway_shim_client::Stdin::Keep;
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    let before = support::private_kib(shim);
    let (mut ours, mut refused) = (Vec::new(), 0);
    for _ in 0..200 {
        let ((stdin, feed), (out, stdout)) = (pipe(), pipe());
        // More than the container's pipe takes: the rest waits on this side, not in the shim.
        rustix::io::ioctl_fionbio(&feed, true).unwrap();
        while rustix::io::write(&feed, &[b'x'; 4096]).is_ok() {}
        let request = pod::AttachRequest {
            container_id: "c".into(),
            stdin: true,
            stdout: true,
            stderr: false,
        };
        match pod.shim.attach(request, vec![stdin, stdout]).await {
            Ok(_) => ours.push((feed, out)),
            Err(error) => {
                assert!(error.is(Code::ResourceExhausted), "{error}");
                refused += 1;
            }
        }
    }
    assert!(ours.len() >= 20 && refused >= 100, "{} attached", ours.len());
    std::fs::write(pod.path("bundle-c/rootfs/tmp/go"), "").unwrap();
    let done = pod.path("bundle-c/rootfs/tmp/done");
    until("the container is not held up", || done.exists()).await;
    let used = support::private_kib(shim).saturating_sub(before);
    assert!(used < 6 * 1024, "the shim keeps {used} KiB for its clients");
    // Those that go away make room for others.
    ours.clear();
    let ((stdin, _feed), (_out, stdout)) = (pipe(), pipe());
    let request = pod::AttachRequest {
        container_id: "c".into(),
        stdin: true,
        stdout: true,
        stderr: false,
    };
    pod.shim.attach(request, vec![stdin, stdout]).await.unwrap();
    pod.finish().await;
}

/// A write lease: whoever opens the file waits until it is given back, or for 45 seconds.
struct Lease {
    _file: std::fs::File,
}

impl Lease {
    fn take(path: &std::path::Path) -> Lease {
        use std::os::fd::AsRawFd;
        // A break of it is announced by a signal.
        slipway_sys::process::ignore_signal(libc::SIGIO).unwrap();
        let file = std::fs::File::open(path).unwrap();
        // SAFETY: fcntl with numbers touches no memory.
        let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        Lease { _file: file }
    }
}

/// Whether a file is only reached through a mount that nobody can write through.
fn is_read_only(file: &std::fs::File) -> bool {
    let flags = rustix::fs::fstatvfs(file).unwrap().f_flag;
    flags.contains(rustix::fs::StatVfsMountFlags::RDONLY)
}

#[tokio::test]
async fn root_an_exec_whose_program_does_not_answer_holds_nothing_up() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done")
        .await;
    pod.run("ends", "while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 6")
        .await;
    let slow = pod.path("bundle-c/rootfs/bin/busybox-slow");
    std::fs::copy("/bin/busybox", &slow).unwrap();
    let lease = Lease::take(&slow);
    let request = |timeout_ms| pod::ExecRequest {
        container_id: "c".into(),
        args: ["/bin/busybox-slow", "sh", "-c", "exit 4"]
            .map(str::to_owned)
            .to_vec(),
        timeout_ms,
        ..Default::default()
    };
    let (shim, slow_one) = (pod.shim.clone(), request(0));
    let slow_one = tokio::spawn(async move { shim.exec(slow_one, vec![]).await });
    tokio::time::sleep(Duration::from_millis(200)).await;

    let began = Instant::now();
    let (response, out) = pod.exec("c", "echo quick").await;
    assert_eq!((response.exit_code, out.as_str()), (0, "quick\n"));
    let lines = pod.log_lines("c").len();
    until("the log goes on", || pod.log_lines("c").len() > lines + 3).await;
    std::fs::write(pod.path("bundle-ends/rootfs/tmp/go"), "").unwrap();
    assert_eq!(pod.exit_of("ends").await.code, 6);
    let (response, _) = pod.shim.exec(request(300), vec![]).await.unwrap();
    assert!(response.timed_out, "its own time is over");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(!slow_one.is_finished());

    // CVE-2019-5736: what it is until then is nothing that anybody could write to.
    let pids = pod.shim.pids("c").await.unwrap();
    let exes = pids.iter().filter_map(|pid| {
        let exe = std::fs::File::open(format!("/proc/{pid}/exe")).ok()?;
        let name = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&name)
            .contains("containerd-shim")
            .then_some(exe)
    });
    let exes: Vec<_> = exes.collect();
    assert!(!exes.is_empty() && exes.iter().all(is_read_only), "{exes:?}");

    drop(lease);
    let (response, _) = slow_one.await.unwrap().unwrap();
    assert_eq!(response.exit_code, 4, "it has not failed, it was slow");
    pod.finish().await;
}

#[tokio::test]
async fn root_an_exec_on_its_way_dies_with_its_container_and_is_answered() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let slow = pod.path("bundle-c/rootfs/bin/busybox-slow");
    std::fs::copy("/bin/busybox", &slow).unwrap();
    let _lease = Lease::take(&slow);
    let request = pod::ExecRequest {
        container_id: "c".into(),
        args: vec!["/bin/busybox-slow".to_owned()],
        ..Default::default()
    };
    let shim = pod.shim.clone();
    let slow_one = tokio::spawn(async move { shim.exec(request, vec![]).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    pod.shim.kill("c", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 137);
    let (response, _) = tokio::time::timeout(Duration::from_secs(5), slow_one)
        .await
        .expect("answered")
        .unwrap()
        .unwrap();
    assert_eq!(response.exit_code, 137);
    pod.finish().await;
}

#[tokio::test]
async fn root_an_exec_with_a_name_without_end_is_refused_in_few_words() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let request = pod::ExecRequest {
        container_id: "c".into(),
        args: vec!["\u{1}".repeat(1 << 20)],
        ..Default::default()
    };
    let error = pod.shim.exec(request, vec![]).await.unwrap_err();
    let text = error.to_string();
    assert!(text.len() < 64 * 1024, "{} bytes", text.len());
    assert!(text.contains("container c"), "{}", &text[text.len() - 200..]);
    pod.shim
        .info()
        .await
        .expect("the connection is as good as before");
    pod.finish().await;
}

#[tokio::test]
async fn root_cve_2019_5736_an_init_that_waits_is_executed_from_what_nobody_can_write() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    let pid = pod.shim.create(pod.container("c", "true")).await.unwrap();
    let exe = std::fs::File::open(format!("/proc/{pid}/exe")).unwrap();
    let shim = pod.shim.info().await.unwrap().pid;
    let own = std::fs::File::open(format!("/proc/{shim}/exe")).unwrap();
    assert!(is_read_only(&exe), "the worker's");
    assert!(is_read_only(&own), "the shim's");
    pod.shim.delete("c").await.unwrap();
    pod.finish().await;
    // What was held goes on being of no use when nothing of it runs any more.
    use std::os::fd::AsRawFd;
    let again = format!("/proc/self/fd/{}", exe.as_raw_fd());
    let error = std::fs::OpenOptions::new().append(true).open(again).unwrap_err();
    // Text file busy: another test runs it just now.
    assert!(
        matches!(error.raw_os_error(), Some(libc::EROFS | libc::ETXTBSY)),
        "{error}"
    );
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

/// One call after the other as containerd makes them, and answers as they come.
struct Raw {
    socket: std::os::unix::net::UnixStream,
    stream: u32,
}

impl Raw {
    fn connect(pod: &TestPod) -> Raw {
        let socket = std::os::unix::net::UnixStream::connect(pod.path("shim.sock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Raw { socket, stream: 1 }
    }

    fn send(&mut self, method: &str, message: &impl prost::Message) -> u32 {
        use slipway_shim_api::{frame, names, ttrpc};
        let request = ttrpc::Request {
            service: names::TASK.into(),
            method: method.into(),
            payload: message.encode_to_vec(),
            ..Default::default()
        };
        let stream = self.stream;
        self.stream += 2;
        let bytes = frame::encode(stream, frame::Kind::Request, &request).unwrap();
        std::io::Write::write_all(&mut self.socket, &bytes).unwrap();
        stream
    }

    /// The next answer: whose, its code, its text.
    fn hear(&mut self) -> (u32, i32, String) {
        use prost::Message;
        use slipway_shim_api::{frame, ttrpc};
        let mut header = [0; frame::HEADER];
        std::io::Read::read_exact(&mut self.socket, &mut header).unwrap();
        let header = frame::Header::decode(&header).unwrap();
        let mut data = vec![0; header.length as usize];
        std::io::Read::read_exact(&mut self.socket, &mut data).unwrap();
        let response = ttrpc::Response::decode(data.as_slice()).unwrap();
        let status = response.status.unwrap_or_default();
        (header.stream, status.code, status.message)
    }
}

#[tokio::test]
async fn root_who_waits_for_an_exec_that_never_starts_is_answered() {
    use slipway_shim_api::{Any, task};
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let mut raw = Raw::connect(&pod);
    let add = |raw: &mut Raw, exec: &str| {
        let request = task::ExecProcessRequest {
            id: "c".into(),
            exec_id: exec.into(),
            spec: Some(Any {
                type_url: String::new(),
                value: br#"{"args":["/bin/true"],"cwd":"/"}"#.to_vec(),
            }),
            ..Default::default()
        };
        let call = raw.send("Exec", &request);
        assert_eq!(raw.hear(), (call, 0, String::new()));
        let request = task::WaitRequest {
            id: "c".into(),
            exec_id: exec.into(),
        };
        raw.send("Wait", &request)
    };
    let waiting = add(&mut raw, "deleted");
    let request = task::DeleteRequest {
        id: "c".into(),
        exec_id: "deleted".into(),
    };
    let deleting = raw.send("Delete", &request);
    let mut answers = [raw.hear(), raw.hear()];
    answers.sort();
    let (call, code, text) = &answers[0];
    assert_eq!((*call, *code), (waiting, Code::NotFound as i32), "{text}");
    assert!(text.contains("deleted"), "{text}");
    assert_eq!(answers[1], (deleting, 0, String::new()));
    // And when its container goes.
    let waiting = add(&mut raw, "forgotten");
    pod.finish().await;
    let (call, code, text) = raw.hear();
    assert_eq!((call, code), (waiting, Code::NotFound as i32), "{text}");
}

/// A pipe in the place of a file that is written when limits change: who writes there waits for somebody who reads.
struct Slow {
    file: PathBuf,
    pipe: PathBuf,
}

impl Slow {
    fn put(pod: &TestPod, cgroup: &str, name: &str) -> Slow {
        let file = cgroups_of(cgroup)
            .into_iter()
            .map(|dir| dir.join(name))
            .find(|file| file.exists())
            .unwrap_or_else(|| panic!("no {name}"));
        let pipe = pod.path("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        rustix::mount::mount_bind(&pipe, &file).unwrap();
        Slow { file, pipe }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = slipway_sys::mount::unmount(&self.file, true);
    }
}

#[tokio::test]
async fn root_limits_that_take_the_kernel_long_hold_nothing_up() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|_| {}).await;
    pod.run("c", "sleep 1000").await;
    let slow = Slow::put(&pod, &format!("{}/c", pod.cgroup), "pids.max");
    let limits = r#"{"pids":{"limit":50}}"#;
    let other = pod.launcher.connect(pod.dir.path()).await.unwrap();
    let updating = tokio::spawn(async move { other.update("c", limits.into()).await });
    let shim = pod.shim.info().await.unwrap().pid;
    let children = || {
        let list = std::fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
        list.split_whitespace().count()
    };
    until("it is begun", || children() == 2).await;
    // Everything else goes on meanwhile.
    let began = Instant::now();
    let request = pod::ExecRequest {
        container_id: "c".into(),
        args: ["/bin/true".to_owned()].into(),
        ..Default::default()
    };
    let (response, _) = pod.shim.exec(request, vec![]).await.unwrap();
    assert_eq!(response.exit_code, 0);
    let second = pod.shim.update("c", limits.into()).await.unwrap_err();
    assert!(second.is(Code::FailedPrecondition), "{second}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(!updating.is_finished());
    let pipe = slow.pipe.clone();
    let read = tokio::task::spawn_blocking(move || std::fs::read_to_string(pipe).unwrap());
    assert_eq!(read.await.unwrap(), "50");
    updating.await.unwrap().unwrap();

    // The container's end is an end of it too, and nobody keeps writing into its cgroup.
    let other = pod.launcher.connect(pod.dir.path()).await.unwrap();
    let updating = tokio::spawn(async move { other.update("c", limits.into()).await });
    until("it is begun", || children() == 2).await;
    drop(slow);
    pod.shim.kill("c", 9, false).await.unwrap();
    let ended = updating.await.unwrap().unwrap_err();
    assert!(ended.is(Code::FailedPrecondition), "{ended}");
    assert!(ended.to_string().contains("update container c"), "{ended}");
    until("who wrote has ended", || children() == 0).await;
    pod.finish().await;
}
