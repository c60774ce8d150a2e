//! What a kubelet asks beside pods' lives: events, metrics, statistics, runtime handlers, user namespaces, and refusals
//! that name the field. With the real shim, store and CNI plugins, as root.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is used")]

mod world;

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use slipway_cri_api::v1;
use world::{IMAGE, World, cannot_run};

const SLEEP: &[&str] = &["sleep", "1000"];

async fn run(w: &World, pod: v1::PodSandboxConfig, container: v1::ContainerConfig) -> (String, String) {
    let pod = w.run_pod(pod).await.unwrap();
    let id = w.create(&pod, container).await.unwrap();
    w.start(&id).await.unwrap();
    (pod, id)
}

async fn shell(w: &World, id: &str, script: &str) -> String {
    let output = w.exec(id, &["sh", "-c", script], 10).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert_eq!(
        output.exit_code,
        0,
        "{script}: {text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[tokio::test]
async fn events_tell_what_happens_with_the_statuses_of_the_pod() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let mut events = w
        .runtime
        .clone()
        .get_container_events(v1::GetEventsRequest {})
        .await
        .unwrap()
        .into_inner();
    let config = w.pod_config("ev", true);
    let (pod, id) = run(&w, config, w.container_config("main", &["sh", "-c", "exit 3"])).await;
    w.wait_exit(&id).await;
    w.remove(&id).await.unwrap();
    w.stop_pod(&pod).await.unwrap();
    w.remove_pod(&pod).await.unwrap();
    use v1::ContainerEventType as E;
    let expected = [
        (&pod, E::ContainerCreatedEvent),
        (&pod, E::ContainerStartedEvent),
        (&id, E::ContainerCreatedEvent),
        (&id, E::ContainerStartedEvent),
        (&id, E::ContainerStoppedEvent),
        (&id, E::ContainerDeletedEvent),
        (&pod, E::ContainerStoppedEvent),
        (&pod, E::ContainerDeletedEvent),
    ];
    let mut told = Vec::new();
    let mut last = 0;
    while told.len() < expected.len() {
        let next = tokio::time::timeout(Duration::from_secs(10), events.message()).await;
        let event = next.unwrap_or_else(|_| panic!("only {told:?}")).unwrap().unwrap();
        assert!(event.created_at >= last);
        last = event.created_at;
        assert_eq!(event.pod_sandbox_status.unwrap().id, pod);
        if event.container_event_type == E::ContainerStoppedEvent as i32 && event.container_id == id {
            let status = event.containers_statuses.iter().find(|c| c.id == id).unwrap();
            assert_eq!(status.exit_code, 3);
        }
        told.push((event.container_id, event.container_event_type));
    }
    // A start and the end of so short a program are told by two tasks.
    let sorted = |mut list: Vec<(String, i32)>| {
        list.sort();
        list
    };
    let expected = expected.map(|(id, kind)| (id.clone(), kind as i32)).to_vec();
    assert_eq!(sorted(told.clone()), sorted(expected.clone()), "{told:?}");
    assert_eq!((&told[..3], &told[5..]), (&expected[..3], &expected[5..]));
    w.finish().await;
}

#[tokio::test]
async fn listeners_to_events_are_bounded_and_end_with_slipwayd() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let mut listeners = Vec::new();
    for _ in 0..16 {
        let listening = w
            .runtime
            .clone()
            .get_container_events(v1::GetEventsRequest {})
            .await;
        listeners.push(listening.unwrap().into_inner());
    }
    let more = w
        .runtime
        .clone()
        .get_container_events(v1::GetEventsRequest {})
        .await
        .unwrap_err();
    assert_eq!(more.code(), tonic::Code::ResourceExhausted, "{more}");
    w.terminate();
    for mut listener in listeners {
        let ended = tokio::time::timeout(Duration::from_secs(5), listener.message())
            .await
            .unwrap();
        assert!(matches!(ended, Ok(None) | Err(_)));
    }
    w.restart(&[]).await;
    w.finish().await;
}

#[tokio::test]
async fn metrics_have_the_names_and_labels_that_cadvisor_gave_them() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let (pod, id) = run(
        &w,
        w.pod_config("metrics", false),
        w.container_config("main", SLEEP),
    )
    .await;
    shell(&w, &id, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done").await;
    let request = v1::ListMetricDescriptorsRequest {};
    let described = w
        .runtime
        .clone()
        .list_metric_descriptors(request)
        .await
        .unwrap()
        .into_inner()
        .descriptors;
    let described: HashMap<String, Vec<String>> =
        described.into_iter().map(|d| (d.name, d.label_keys)).collect();
    let request = v1::ListPodSandboxMetricsRequest {};
    let found = w
        .runtime
        .clone()
        .list_pod_sandbox_metrics(request)
        .await
        .unwrap()
        .into_inner()
        .pod_metrics;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].pod_sandbox_id, pod);
    let of_container = &found[0].container_metrics[0];
    assert_eq!(of_container.container_id, id);
    let label = |metric: &v1::Metric, key: &str| {
        let keys = &described[&metric.name];
        assert_eq!(keys.len(), metric.label_values.len(), "{}", metric.name);
        metric.label_values[keys.iter().position(|k| k == key).unwrap()].clone()
    };
    for metric in found[0].metrics.iter().chain(&of_container.metrics) {
        assert_eq!(
            (label(metric, "pod"), label(metric, "namespace")),
            ("metrics".into(), "default".into())
        );
    }
    let value = |list: &[v1::Metric], name: &str| {
        let metric = list.iter().find(|m| m.name == name);
        metric.unwrap_or_else(|| panic!("no {name}")).value.unwrap().value
    };
    for metric in &of_container.metrics {
        assert_eq!(
            (label(metric, "container"), label(metric, "name")),
            ("main".into(), id.clone())
        );
    }
    for name in [
        "container_memory_working_set_bytes",
        "container_memory_usage_bytes",
        "container_processes",
        "container_threads",
        "container_file_descriptors",
        "container_ulimits_soft",
        "container_last_seen",
        "container_start_time_seconds",
        "container_fs_limit_bytes",
        "container_fs_usage_bytes",
    ] {
        assert!(value(&of_container.metrics, name) > 0, "{name}");
    }
    value(&of_container.metrics, "container_cpu_usage_seconds_total");
    value(&of_container.metrics, "container_oom_events_total");
    let sent = found[0]
        .metrics
        .iter()
        .find(|m| m.name == "container_network_transmit_packets_total")
        .unwrap();
    assert_eq!(
        (label(sent, "interface"), label(sent, "name")),
        ("eth0".into(), pod.clone())
    );

    let request = v1::StreamPodSandboxMetricsRequest {};
    let mut stream = w
        .runtime
        .clone()
        .stream_pod_sandbox_metrics(request)
        .await
        .unwrap()
        .into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.pod_sandbox_metrics[0].pod_sandbox_id, pod);
    assert!(stream.message().await.unwrap().is_none());
    w.finish().await;
}

#[tokio::test]
async fn statistics_of_a_pod_have_its_network_processes_and_containers() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let (pod, id) = run(
        &w,
        w.pod_config("podstats", false),
        w.container_config("main", SLEEP),
    )
    .await;
    let request = v1::PodSandboxStatsRequest {
        pod_sandbox_id: pod.clone(),
    };
    let stats = w
        .runtime
        .clone()
        .pod_sandbox_stats(request)
        .await
        .unwrap()
        .into_inner()
        .stats
        .unwrap();
    let linux = stats.linux.unwrap();
    assert_eq!(linux.network.unwrap().default_interface.unwrap().name, "eth0");
    assert!(linux.process.unwrap().process_count.unwrap().value >= 1);
    assert!(linux.memory.unwrap().working_set_bytes.unwrap().value > 0);
    let container = &linux.containers[0];
    assert_eq!(container.attributes.as_ref().unwrap().id, id);
    assert!(container.cpu.as_ref().unwrap().usage_core_nano_seconds.is_some());
    assert!(
        container
            .writable_layer
            .as_ref()
            .unwrap()
            .used_bytes
            .unwrap()
            .value
            > 0
    );
    let request = v1::ListPodSandboxStatsRequest::default();
    assert_eq!(
        w.runtime
            .clone()
            .list_pod_sandbox_stats(request)
            .await
            .unwrap()
            .into_inner()
            .stats
            .len(),
        1
    );
    let request = v1::StreamPodSandboxStatsRequest::default();
    let mut stream = w
        .runtime
        .clone()
        .stream_pod_sandbox_stats(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        stream.message().await.unwrap().unwrap().pod_sandbox_stats.len(),
        1
    );
    let request = v1::StreamContainersRequest::default();
    let mut stream = w
        .runtime
        .clone()
        .stream_containers(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().containers[0].id, id);
    assert!(stream.message().await.unwrap().is_none());
    // What the kubelet tells of a pod's new limits is remembered, also over a restart.
    let request = v1::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.clone(),
        resources: Some(v1::LinuxContainerResources {
            cpu_shares: 777,
            ..Default::default()
        }),
        ..Default::default()
    };
    w.runtime
        .clone()
        .update_pod_sandbox_resources(request)
        .await
        .unwrap();
    w.kill9();
    w.restart(&[]).await;
    let store = w.store();
    let state = store.records().get("pod-state", &pod).unwrap().unwrap();
    assert!(state.json.contains("777"), "{}", state.json);
    drop(store);
    w.finish().await;
}

/// Everything that a stream of parts has.
async fn whole<M, T>(stream: tonic::Response<tonic::Streaming<M>>, part: impl Fn(M) -> Vec<T>) -> Vec<T> {
    let mut stream = stream.into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        let part = part(message);
        assert!(!part.is_empty(), "a part with nothing in it");
        all.extend(part);
    }
    all
}

#[tokio::test]
async fn each_stream_of_a_list_has_what_the_list_has() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let (mut pods, mut containers) = (Vec::new(), Vec::new());
    for name in ["sa", "sb", "sc"] {
        let (pod, id) = run(&w, w.pod_config(name, true), w.container_config("main", SLEEP)).await;
        pods.push(pod);
        containers.push(id);
    }
    let (runtime, image) = (|| w.runtime.clone(), || w.image.clone());
    macro_rules! both {
        ($client:ident: $list:ident($request:expr).$unary:ident, $stream:ident($streamed:expr).$parts:ident) => {{
            let unary = $client().$list($request).await.unwrap().into_inner().$unary;
            let parts = $client().$stream($streamed).await.unwrap();
            (unary, whole(parts, |message| message.$parts).await)
        }};
    }
    let (unary, streamed) = both!(
        runtime: list_pod_sandbox(v1::ListPodSandboxRequest::default()).items,
        stream_pod_sandboxes(v1::StreamPodSandboxesRequest::default()).pod_sandboxes
    );
    assert_eq!(unary, streamed);
    assert_eq!(unary.len(), 3);
    let (unary, streamed) = both!(
        runtime: list_containers(v1::ListContainersRequest::default()).containers,
        stream_containers(v1::StreamContainersRequest::default()).containers
    );
    assert_eq!(unary, streamed);
    assert_eq!(unary.len(), 3);
    let (unary, streamed) = both!(
        image: list_images(v1::ListImagesRequest::default()).images,
        stream_images(v1::StreamImagesRequest::default()).images
    );
    assert_eq!(unary, streamed);
    assert!(!unary.is_empty());

    // What is measured is another moment's: whose it is has to be the same.
    let of_container = |s: &v1::ContainerStats| s.attributes.as_ref().unwrap().id.clone();
    let (unary, streamed) = both!(
        runtime: list_container_stats(v1::ListContainerStatsRequest::default()).stats,
        stream_container_stats(v1::StreamContainerStatsRequest::default()).container_stats
    );
    let ids = |stats: &[v1::ContainerStats]| stats.iter().map(of_container).collect::<Vec<_>>();
    assert_eq!(ids(&unary), ids(&streamed));
    assert_eq!(unary.len(), 3);
    assert!(streamed.iter().all(|s| s.cpu.is_some() && s.memory.is_some()));
    let (unary, streamed) = both!(
        runtime: list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest::default()).stats,
        stream_pod_sandbox_stats(v1::StreamPodSandboxStatsRequest::default()).pod_sandbox_stats
    );
    let ids = |stats: &[v1::PodSandboxStats]| {
        let id = |s: &v1::PodSandboxStats| s.attributes.as_ref().unwrap().id.clone();
        stats.iter().map(id).collect::<Vec<_>>()
    };
    assert_eq!(ids(&unary), ids(&streamed));
    assert_eq!(unary.len(), 3);
    let (unary, streamed) = both!(
        runtime: list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest::default()).pod_metrics,
        stream_pod_sandbox_metrics(v1::StreamPodSandboxMetricsRequest::default()).pod_sandbox_metrics
    );
    let names = |pods: &[v1::PodSandboxMetrics]| {
        let of_pod = |p: &v1::PodSandboxMetrics| {
            let of = |m: &v1::ContainerMetrics| {
                (
                    m.container_id.clone(),
                    m.metrics.iter().map(|m| m.name.clone()).collect::<Vec<_>>(),
                )
            };
            let containers = p.container_metrics.iter().map(of).collect::<Vec<_>>();
            (p.pod_sandbox_id.clone(), p.metrics.len(), containers)
        };
        pods.iter().map(of_pod).collect::<Vec<_>>()
    };
    assert_eq!(names(&unary), names(&streamed));
    assert_eq!(unary.len(), 3);

    // A filter means the same to both.
    let filter = || {
        Some(v1::ContainerStatsFilter {
            id: containers[1].clone(),
            ..Default::default()
        })
    };
    let (unary, streamed) = both!(
        runtime: list_container_stats(v1::ListContainerStatsRequest { filter: filter() }).stats,
        stream_container_stats(v1::StreamContainerStatsRequest { filter: filter() }).container_stats
    );
    assert_eq!((unary.len(), streamed.len()), (1, 1));
    assert_eq!(of_container(&streamed[0]), containers[1]);
    let filter = || {
        Some(v1::PodSandboxFilter {
            id: pods[2].clone(),
            ..Default::default()
        })
    };
    let (unary, streamed) = both!(
        runtime: list_pod_sandbox(v1::ListPodSandboxRequest { filter: filter() }).items,
        stream_pod_sandboxes(v1::StreamPodSandboxesRequest { filter: filter() }).pod_sandboxes
    );
    assert_eq!(unary, streamed);
    assert_eq!(streamed[0].id, pods[2]);
    w.finish().await;
}

#[tokio::test]
async fn runtime_handlers_are_variants_and_told_of() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    w.configure(
        "[runtime.handlers.strict]\nshm_size_mib = 2\nno_new_privileges = true\ndefault_capabilities = [\"CHOWN\"]\n\
         privileged_without_host_devices = true\n\
         [runtime.handlers.roomy]\nshm_size_mib = 128\ndefault_capabilities = [\"KILL\"]\n",
    );
    w.terminate();
    w.restart(&[]).await;
    let handlers = w.node_status().await.runtime_handlers;
    let names: Vec<&str> = handlers.iter().map(|h| h.name.as_str()).collect();
    assert_eq!(names, ["", "slipway", "roomy", "strict"]);
    assert!(
        handlers
            .iter()
            .all(|h| h.features.as_ref().unwrap().recursive_read_only_mounts)
    );
    let with = async |handler: &str| {
        let request = v1::RunPodSandboxRequest {
            config: Some(w.pod_config(&format!("h-{handler}"), true)),
            runtime_handler: handler.into(),
        };
        w.runtime.clone().run_pod_sandbox(request).await
    };
    let error = with("kata").await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    assert!(
        error.message().contains("runtime_handler") && error.message().contains("strict"),
        "{error}"
    );
    let mut seen = Vec::new();
    for handler in ["slipway", "strict", "roomy"] {
        let pod = with(handler).await.unwrap().into_inner().pod_sandbox_id;
        assert_eq!(
            w.pod_status(&pod).await.unwrap().status.unwrap().runtime_handler,
            handler
        );
        let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
        w.start(&id).await.unwrap();
        seen.push(
            shell(
                &w,
                &id,
                "grep -E 'NoNewPrivs|CapBnd' /proc/1/status; df -k /dev/shm | tail -1 | awk '{print $2}'",
            )
            .await,
        );
    }
    assert!(
        seen[0].contains("NoNewPrivs:\t0") && seen[0].ends_with("65536"),
        "{}",
        seen[0]
    );
    assert!(
        seen[1].contains("NoNewPrivs:\t1") && seen[1].ends_with("2048"),
        "{}",
        seen[1]
    );
    assert!(seen[1].contains("CapBnd:\t0000000000000001"), "{}", seen[1]);
    // Another variant of ours: nothing of the one or the default is in it.
    assert!(
        seen[2].contains("NoNewPrivs:\t0")
            && seen[2].ends_with("131072")
            && seen[2].contains("CapBnd:\t0000000000000020"),
        "{}",
        seen[2]
    );
    w.finish().await;
}

const FIRST: u32 = 1_000_000;

/// A pod with 65536 ids of its own.
fn with_own_users(mut config: v1::PodSandboxConfig) -> v1::PodSandboxConfig {
    let map = v1::IdMapping {
        host_id: FIRST,
        container_id: 0,
        length: 65536,
    };
    let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.namespace_options.as_mut().unwrap().userns_options = Some(v1::UserNamespace {
        mode: v1::NamespaceMode::Pod as i32,
        uids: vec![map],
        gids: vec![map],
    });
    config
}

#[tokio::test]
async fn a_pod_with_users_of_its_own_is_root_only_inside() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let status = w.node_status().await;
    let features = status.runtime_handlers[0].features.unwrap();
    // The pods below are on the host's network too.
    assert_eq!(
        status.features.unwrap().user_namespaces_host_network,
        features.user_namespaces,
        "kubelet is told"
    );
    if !features.user_namespaces {
        let _ = writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this file system or kernel has no id-mapped mounts ***\n"
        );
        w.finish().await;
        return;
    }
    let host_dir = w.path().join("mounted");
    std::fs::create_dir(&host_dir).unwrap();
    std::fs::write(host_dir.join("file"), "of the host's root").unwrap();
    for host_network in [false, true] {
        let name = format!("users-{host_network}");
        let map = v1::IdMapping {
            host_id: FIRST,
            container_id: 0,
            length: 65536,
        };
        let mut container = w.container_config("main", SLEEP);
        container.mounts = vec![
            v1::Mount {
                container_path: "/mapped".into(),
                host_path: host_dir.display().to_string(),
                uid_mappings: vec![map],
                gid_mappings: vec![map],
                ..Default::default()
            },
            v1::Mount {
                container_path: "/image".into(),
                image: Some(v1::ImageSpec {
                    image: IMAGE.into(),
                    ..Default::default()
                }),
                image_sub_path: "etc".into(),
                ..Default::default()
            },
        ];
        let config = with_own_users(w.pod_config(&name, host_network));
        let (pod, id) = run(&w, config, container).await;
        let first = FIRST.to_string();
        let map = shell(&w, &id, "cat /proc/self/uid_map").await;
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", &first, "65536"]);
        assert_eq!(
            shell(&w, &id, "cat /proc/1/uid_map").await,
            map,
            "an exec is where the container is"
        );
        for path in [
            "/",
            "/bin/busybox",
            "/data/seed",
            "/mapped/file",
            "/image/passwd",
            "/proc/1",
        ] {
            assert_eq!(
                shell(&w, &id, &format!("stat -c %u:%g {path}")).await,
                "0:0",
                "{path}"
            );
        }
        shell(&w, &id, "echo new > /new; chown 1000:1000 /new; echo x > /mapped/new-$$; echo y > /data/new; mkdir /tmp/d").await;
        assert_eq!(shell(&w, &id, "stat -c %u /new").await, "1000");
        // On the host everything written is the mapped users', and what is mounted with a map the real ones'.
        let bundle = w.path().join("state/containers").join(&id).join("rootfs");
        assert_eq!(bundle.join("new").metadata().unwrap().uid(), FIRST + 1000);
        assert_eq!(
            w.path()
                .join("root/volumes")
                .join(&id)
                .join("0/new")
                .metadata()
                .unwrap()
                .uid(),
            FIRST
        );
        assert!(
            std::fs::read_dir(&host_dir)
                .unwrap()
                .all(|e| e.unwrap().metadata().unwrap().uid() == 0)
        );
        let status = w.pod_status(&pod).await.unwrap().status.unwrap();
        let options = status.linux.unwrap().namespaces.unwrap().options.unwrap();
        assert_eq!(options.userns_options.unwrap().uids[0].host_id, FIRST);
        if !host_network {
            assert!(!status.network.unwrap().ip.is_empty());
            shell(
                &w,
                &id,
                "ip link show eth0 && ip link set lo down && ip link set lo up || true",
            )
            .await;
        }
        w.kill9();
        w.restart(&[]).await;
        assert_eq!(shell(&w, &id, "cat /proc/self/uid_map").await, map);
    }
    w.finish().await;
}

#[tokio::test]
async fn mounts_are_read_only_all_the_way_down_when_asked() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let top = w.path().join("top");
    std::fs::create_dir_all(top.join("sub")).unwrap();
    let mut mount = std::process::Command::new("mount");
    assert!(
        mount
            .args(["-t", "tmpfs", "tmpfs"])
            .arg(top.join("sub"))
            .status()
            .unwrap()
            .success()
    );
    let mut container = w.container_config("main", SLEEP);
    let at = |path: &str, recursive: bool| v1::Mount {
        container_path: path.into(),
        host_path: top.display().to_string(),
        readonly: true,
        recursive_read_only: recursive,
        ..Default::default()
    };
    container.mounts = vec![at("/plain", false), at("/all", true)];
    container.mounts[0].mount_options = vec!["noexec".into()];
    assert!(
        w.node_status().await.features.unwrap().mount_options,
        "kubelet is told"
    );
    let (_, id) = run(&w, w.pod_config("rro", true), container).await;
    let output = w.exec(
        &id,
        &[
            "sh",
            "-c",
            "touch /plain/sub/a && ! touch /plain/a && ! touch /all/sub/b && ! touch /all/b",
        ],
        10,
    );
    assert_eq!(output.await.unwrap().exit_code, 0);
    assert!(
        shell(&w, &id, "grep ' /plain ' /proc/self/mounts")
            .await
            .contains("noexec")
    );
    let status = w.status(&id).await.unwrap();
    assert!(
        status
            .mounts
            .iter()
            .any(|m| m.container_path == "/all" && m.recursive_read_only)
    );
    let mut unmount = std::process::Command::new("umount");
    assert!(unmount.arg("-l").arg(top.join("sub")).status().unwrap().success());
    w.finish().await;
}
