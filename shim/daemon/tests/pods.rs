//! Pods around containers: namespaces, the built-in init, stopping and releasing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use slipway_shim_client::{Code, pod};
use std::path::Path;
use std::time::Duration;

fn own(request: &mut pod::CreatePodRequest) {
    request.net = pod::NamespaceMode::Pod.into();
    request.ipc = pod::NamespaceMode::Pod.into();
    request.uts = pod::NamespaceMode::Pod.into();
}

fn node(request: &mut pod::CreatePodRequest) {
    request.net = pod::NamespaceMode::Node.into();
    request.ipc = pod::NamespaceMode::Node.into();
    request.uts = pod::NamespaceMode::Node.into();
}

fn join(config: &mut serde_json::Value, kinds: &[(&str, &str)]) {
    let mut namespaces = vec![serde_json::json!({"type": "mount"})];
    for (kind, path) in kinds {
        namespaces.push(serde_json::json!({"type": kind, "path": path}));
    }
    config["linux"]["namespaces"] = namespaces.into();
}

#[tokio::test]
async fn root_containers_share_the_pods_namespaces() {
    let Some(pod) = support::pod().await else { return };
    let created = pod.create_pod(own).await;
    let path = |kind: &str| {
        let found = created.namespaces.iter().find(|n| n.kind == kind);
        found
            .map(|n| n.path.clone())
            .unwrap_or_else(|| panic!("no {kind} namespace"))
    };
    let (net, ipc, uts) = (path("net"), path("ipc"), path("uts"));
    let mut container = pod.container("c", "");
    container.bundle = pod.bundle("c", "cat /proc/sys/kernel/hostname; for n in net ipc uts; do stat -Lc %i /proc/self/ns/$n; done", |config| {
        join(config, &[("network", &net), ("ipc", &ipc), ("uts", &uts)]);
        config["process"]["args"] = serde_json::json!(["/bin/busybox", "sh", "-c",
            "cat /proc/sys/kernel/hostname; for n in net ipc uts; do busybox stat -Lc %i /proc/self/ns/$n; done"]);
    });
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    assert_eq!(pod.exit_of("c").await.code, 0);
    let inode = |path: &str| format!("stdout F {}", rustix::fs::stat(path).unwrap().st_ino);
    assert_eq!(
        pod.log_lines("c"),
        [
            "stdout F test-pod".to_owned(),
            inode(&net),
            inode(&ipc),
            inode(&uts)
        ]
    );
    pod.shim.stop_pod().await.unwrap();
    assert!(
        Path::new(&net).exists() && !Path::new(&ipc).exists(),
        "net stays until it is released"
    );
    pod.shim.stop_pod().await.unwrap();
    pod.finish().await;
}

#[tokio::test]
async fn root_a_shared_pid_namespace_has_an_init_that_reaps_and_dies_with_the_pod() {
    let Some(pod) = support::pod().await else { return };
    let created = pod
        .create_pod(|r| {
            own(r);
            r.pid = pod::NamespaceMode::Pod.into();
        })
        .await;
    assert!(created.init_pid > 0);
    let pid_ns = created
        .namespaces
        .iter()
        .find(|n| n.kind == "pid")
        .unwrap()
        .path
        .clone();
    for id in ["a", "b"] {
        let mut container = pod.container(id, "");
        container.bundle = pod.bundle(id, "(setsid sleep 1000 &) ; sleep 1000", |config| {
            join(config, &[("pid", &pid_ns)]);
        });
        pod.shim.create(container).await.unwrap();
        pod.shim.start(id).await.unwrap();
    }
    let (_, out) = pod
        .exec(
            "a",
            "ps | grep -c '[s]leep 1000'; sleep 0.1; ps | grep -c '[s]leep 1000'",
        )
        .await;
    assert_eq!(out.lines().last(), Some("4"), "{out}");
    pod.shim.kill("a", 9, false).await.unwrap();
    assert_eq!(pod.exit_of("a").await.code, 137);
    let (_, out) = pod.exec("b", "ps | grep -c '[s]leep 1000'").await;
    assert_eq!(out, "2\n", "what a had double-forked died with it, b's runs");
    let again = pod.shim.create_pod(Default::default()).await.unwrap_err();
    assert!(again.is(Code::AlreadyExists), "{again}");
    pod.finish().await;
    assert!(!Path::new(&format!("/proc/{}", created.init_pid)).exists());
}

#[tokio::test]
async fn root_an_init_that_dies_is_told_and_takes_the_containers_along() {
    let Some(pod) = support::pod().await else { return };
    let created = pod
        .create_pod(|r| {
            node(r);
            r.pid = pod::NamespaceMode::Pod.into();
        })
        .await;
    let pid_ns = created
        .namespaces
        .iter()
        .find(|n| n.kind == "pid")
        .unwrap()
        .path
        .clone();
    let mut container = pod.container("c", "");
    container.bundle = pod.bundle("c", "sleep 1000", |config| join(config, &[("pid", &pid_ns)]));
    pod.shim.create(container).await.unwrap();
    pod.shim.start("c").await.unwrap();
    let init = rustix::process::Pid::from_raw(created.init_pid as i32).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    assert_eq!(pod.exit_of("c").await.code, 137);
    support::until("the init's end is told", || true).await;
    let mut events = Vec::new();
    while events.len() < 2 {
        events = pod.shim.events(0, Duration::from_secs(1)).await.unwrap();
    }
    assert!(events.iter().any(|e| e.container_id.is_empty()), "{events:?}");
    pod.finish().await;
}

#[tokio::test]
async fn root_a_pod_that_cannot_be_made_leaves_nothing_and_can_be_tried_again() {
    let Some(pod) = support::pod().await else { return };
    let mut request = pod::CreatePodRequest {
        pod_id: pod.id.clone(),
        state_dir: pod.dir.path().to_str().unwrap().to_owned(),
        hostname: "h".into(),
        cgroup_parent: pod.cgroup.clone(),
        pid: pod::NamespaceMode::None.into(),
        ..Default::default()
    };
    own(&mut request);
    request.sysctls.insert("kernel.panic".into(), "1".into());
    let error = pod.shim.create_pod(request.clone()).await.unwrap_err();
    assert!(
        error.is(Code::InvalidArgument) && error.to_string().contains("kernel.panic"),
        "{error}"
    );
    pod.assert_nothing_left();
    request.sysctls.clear();
    request.sysctls.insert("net.ipv4.ip_forward".into(), "1".into());
    pod.shim.create_pod(request).await.unwrap();
    pod.finish().await;
}

#[tokio::test]
async fn root_a_pods_limits_are_set_on_its_cgroup() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(|r| {
        node(r);
        r.resources_json = r#"{"pids":{"limit":77}}"#.into();
    })
    .await;
    let stats = pod.shim.stats(vec![]).await.unwrap();
    assert_eq!(stats.pod.unwrap().pids_limit, 77);
    pod.finish().await;
}

#[tokio::test]
async fn root_of_two_pods_under_one_parent_one_is_stopped_and_the_other_runs_on() {
    let Some(a) = support::pod().await else { return };
    let Some(mut b) = support::pod().await else { return };
    b.cgroup = a.cgroup.clone();
    for pod in [&a, &b] {
        pod.create_pod(node).await;
    }
    a.run("of-a", "sleep 1000").await;
    b.run("of-b", "sleep 1000").await;
    let parent = a.cgroup.clone();
    let state_of_b = |pod: &support::TestPod| {
        let shim = pod.shim.clone();
        async move { shim.info().await.unwrap().containers[0].state() }
    };
    // As `finish`, but the parent is b's still.
    a.shim.stop_pod().await.unwrap();
    a.shim.delete("of-a").await.unwrap();
    a.shim.release_pod().await.unwrap();
    a.shim.shutdown().await.unwrap();
    assert_eq!(state_of_b(&b).await, pod::ContainerState::Running);
    assert!(!support::cgroups_of(&format!("{parent}/of-b")).is_empty());
    b.finish().await;
    assert!(
        support::cgroups_of(&parent).is_empty(),
        "the last one out leaves nothing"
    );
}

#[tokio::test]
async fn root_what_a_killed_worker_left_mounted_is_not_removed_with_the_container() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(node).await;
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("precious"), "x").unwrap();
    for (id, killed) in [("c", false), ("d", true)] {
        pod.run(id, "sleep 1000").await;
        let left = pod.path(&format!("bundle-{id}/state/{id}.work/mounts/0"));
        std::fs::create_dir_all(&left).unwrap();
        rustix::mount::mount_bind(data.path(), &left).unwrap();
        if killed {
            continue;
        }
        pod.shim.kill(id, 9, true).await.unwrap();
        pod.exit_of(id).await;
        pod.shim.delete(id).await.unwrap();
        assert!(!left.exists());
        assert!(data.path().join("precious").exists());
    }
    // And by the clean-up after the shim's own death.
    let shim = rustix::process::Pid::from_raw(pod.shim.info().await.unwrap().pid as i32).unwrap();
    rustix::process::kill_process(shim, rustix::process::Signal::KILL).unwrap();
    pod.shim.closed().await;
    pod.launcher.cleanup(pod.dir.path(), true).await.unwrap();
    assert!(!pod.path("bundle-d/state").exists());
    assert!(data.path().join("precious").exists());
    pod.assert_nothing_left();
}

#[tokio::test]
async fn root_a_container_joins_the_pid_namespace_of_one_that_lives() {
    let Some(pod) = support::pod().await else { return };
    pod.create_pod(node).await;
    let target = pod.run("target", "sleep 1000").await;
    let debug = |id: &str, target: &str| {
        let mut container = pod.container(id, "");
        container.bundle = pod.bundle(id, "ps | grep '[s]leep 1000'", |config| {
            config["linux"]["namespaces"] = serde_json::json!([{"type": "mount"}, {"type": "pid"}]);
        });
        container.pid_target = Some(target.to_owned());
        container
    };
    let pid = pod.shim.create(debug("debug", "target")).await.unwrap();
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
    assert_eq!(namespace(pid), namespace(target));
    pod.shim.start("debug").await.unwrap();
    assert_eq!(pod.exit_of("debug").await.code, 0);
    let lines = pod.log_lines("debug");
    assert!(lines.iter().any(|l| l.contains("sleep 1000")), "{lines:?}");

    // Whatever has its pid by now: that of one which has ended leads nowhere.
    pod.shim.kill("target", 9, false).await.unwrap();
    pod.exit_of("target").await;
    for gone in ["target", "nobody"] {
        let error = pod.shim.create(debug("late", gone)).await.unwrap_err();
        assert!(
            error.is_not_found() && error.to_string().contains(gone),
            "{error}"
        );
    }
    pod.finish().await;
}
