//! A container is made behind its CreateContainer's answer: whatever comes meanwhile finds what is true, and its
//! StartContainer waits.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::cri::{container_config, pod_config};
use harness::image::BUSYBOX;
use harness::{Setup, World, v1};

const SLEEP: &[&str] = &["sleep", "1000"];
const CREATED: i32 = v1::ContainerState::ContainerCreated as i32;
const EXITED: i32 = v1::ContainerState::ContainerExited as i32;

/// A world whose worker is a script, which waits for a file `go` and then is the real one, or does as it is told by one
/// named `fail`.
struct Slow {
    w: World,
    worker: PathBuf,
}

impl Slow {
    async fn new(what: &str) -> Result<Slow> {
        let mut w = World::new(what).await?;
        let worker = w.lab.join("slow-worker");
        let script = format!(
            "#!/bin/sh\n\
             while [ ! -e {0}/go ]; do [ ! -e {0}/fail ] || break; /bin/busybox usleep 10000; done\n\
             if [ -e {0}/fail ]; then printf '{{\"error\":\"mount /x: no such device\"}}\\n' >&3; exit 1; fi\n\
             exec {1} \"$@\"\n",
            w.lab.path().display(),
            harness::lab::bin("slipway-runc").display()
        );
        std::fs::write(&worker, script)?;
        std::fs::set_permissions(&worker, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        w.daemon.stop()?;
        let slow = Slow { w, worker };
        let setup = slow.setup();
        let mut slow = slow;
        slow.w.restart(&setup).await?;
        Ok(slow)
    }

    fn setup(&self) -> Setup {
        Setup {
            config: format!("[runtime]\nworker = {:?}\n", self.worker),
            ..Default::default()
        }
    }

    /// From now on the worker does that: "go" or "fail"; nothing when it is taken back.
    fn say(&self, word: &str) -> Result<()> {
        Ok(std::fs::write(self.w.lab.join(word), "")?)
    }

    fn take_back(&self, word: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.w.lab.join(word))?)
    }

    async fn kill9(&mut self) -> Result<()> {
        self.w.daemon.kill9()?;
        let setup = self.setup();
        self.w.restart(&setup).await
    }

    async fn pod(&self, name: &str) -> Result<(String, v1::PodSandboxConfig)> {
        let config = pod_config(name, &self.w.lab, true);
        Ok((self.w.cri.run_pod(config.clone()).await?, config))
    }

    /// A container whose making is under way.
    async fn create(&self, pod: &str, config: &v1::PodSandboxConfig, name: &str) -> Result<String> {
        let c = container_config(name, BUSYBOX, SLEEP);
        self.w.cri.create(pod, c, config.clone()).await
    }

    /// A start that waits for it to be made.
    async fn starting(&self, id: &str) -> Result<tokio::task::JoinHandle<Result<()>>> {
        let cri = self.w.cri.clone();
        let start = tokio::spawn({
            let id = id.to_owned();
            async move { cri.start(&id).await }
        });
        self.w
            .daemon
            .until_logged(&["the shim is asked to start it", id])
            .await?;
        // Of its way to the shim nobody says anything.
        tokio::time::sleep(Duration::from_millis(100)).await;
        Ok(start)
    }

    async fn wait_for(&self, id: &str, state: i32) -> Result<v1::ContainerStatus> {
        let began = Instant::now();
        loop {
            let s = self.w.cri.status(id).await?;
            if s.state == state {
                return Ok(s);
            }
            anyhow::ensure!(began.elapsed() < Duration::from_secs(10), "never {state}: {s:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Nothing of a container but its record, its bundle and its snapshot.
    fn assert_taken_back(&self, id: &str) -> Result<()> {
        let find = format!(
            "find /sys/fs/cgroup/pids{} -mindepth 2 -type d -name '*{id}*'",
            self.w.lab.cgroup()
        );
        assert_eq!(harness::cmd::sh(&find)?, "");
        let bundle = self.w.daemon.state().join("containers").join(id);
        assert_eq!(harness::leftovers::mounts_under(&bundle), Vec::<String>::new());
        assert_eq!(harness::leftovers::processes_naming(&bundle), []);
        Ok(())
    }
}

#[tokio::test]
async fn a_start_waits_and_everything_else_is_answered_at_once() -> Result<()> {
    let s = Slow::new("make-wait").await?;
    let (pod, config) = s.pod("wait").await?;
    let began = Instant::now();
    let id = s.create(&pod, &config, "main").await?;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "the worker is not waited for"
    );
    let start = s.starting(&id).await?;
    let began = Instant::now();
    let status = s.w.cri.status(&id).await?;
    assert_eq!(
        (status.state, status.started_at, status.finished_at),
        (CREATED, 0, 0)
    );
    let listed = s.w.cri.containers().await?;
    assert_eq!(
        listed
            .iter()
            .map(|c| (c.id.as_str(), c.state))
            .collect::<Vec<_>>(),
        [(id.as_str(), CREATED)]
    );
    let stats =
        s.w.cri
            .runtime
            .clone()
            .container_stats(v1::ContainerStatsRequest {
                container_id: id.clone(),
            })
            .await?;
    assert!(stats.into_inner().stats.is_some());
    let exec =
        s.w.cri
            .exec(&id, &["true"], 5)
            .await
            .expect_err("it does not run");
    assert!(
        format!("{exec:#}").contains("created and not running"),
        "{exec:#}"
    );
    let attach = v1::AttachRequest {
        container_id: id.clone(),
        stdout: true,
        ..Default::default()
    };
    let attach = s.w.cri.runtime.clone().attach(attach).await;
    assert_eq!(
        attach.expect_err("it does not run").code(),
        tonic::Code::FailedPrecondition
    );
    let second = s.w.cri.start(&id).await.expect_err("one is at it");
    let second = second.downcast_ref::<tonic::Status>().context("a status")?;
    assert_eq!(second.code(), tonic::Code::Unavailable, "{second}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(!start.is_finished());
    s.say("go")?;
    start.await??;
    assert_eq!(s.w.cri.exec(&id, &["true"], 5).await?.0, 0);
    s.w.finish().await
}

#[tokio::test]
async fn limits_that_change_meanwhile_are_those_it_runs_with() -> Result<()> {
    let s = Slow::new("make-limit").await?;
    let (pod, config) = s.pod("limit").await?;
    let id = s.create(&pod, &config, "main").await?;
    let linux = v1::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    };
    let update = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(linux),
        ..Default::default()
    };
    s.w.cri.runtime.clone().update_container_resources(update).await?;
    s.say("go")?;
    s.w.cri.start(&id).await?;
    let find = format!(
        "cat $(find /sys/fs/cgroup -path '*{}*{id}*' \\( -name memory.limit_in_bytes -o -name memory.max \\))",
        s.w.lab.cgroup()
    );
    assert_eq!(harness::cmd::sh(&find)?.trim(), (96 << 20).to_string());
    s.w.finish().await
}

#[tokio::test]
async fn a_failure_is_an_exit_with_its_reason_whoever_hears_of_it_first() -> Result<()> {
    let s = Slow::new("make-fail").await?;
    let (pod, config) = s.pod("fail").await?;
    // Kubelet starts it before it has failed.
    let early = s.create(&pod, &config, "early").await?;
    let start = s.starting(&early).await?;
    s.say("fail")?;
    let e = start.await?.expect_err("it was not made");
    s.assert_taken_back(&early)?;
    // And after.
    let late = s.create(&pod, &config, "late").await?;
    let ended = s.wait_for(&late, EXITED).await?;
    let told = s.w.cri.start(&late).await.expect_err("it was not made");
    for (id, e) in [(&early, &e), (&late, &told)] {
        let status = s.w.cri.status(id).await?;
        assert_eq!(
            (status.exit_code, status.reason.as_str(), status.started_at),
            (128, "StartError", 0)
        );
        assert!(status.message.contains("mount /x: no such device"), "{status:?}");
        let e = e.downcast_ref::<tonic::Status>().context("a status")?;
        assert_eq!(e.message(), status.message);
    }
    assert!(ended.finished_at > 0);
    for id in [&early, &late] {
        s.w.cri.stop(id, 5).await?;
        s.assert_taken_back(id)?;
        s.w.cri.remove(id).await?;
    }
    // The pod is as good as before.
    s.take_back("fail")?;
    s.say("go")?;
    let good = s.create(&pod, &config, "early").await?;
    s.w.cri.start(&good).await?;
    s.w.finish().await
}

#[tokio::test]
async fn whoever_ends_a_container_does_not_wait_for_it_to_be_made() -> Result<()> {
    let s = Slow::new("make-end").await?;
    let (pod, config) = s.pod("end").await?;
    for with_start in [false, true] {
        let began = Instant::now();
        let name = |what: &str| format!("{what}-{with_start}");
        let stopped = s.create(&pod, &config, &name("stopped")).await?;
        let removed = s.create(&pod, &config, &name("removed")).await?;
        let mut starts = Vec::new();
        if with_start {
            starts = vec![s.starting(&stopped).await?, s.starting(&removed).await?];
        }
        s.w.cri.stop(&stopped, 20).await?;
        let status = s.w.cri.status(&stopped).await?;
        assert_eq!(
            (status.state, status.exit_code, status.started_at),
            (EXITED, 137, 0),
            "{status:?}"
        );
        s.assert_taken_back(&stopped)?;
        s.w.cri.remove(&removed).await?;
        assert!(s.w.cri.status(&removed).await.is_err());
        for start in starts {
            let e = start.await?.expect_err("it was ended");
            assert!(format!("{e:#}").contains(&pod) || !format!("{e:#}").is_empty());
        }
        s.w.cri.remove(&stopped).await?;
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
    // The whole pod, stopped or removed.
    for remove in [false, true] {
        let (other, config) = s.pod(&format!("pod-{remove}")).await?;
        let waits = s.create(&other, &config, "waits").await?;
        let alone = s.create(&other, &config, "alone").await?;
        let start = s.starting(&waits).await?;
        let began = Instant::now();
        if remove {
            s.w.cri.remove_pod(&other).await?;
            assert!(s.w.cri.status(&alone).await.is_err());
        } else {
            let stop = v1::StopPodSandboxRequest {
                pod_sandbox_id: other.clone(),
            };
            s.w.cri.runtime.clone().stop_pod_sandbox(stop).await?;
            for id in [&waits, &alone] {
                let status = s.w.cri.status(id).await?;
                assert_eq!((status.state, status.exit_code), (EXITED, 137), "{status:?}");
                s.assert_taken_back(id)?;
            }
        }
        start.await?.expect_err("its pod was stopped");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
    // What was ended while its start waited is known not to run.
    let log = std::fs::read_to_string(s.w.lab.join("slipwayd.log"))?;
    let asked = log.lines().find(|l| l.contains("asking on"));
    assert_eq!(asked, None);
    s.w.finish().await
}

#[tokio::test]
async fn a_kill_of_slipwayd_meanwhile_leaves_what_can_be_started_or_has_ended() -> Result<()> {
    let mut s = Slow::new("make-kill").await?;
    let (pod, config) = s.pod("kill").await?;
    // One is under way over the restart, and is started after it; a start that waited is as if it had not been.
    let id = s.create(&pod, &config, "main").await?;
    let start = s.starting(&id).await?;
    s.kill9().await?;
    start.await?.expect_err("slipwayd died");
    assert_eq!(s.w.cri.status(&id).await?.state, CREATED);
    s.say("go")?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(s.w.cri.status(&id).await?.state, CREATED, "nobody starts it");
    s.w.cri.start(&id).await?;
    assert_eq!(s.w.cri.exec(&id, &["true"], 5).await?.0, 0);
    // One ends in its failure while slipwayd is away.
    s.take_back("go")?;
    let failed = s.create(&pod, &config, "failed").await?;
    let removed = s.create(&pod, &config, "removed").await?;
    s.w.daemon.kill9()?;
    s.say("fail")?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let setup = s.setup();
    s.w.restart(&setup).await?;
    let status = s.wait_for(&failed, EXITED).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
    let e = s.w.cri.start(&failed).await.expect_err("it was not made");
    assert!(format!("{e:#}").contains("mount /x: no such device"), "{e:#}");
    s.w.cri.remove(&removed).await?;
    s.w.finish().await
}

#[tokio::test]
async fn a_kill_of_slipwayd_before_the_answer_undoes_it_also_when_it_is_under_way() -> Result<()> {
    for point in [
        "create_container.after_bundle",
        "create_container.after_create",
        "create_container.after_record",
    ] {
        let mut s = Slow::new("make-points").await?;
        let (pod, config) = s.pod("points").await?;
        s.w.daemon.stop()?;
        let setup = Setup {
            env: vec![("SLIPWAY_FAILPOINTS".into(), format!("{point}=kill"))],
            ..s.setup()
        };
        s.w.restart(&setup).await?;
        s.create(&pod, &config, "main").await.expect_err("slipwayd dies");
        s.w.daemon.wait_end(Duration::from_secs(10)).await?;
        let setup = s.setup();
        s.w.restart(&setup).await?;
        let listed = s.w.cri.containers().await?;
        if point == "create_container.after_record" {
            // It is written down, so it is there, and can be started.
            let [c] = &listed[..] else { panic!("{listed:?}") };
            assert_eq!(c.state, CREATED);
            s.say("go")?;
            s.w.cri.start(&c.id).await?;
            assert_eq!(s.w.cri.exec(&c.id, &["true"], 5).await?.0, 0);
        } else {
            assert!(listed.is_empty(), "{point}: {listed:?}");
            s.assert_taken_back("")?;
        }
        s.w.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_shim_that_dies_meanwhile_is_told_as_such() -> Result<()> {
    let s = Slow::new("make-shim").await?;
    let (pod, config) = s.pod("shim").await?;
    let id = s.create(&pod, &config, "main").await?;
    let alone = s.create(&pod, &config, "alone").await?;
    let start = s.starting(&id).await?;
    for (pid, command) in harness::leftovers::processes_naming(s.w.daemon.state()) {
        if command.contains("containerd-shim-slipway-v1") {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a pid")?;
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        }
    }
    let e = start.await?.expect_err("its shim died");
    assert!(format!("{e:#}").contains("shim"), "{e:#}");
    for id in [&id, &alone] {
        let status = s.wait_for(id, EXITED).await?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "ShimDied"),
            "{status:?}"
        );
        s.assert_taken_back(id)?;
    }
    s.w.finish().await
}

#[tokio::test]
async fn a_target_that_ends_meanwhile_fails_the_start_alone() -> Result<()> {
    let s = Slow::new("make-target").await?;
    s.say("go")?;
    let (pod, config) = s.pod("target").await?;
    let target = s.create(&pod, &config, "target").await?;
    s.w.cri.start(&target).await?;
    s.take_back("go")?;
    let mut debug = container_config("debug", BUSYBOX, SLEEP);
    debug
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .namespace_options = Some(v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Target as i32,
        target_id: target.clone(),
        ..Default::default()
    });
    let id = s.w.cri.create(&pod, debug, config).await?;
    s.w.cri.stop(&target, 0).await?;
    assert_eq!(s.w.cri.status(&id).await?.state, CREATED);
    s.say("go")?;
    s.w.cri
        .start(&id)
        .await
        .expect_err("there is nothing to join any more");
    let status = s.w.cri.status(&id).await?;
    assert_eq!(status.state, EXITED);
    assert!(!status.message.is_empty(), "{status:?}");
    s.assert_taken_back(&id)?;
    s.w.finish().await
}

#[tokio::test]
async fn what_happens_is_told_in_the_order_in_which_it_does() -> Result<()> {
    let s = Slow::new("make-events").await?;
    s.say("go")?;
    let (pod, config) = s.pod("events").await?;
    let mut events =
        s.w.cri
            .runtime
            .clone()
            .get_container_events(v1::GetEventsRequest {})
            .await?
            .into_inner();
    let mut ids = Vec::new();
    for n in 0..10 {
        let quick = container_config(&format!("q{n}"), BUSYBOX, &["true"]);
        ids.push(s.w.cri.run(&pod, quick, config.clone()).await?);
    }
    s.say("fail")?;
    for n in 0..10 {
        let id = s.create(&pod, &config, &format!("f{n}")).await?;
        s.w.cri.start(&id).await.expect_err("it was not made");
        ids.push(id);
    }
    let mut told: std::collections::BTreeMap<String, Vec<i32>> = Default::default();
    let (created, started, stopped) = (
        v1::ContainerEventType::ContainerCreatedEvent as i32,
        v1::ContainerEventType::ContainerStartedEvent as i32,
        v1::ContainerEventType::ContainerStoppedEvent as i32,
    );
    while ids
        .iter()
        .any(|id| told.get(id).is_none_or(|told| !told.contains(&stopped)))
    {
        let event = tokio::time::timeout(Duration::from_secs(10), events.message()).await??;
        let event = event.context("an event")?;
        told.entry(event.container_id)
            .or_default()
            .push(event.container_event_type);
    }
    for (n, id) in ids.iter().enumerate() {
        let told = &told[id];
        assert_eq!(told[0], created, "{told:?}");
        assert_eq!(
            told.iter().filter(|what| **what == created).count(),
            1,
            "{told:?}"
        );
        assert_eq!(told.contains(&started), n < 10, "{told:?}");
    }
    s.w.finish().await
}
