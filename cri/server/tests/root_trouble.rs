//! What goes wrong at the edges: records nobody can read, answers that get lost, shims that die unwatched, networks that do
//! not let go, limits that cannot be written down. With the real shim, store and CNI plugins, as root.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is used")]

mod world;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use slipway_cri_api::v1;
use world::{World, cannot_run};

const SLEEP: &[&str] = &["sleep", "1000"];
const RUNNING: i32 = v1::ContainerState::ContainerRunning as i32;

/// Waits for something that takes a moment.
async fn until(what: &str, w: &World, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}\n{}", w.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn now_ns() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(since.unwrap().as_nanos()).unwrap()
}

fn alive(pid: i64) -> bool {
    Path::new(&format!("/proc/{pid}/ns")).exists()
}

/// A running container; pod, container and its pid.
async fn running(w: &World, name: &str, host_network: bool) -> (String, String, i64) {
    let pod = w.run_pod(w.pod_config(name, host_network)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    let pid = w.container_pid(&id).await;
    (pod, id, pid)
}

/// Everything of a container and its pod that must not be touched.
fn belongings(w: &World, pod: &str, id: &str) -> Vec<PathBuf> {
    ["shim.sock", "etc/resolv.conf", "ns/ipc"]
        .iter()
        .map(|name| w.path().join("state/pods").join(pod).join(name))
        .chain([
            w.path()
                .join("state/containers")
                .join(id)
                .join("rootfs/bin/busybox"),
            w.path().join("root/volumes").join(id).join("0/seed"),
        ])
        .collect()
}

#[tokio::test]
async fn what_cannot_be_read_is_left_alone_with_all_that_belongs_to_it_and_told_of() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (pod, id, pid) = running(&w, "kept", false).await;
    let torn = |json: &str| json[..json.len() / 2].to_owned();
    let later = |json: &str| {
        let mut value: serde_json::Value = serde_json::from_str(json).unwrap();
        value["version"] = 99.into();
        value.to_string()
    };
    type Harm<'a> = &'a dyn Fn(&str) -> String;
    let breaks: [(&str, &str, Harm<'_>); 5] = [
        ("pod", &pod, &torn),
        ("pod", &pod, &later),
        ("pod-state", &pod, &later),
        ("container", &id, &torn),
        ("container-state", &id, &later),
    ];
    for (kind, record, harm) in breaks {
        w.kill9();
        let store = w.store();
        let whole = store.records().get(kind, record).unwrap().unwrap();
        store
            .records()
            .put(kind, record, whole.name.as_deref(), &harm(&whole.json))
            .unwrap();
        drop(store);
        w.restart(&[]).await;

        let status = w.node_status().await;
        let condition = status
            .status
            .unwrap()
            .conditions
            .into_iter()
            .find(|c| c.r#type == "SlipwayRecordsReadable");
        assert!(condition.unwrap().message.contains(record), "{kind}");
        assert!(
            status.info["unreadableRecords"].contains(&id),
            "{kind}: {}",
            status.info["unreadableRecords"]
        );
        let of_pod = kind.starts_with("pod");
        assert_eq!(w.pods().await.len(), usize::from(!of_pod), "{kind}");
        assert!(w.containers().await.is_empty(), "{kind}");
        // Neither there nor gone: nobody is told that it has been removed.
        let error = w.remove(&id).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{kind}: {error}");
        let again = if of_pod {
            let error = w.remove_pod(&pod).await.unwrap_err();
            assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{kind}: {error}");
            w.run_pod(w.pod_config("kept", true)).await.unwrap_err()
        } else {
            w.create(&pod, w.container_config("main", SLEEP))
                .await
                .unwrap_err()
        };
        assert!(again.message().contains("cannot be read"), "{kind}: {again}");
        assert!(alive(pid), "{kind}: its process is gone\n{}", w.log());
        for path in belongings(&w, &pod, &id) {
            assert!(path.exists(), "{kind}: {} is gone\n{}", path.display(), w.log());
        }

        w.kill9();
        let store = w.store();
        store
            .records()
            .put(kind, record, whole.name.as_deref(), &whole.json)
            .unwrap();
        drop(store);
        w.restart(&[]).await;
        assert_eq!(w.status(&id).await.unwrap().state, RUNNING, "{kind}");
        assert_eq!(w.exec(&id, &["true"], 5).await.unwrap().exit_code, 0, "{kind}");
        let conditions = w.node_status().await.status.unwrap().conditions;
        assert!(
            conditions.iter().all(|c| c.r#type != "SlipwayRecordsReadable"),
            "{kind}"
        );
    }
    w.finish().await;
}

#[tokio::test]
async fn a_pod_ends_with_a_container_whose_record_cannot_be_read() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (pod, id, pid) = running(&w, "ends", true).await;
    w.kill9();
    let store = w.store();
    let whole = store.records().get("container", &id).unwrap().unwrap();
    store
        .records()
        .put("container", &id, whole.name.as_deref(), "{")
        .unwrap();
    drop(store);
    w.restart(&[]).await;
    w.stop_pod(&pod).await.unwrap();
    assert!(!alive(pid));
    w.remove_pod(&pod).await.unwrap();
    assert!(
        w.path().join("root/volumes").join(&id).exists(),
        "its files are left for who reads the record"
    );
    // Whoever repairs the record gives its files back.
    w.kill9();
    let store = w.store();
    store
        .records()
        .put("container", &id, whole.name.as_deref(), &whole.json)
        .unwrap();
    drop(store);
    w.restart(&[]).await;
    assert!(!w.path().join("root/volumes").join(&id).exists());
    w.finish().await;
}

#[tokio::test]
async fn a_start_whose_answer_is_lost_is_no_exit() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[("SLIPWAY_FAILPOINTS", "start_container.answer=error")]).await;
    let (_, id, pid) = running(&w, "lost", true).await;
    let status = w.status(&id).await.unwrap();
    assert_eq!(status.state, RUNNING, "{status:?}");
    assert!(status.started_at > 0 && alive(pid));
    assert_eq!(w.exec(&id, &["true"], 5).await.unwrap().exit_code, 0);
    // A program that cannot be run is still one.
    w.terminate();
    w.restart(&[]).await;
    let pod = w.run_pod(w.pod_config("none", true)).await.unwrap();
    let id = w
        .create(&pod, w.container_config("none", &["/no/such/program"]))
        .await;
    if let Ok(id) = id {
        w.start(&id).await.unwrap_err();
        assert_eq!(w.wait_exit(&id).await.exit_code, 128);
    }
    w.finish().await;
}

/// A pod that is not ready while a container of it runs: its shared PID namespace's init is gone, the container has one of
/// its own.
async fn not_ready(w: &World, name: &str) -> (String, String) {
    let mut config = w.pod_config(name, true);
    let linux = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    linux.namespace_options.as_mut().unwrap().pid = v1::NamespaceMode::Pod as i32;
    let pod = w.run_pod(config).await.unwrap();
    let mut own = w.container_config("main", SLEEP);
    own.linux = Some(v1::LinuxContainerConfig {
        security_context: Some(v1::LinuxContainerSecurityContext {
            namespace_options: Some(v1::NamespaceOption {
                network: v1::NamespaceMode::Node as i32,
                pid: v1::NamespaceMode::Container as i32,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = w.create(&pod, own).await.unwrap();
    w.start(&id).await.unwrap();
    let info = w.pod_status(&pod).await.unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    let init = rustix::process::Pid::from_raw(i32::try_from(info["pid"].as_i64().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    until("the pod stays ready", w, async || {
        let status = w.pod_status(&pod).await.unwrap().status.unwrap();
        status.state == v1::PodSandboxState::SandboxNotready as i32
    })
    .await;
    assert_eq!(w.status(&id).await.unwrap().state, RUNNING);
    (pod, id)
}

#[tokio::test]
async fn the_shim_of_a_pod_that_is_not_ready_is_watched_also_after_a_restart() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    for restart in [false, true] {
        let (pod, id) = not_ready(&w, &format!("nr-{restart}")).await;
        if restart {
            w.kill9();
            w.restart(&[]).await;
            assert_eq!(w.status(&id).await.unwrap().state, RUNNING);
        }
        w.kill_shims();
        let status = w.wait_exit(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "ShimDied"));
        w.remove_pod(&pod).await.unwrap();
    }
    w.finish().await;
}

#[tokio::test]
async fn an_end_has_the_time_it_had_not_that_of_whoever_noticed() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("time", true)).await.unwrap();
    let start = async |w: &World, name: &str, script: &str| {
        let id = w
            .create(&pod, w.container_config(name, &["sh", "-c", script]))
            .await
            .unwrap();
        w.start(&id).await.unwrap();
        id
    };
    let ends = start(&w, "ends", "sleep 0.3; exit 9").await;
    w.kill9();
    tokio::time::sleep(Duration::from_millis(800)).await;
    // Nobody has taken its exit from the shim, and now nobody can: what the shim wrote down is what is left.
    w.kill_shims();
    let before = now_ns();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    w.restart(&[]).await;
    let status = w.wait_exit(&ends).await;
    assert_eq!(status.exit_code, 9);
    assert!(
        status.finished_at < before,
        "{} s late",
        (status.finished_at - before) / 1_000_000_000
    );
    w.finish().await;
}

#[tokio::test]
async fn one_that_ends_before_its_start_is_noted_says_when_it_began() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[("SLIPWAY_FAILPOINTS", "start_container.after_start=sleep:1000")]).await;
    let pod = w.run_pod(w.pod_config("short", true)).await.unwrap();
    let id = w
        .create(&pod, w.container_config("main", &["true"]))
        .await
        .unwrap();
    let before = now_ns();
    let start = async { w.start(&id).await.unwrap() };
    let seen = async {
        let ended = w.wait_exit(&id).await;
        assert!(
            ended.started_at > before && ended.finished_at >= ended.started_at,
            "{ended:?}"
        );
        ended
    };
    let ((), ended) = tokio::join!(start, seen);
    assert_eq!(w.status(&id).await.unwrap(), ended, "it stays so");
    w.finish().await;
}

/// A plugin directory in which `bridge` is slow or fails for DEL where a file says so, by the pod's name.
fn moody_plugins(w: &World) -> PathBuf {
    let dir = w.path().join("cni-bin");
    let real = ["/opt/cni/bin", "/usr/lib/cni"]
        .iter()
        .map(Path::new)
        .find(|dir| dir.join("bridge").exists())
        .unwrap();
    let script = format!(
        "#!/bin/sh\nname=${{CNI_ARGS##*K8S_POD_NAME=}}; name=${{name%%;*}}\n\
         if [ \"$CNI_COMMAND\" = DEL ] && [ -e {0}/hang-$name ]; then echo >> {0}/hung; exec sleep 30; fi\n\
         if [ \"$CNI_COMMAND\" = DEL ] && [ -e {0}/fail-$name ]; then echo '{{\"code\":11,\"msg\":\"later\"}}'; exit 1; fi\n\
         exec {1}/bridge\n",
        dir.display(),
        real.display()
    );
    std::fs::write(dir.join("bridge"), script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.join("bridge"), mode).unwrap();
    dir
}

#[tokio::test]
async fn a_network_that_does_not_let_go_delays_no_other() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let dir = moody_plugins(&w);
    let (a, b) = (
        w.run_pod(w.pod_config("aa", false)).await.unwrap(),
        w.run_pod(w.pod_config("bb", false)).await.unwrap(),
    );
    let mark = |name: &str| std::fs::write(dir.join(name), "").unwrap();
    let unmark = |name: &str| std::fs::remove_file(dir.join(name)).unwrap();
    mark("fail-aa");
    mark("fail-bb");
    w.remove_pod(&a).await.unwrap();
    w.remove_pod(&b).await.unwrap();
    let pending = async |w: &World| w.node_status().await.info["networkReleasesPending"].clone();
    assert!(pending(&w).await.contains(&a) && pending(&w).await.contains(&b));
    // From now on one of them hangs with every try.
    unmark("fail-aa");
    mark("hang-aa");
    until("nothing is tried again", &w, async || dir.join("hung").exists()).await;
    unmark("fail-bb");
    let began = Instant::now();
    until("the other waits for it", &w, async || {
        !pending(&w).await.contains(&b)
    })
    .await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert!(pending(&w).await.contains(&a));
    unmark("hang-aa");
    // The next start need not wait for the pause to pass.
    w.kill9();
    w.restart(&[]).await;
    until("it is not released", &w, async || pending(&w).await == "[]").await;
    w.finish().await;
}

#[tokio::test]
async fn statistics_do_not_wait_for_a_layer_to_be_counted() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[("SLIPWAY_FAILPOINTS", "container_stats.count_layer=sleep:8000*1")]).await;
    let mut pods = Vec::new();
    for n in 0..3 {
        pods.push(running(&w, &format!("st{n}"), true).await);
    }
    let began = Instant::now();
    let stats = w.stats().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(stats.len(), 3);
    assert!(stats.iter().all(|s| s.cpu.is_some() && s.memory.is_some()));
    until("layers are never counted", &w, async || {
        let stats = w.stats().await.unwrap();
        stats.iter().all(|s| {
            s.writable_layer
                .as_ref()
                .is_some_and(|l| l.used_bytes.as_ref().unwrap().value > 0)
        })
    })
    .await;
    w.finish().await;
}

fn memory_limit(w: &World, name: &str, id: &str) -> u64 {
    let group = format!("{}/{name}/{id}", w.cgroup());
    let v1 = format!("/sys/fs/cgroup/memory{group}/memory.limit_in_bytes");
    let v2 = format!("/sys/fs/cgroup{group}/memory.max");
    let text = std::fs::read_to_string(v1)
        .or_else(|_| std::fs::read_to_string(v2))
        .unwrap();
    text.trim().parse().unwrap_or(u64::MAX)
}

#[tokio::test]
async fn limits_change_with_their_record_or_not_at_all() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (_, id, _) = running(&w, "limits", true).await;
    let limit = |mib: i64| v1::LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    };
    let told = async |w: &World| {
        let resources = w.status(&id).await.unwrap().resources.unwrap().linux.unwrap();
        resources.memory_limit_in_bytes >> 20
    };
    let unlimited = memory_limit(&w, "limits", &id);
    for point in ["after_record", "after_apply"] {
        w.kill9();
        let points = format!("update_container_resources.{point}=error");
        w.restart(&[("SLIPWAY_FAILPOINTS", &points)]).await;
        w.update(&id, limit(64)).await.unwrap_err();
        assert_eq!(memory_limit(&w, "limits", &id), unlimited, "{point}");
        assert_eq!(told(&w).await, 0, "{point}");
    }
    // Killed between the record and the deed: the next start does what is written.
    w.kill9();
    w.restart(&[(
        "SLIPWAY_FAILPOINTS",
        "update_container_resources.after_record=kill",
    )])
    .await;
    w.update(&id, limit(48)).await.unwrap_err();
    w.wait_end().await;
    assert_eq!(memory_limit(&w, "limits", &id), unlimited);
    w.restart(&[]).await;
    assert_eq!((told(&w).await, memory_limit(&w, "limits", &id)), (48, 48 << 20));
    // One that the kernel does not take leaves the others as they were.
    let mut refused = limit(96);
    refused.cpuset_cpus = "4000".into();
    w.update(&id, refused).await.unwrap_err();
    assert_eq!((told(&w).await, memory_limit(&w, "limits", &id)), (48, 48 << 20));
    w.finish().await;
}

#[tokio::test]
async fn limits_that_cannot_be_recorded_on_a_full_disk_are_not_changed() {
    if cannot_run() {
        return;
    }
    let w = World::with(&[], Some("40m")).await;
    let (_, id, _) = running(&w, "full", true).await;
    let unlimited = memory_limit(&w, "full", &id);
    let _ = w
        .exec(&id, &["sh", "-c", "cat /dev/zero > /fill; true"], 30)
        .await
        .unwrap();
    let filler = w.path().join("root/filler");
    for n in 0..2000 {
        if std::fs::write(filler.with_extension(n.to_string()), [0u8; 4096]).is_err() {
            break;
        }
    }
    // The catalog's log has room for some more pages: what is written must be what is in force, each time.
    for mib in 0..2000 {
        let limits = v1::LinuxContainerResources {
            memory_limit_in_bytes: (64 + mib) << 20,
            ..Default::default()
        };
        let before = memory_limit(&w, "full", &id);
        match w.update(&id, limits).await {
            Ok(()) => continue,
            Err(error) => {
                assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error}");
                assert_eq!(memory_limit(&w, "full", &id), before);
                let told = w
                    .status(&id)
                    .await
                    .unwrap()
                    .resources
                    .unwrap()
                    .linux
                    .unwrap()
                    .memory_limit_in_bytes;
                assert!(told == 0 && before == unlimited || u64::try_from(told).unwrap() == before);
                break;
            }
        }
    }
    w.finish().await;
}

#[tokio::test]
async fn volumes_are_copied_up_to_a_bound_and_counted_as_the_containers() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (_, id, _) = running(&w, "vol", true).await;
    w.exec(
        &id,
        &["sh", "-c", "dd if=/dev/zero of=/data/big bs=1M count=3"],
        10,
    )
    .await
    .unwrap();
    w.terminate();
    w.configure("volume_copy_limit_mib = 0\n[stats]\nlayer_usage_max_age_secs = 0\n");
    w.restart(&[]).await;
    until("volumes are not counted", &w, async || {
        let stats = w.stats().await.unwrap();
        stats[0]
            .writable_layer
            .as_ref()
            .is_some_and(|l| l.used_bytes.as_ref().unwrap().value > 3 << 20)
    })
    .await;
    let pod = w.run_pod(w.pod_config("refused", true)).await.unwrap();
    let before = w.leftovers();
    let error = w
        .create(&pod, w.container_config("main", SLEEP))
        .await
        .unwrap_err();
    assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error}");
    assert!(error.message().contains("volume_copy_limit_mib"), "{error}");
    assert_eq!(w.leftovers(), before);
    w.finish().await;
}

#[tokio::test]
async fn the_pod_cidr_fills_a_template_in_or_is_answered_truthfully() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let told = async |w: &World, cidr: &str| {
        let request = v1::UpdateRuntimeConfigRequest {
            runtime_config: Some(v1::RuntimeConfig {
                network_config: Some(v1::NetworkConfig {
                    pod_cidr: cidr.into(),
                }),
            }),
        };
        w.runtime.clone().update_runtime_config(request).await.map(|_| ())
    };
    let ready = async |w: &World| {
        let conditions = w.node_status().await.status.unwrap().conditions;
        conditions.iter().any(|c| c.r#type == "NetworkReady" && c.status)
    };
    told(&w, "10.9.0.0/24").await.unwrap();
    assert!(w.node_status().await.info["podCIDR"].contains("not applied"));
    let error = told(&w, "10.9.0.0").await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    assert!(error.message().contains("pod_cidr"), "{error}");

    let conflist = w.path().join("cni/10-test.conflist");
    let template = std::fs::read_to_string(&conflist).unwrap();
    let subnet = template
        .split("\"subnet\":\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .to_owned();
    std::fs::write(
        w.path().join("template"),
        template.replace(&subnet, "{{.PodCIDR}}"),
    )
    .unwrap();
    std::fs::remove_file(conflist).unwrap();
    w.configure(&format!(
        "[network]\nconf_template = \"{}\"\n",
        w.path().join("template").display()
    ));
    w.terminate();
    w.restart(&[]).await;
    assert!(!ready(&w).await);
    told(&w, &subnet).await.unwrap();
    assert!(ready(&w).await);
    let pod = w.run_pod(w.pod_config("cidr", false)).await.unwrap();
    let ip = w
        .pod_status(&pod)
        .await
        .unwrap()
        .status
        .unwrap()
        .network
        .unwrap()
        .ip;
    assert!(
        ip.starts_with(subnet.trim_end_matches("0/24")),
        "{ip} is not of {subnet}"
    );
    w.finish().await;
}

/// A pipe in the place of a file in a container's cgroup: who writes there waits for somebody who reads.
struct SlowFile {
    file: PathBuf,
    pipe: PathBuf,
}

impl SlowFile {
    fn put(w: &World, file: PathBuf) -> SlowFile {
        let pipe = w.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        rustix::mount::mount_bind(&pipe, &file).unwrap();
        SlowFile { file, pipe }
    }

    /// Reads what is written, once.
    async fn read(&self) -> String {
        let pipe = self.pipe.clone();
        let read = tokio::task::spawn_blocking(move || std::fs::read_to_string(pipe).unwrap());
        tokio::time::timeout(Duration::from_secs(20), read)
            .await
            .unwrap()
            .unwrap()
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.file, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn what_has_run_is_told_before_anything_that_takes_long() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (pod, slow, _) = running(&w, "init", true).await;
    // They are gone through by their ids.
    let mut quick = String::new();
    for n in 0.. {
        let config = w.container_config(&format!("quick{n}"), &["true"]);
        quick = w.create(&pod, config).await.unwrap();
        if quick > slow {
            break;
        }
    }
    let limits = v1::LinuxContainerResources {
        cpu_shares: 512,
        ..Default::default()
    };
    w.update(&slow, limits).await.unwrap();
    w.kill9();
    w.restart(&[("SLIPWAY_FAILPOINTS", "start_container.after_start=kill")])
        .await;
    w.start(&quick).await.unwrap_err();
    w.wait_end().await;
    let group = format!("{}/init/{slow}", w.cgroup());
    let files = [
        format!("/sys/fs/cgroup/cpu{group}/cpu.shares"),
        format!("/sys/fs/cgroup{group}/cpu.weight"),
    ];
    let file = files
        .iter()
        .map(PathBuf::from)
        .find(|file| file.exists())
        .unwrap();
    let held = SlowFile::put(&w, file);
    w.restart(&[]).await;
    let status = w.status(&quick).await.unwrap();
    assert_eq!(
        (status.state, status.exit_code),
        (v1::ContainerState::ContainerExited as i32, 0),
        "{status:?}"
    );
    assert!(status.started_at > 0 && status.finished_at >= status.started_at);
    assert_ne!(held.read().await, "");
    drop(held);
    w.finish().await;
}

/// Has the shims of a world stand still, or go on.
fn signal_shims(w: &World, signal: rustix::process::Signal) {
    for pid in w.shims() {
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

#[tokio::test]
async fn of_a_shim_that_hangs_nothing_is_told_and_everything_of_the_others() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (hung_pod, hung, _) = running(&w, "hung", true).await;
    let ending = {
        let config = w.container_config("ends", &["sh", "-c", "sleep 0.5; exit 4"]);
        let id = w.create(&hung_pod, config).await.unwrap();
        w.start(&id).await.unwrap();
        id
    };
    w.kill9();
    tokio::time::sleep(Duration::from_millis(800)).await;
    signal_shims(&w, rustix::process::Signal::STOP);
    let began = Instant::now();
    w.restart(&[]).await;
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    for id in [&hung, &ending] {
        let error = w.status(id).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
        assert!(error.message().contains(&hung_pod), "{error}");
    }
    w.pod_status(&hung_pod).await.unwrap_err();
    assert_eq!(w.containers().await.len(), 2, "they are there all the same");
    let (_, well, _) = running(&w, "well", true).await;
    assert_eq!(w.status(&well).await.unwrap().state, RUNNING);
    signal_shims(&w, rustix::process::Signal::CONT);
    until("it is never asked again", &w, async || {
        w.status(&hung).await.is_ok()
    })
    .await;
    assert_eq!(w.status(&hung).await.unwrap().state, RUNNING);
    assert_eq!(w.wait_exit(&ending).await.exit_code, 4);
    w.finish().await;
}

/// What stands between slipwayd and a pod's shim.
struct Between {
    /// Connections made from now on are answered with nonsense.
    nonsense: std::sync::Arc<std::sync::atomic::AtomicBool>,
    /// Ends the connections that there are.
    cut: tokio::sync::broadcast::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Between {
    /// Takes the place of the pod's shim on its socket. Descriptors are not passed on.
    fn put(w: &World, pod: &str) -> Between {
        use std::sync::atomic::Ordering;
        // A socket's path is short.
        let dir = w.path().join("p");
        std::os::unix::fs::symlink(w.path().join("state/pods").join(pod), &dir).unwrap();
        let (socket, real) = (dir.join("shim.sock"), dir.join("real.sock"));
        std::fs::rename(&socket, &real).unwrap();
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let nonsense = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (cut, _) = tokio::sync::broadcast::channel(1);
        let task = tokio::spawn({
            let (nonsense, cut) = (nonsense.clone(), cut.clone());
            async move {
                while let Ok((mut client, _)) = listener.accept().await {
                    if nonsense.load(Ordering::Acquire) {
                        tokio::spawn(answer_nonsense(client));
                        continue;
                    }
                    let mut shim = tokio::net::UnixStream::connect(&real).await.unwrap();
                    let mut end = cut.subscribe();
                    tokio::spawn(async move {
                        tokio::select! {
                            _ = tokio::io::copy_bidirectional(&mut client, &mut shim) => {}
                            _ = end.recv() => {}
                        }
                    });
                }
            }
        });
        Between { nonsense, cut, task }
    }
}

/// Answers each request of a ttrpc connection with a payload that is no message.
async fn answer_nonsense(mut client: tokio::net::UnixStream) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut header = [0; 10];
    while client.read_exact(&mut header).await.is_ok() {
        let length = u32::from_be_bytes(*header.first_chunk().unwrap());
        let mut data = vec![0; length as usize];
        client.read_exact(&mut data).await.unwrap();
        // The length, the request's number, a response; in it a payload.
        let answer = [&[0, 0, 0, 3], &header[4..8], &[2, 0], &[0x12, 1, 0xff]].concat();
        client.write_all(&answer).await.unwrap();
    }
}

#[tokio::test]
async fn a_shim_that_lives_and_gives_no_answer_is_not_buried() {
    use std::sync::atomic::Ordering;
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (pod, id, pid) = running(&w, "lost", true).await;
    w.kill9();
    let between = Between::put(&w, &pod);
    w.restart(&[]).await;
    assert_eq!(w.status(&id).await.unwrap().state, RUNNING);
    between.nonsense.store(true, Ordering::Release);
    between.cut.send(()).unwrap();
    // Asked again and again.
    until("its loss is not noticed", &w, async || {
        w.log().matches("reconnect to the shim").count() >= 2
    })
    .await;
    assert!(alive(pid), "{}", w.log());
    between.nonsense.store(false, Ordering::Release);
    until("it is not followed again", &w, async || {
        w.status(&id).await.is_ok()
    })
    .await;
    assert_eq!(w.status(&id).await.unwrap().state, RUNNING);
    let ready = w.pod_status(&pod).await.unwrap().status.unwrap().state;
    assert_eq!(ready, v1::PodSandboxState::SandboxReady as i32);
    // Its events are heard again.
    w.stop(&id, 0).await.unwrap();
    let status = w.status(&id).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    w.remove_pod(&pod).await.unwrap();
    between.task.abort();
    w.finish().await;
}
