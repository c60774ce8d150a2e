//! What holds up and must not: plugins that hang, host paths that do not answer, mounts that a killed worker left, files that
//! a container fills, and the mask that slipwayd is started with. With the real shim, store and CNI plugins, as root.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]
#![allow(dead_code, reason = "the world has more than is used")]

mod world;

use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use slipway_cri_api::v1;
use world::{World, cannot_run};

const SLEEP: &[&str] = &["sleep", "1000"];

fn bind(from: &Path, to: &str) -> v1::Mount {
    v1::Mount {
        container_path: to.into(),
        host_path: from.display().to_string(),
        ..Default::default()
    }
}

#[tokio::test]
async fn root_after_a_reboot_a_plugin_that_hangs_does_not_keep_the_node_down() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let mut pods = Vec::new();
    for name in ["a", "b"] {
        pods.push(w.run_pod(w.pod_config(name, false)).await.unwrap());
    }
    w.kill9();
    w.kill_shims();
    std::fs::write(w.path().join("hang"), "").unwrap();
    let began = Instant::now();
    std::fs::write(w.path().join("boot_id"), "another\n").unwrap();
    w.restart(&[]).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let seen = w.pods().await;
    assert_eq!(seen.len(), 2);
    let not_ready = v1::PodSandboxState::SandboxNotready as i32;
    assert!(seen.iter().all(|pod| pod.state == not_ready), "{seen:?}");
    // Verbs do not wait for it either.
    let began = Instant::now();
    w.stop_pod(&pods[0]).await.unwrap();
    w.remove_pod(&pods[0]).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    std::fs::remove_file(w.path().join("hang")).unwrap();
    // No reboot took the cgroups away.
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        for name in ["a", "b"] {
            let parent = w.cgroup().trim_start_matches('/').to_owned();
            let _ = std::fs::remove_dir(hierarchy.path().join(parent).join(name));
        }
    }
    w.remove_pod(&pods[1]).await.unwrap();
    let began = Instant::now();
    while w.leftovers().iter().any(|left| left.starts_with("address")) {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", w.leftovers());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    w.finish().await;
}

/// Reserved addresses, as `host-local` keeps them.
fn reserved(w: &World) -> Vec<std::path::PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(w.path().join("ipam/slipwaytest"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.parse::<std::net::IpAddr>().is_ok()
        })
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn root_after_a_power_cut_no_address_is_lost() {
    if cannot_run() {
        return;
    }
    let mut w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("torn", false)).await.unwrap();
    // Made in this boot, by whomever: it stays, whoever starts again.
    let [of_the_pod] = &reserved(&w)[..] else {
        panic!("{:?}", reserved(&w))
    };
    let others = of_the_pod.with_file_name("10.0.0.200");
    std::fs::write(&others, "another\r\neth0").unwrap();
    w.kill9();
    std::fs::remove_file(w.path().join("state/addresses")).unwrap();
    w.restart(&[]).await;
    swept(&w).await;
    assert_eq!(reserved(&w), [others.clone(), of_the_pod.clone()]);
    // What a cut leaves of files that nobody has synced, and of one whose pod's record was lost with it.
    w.kill9();
    w.kill_shims();
    std::fs::write(of_the_pod, "").unwrap();
    std::fs::remove_file(w.path().join("state/addresses")).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await; // the clock of files ticks every few milliseconds
    std::fs::write(w.path().join("boot_id"), "another\n").unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let early = others.with_file_name("10.0.0.201");
    std::fs::write(&early, "started before slipwayd\r\neth0").unwrap();
    w.restart(&[]).await;
    swept(&w).await;
    assert_eq!(reserved(&w), std::slice::from_ref(&early));
    // Once a boot: a clock that is set makes nothing older than it is.
    std::fs::File::open(&early)
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH)
        .unwrap();
    w.kill9();
    w.restart(&[]).await;
    let next = w.run_pod(w.pod_config("next", false)).await.unwrap();
    assert!(early.exists());
    std::fs::remove_file(&early).unwrap();
    for id in [&pod, &next] {
        w.stop_pod(id).await.unwrap();
        w.remove_pod(id).await.unwrap();
    }
    // No reboot took its cgroup away.
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let parent = w.cgroup().trim_start_matches('/').to_owned();
        let _ = std::fs::remove_dir(hierarchy.path().join(parent).join("torn"));
    }
    w.finish().await;
}

/// Waits until slipwayd has looked at the network's addresses since it was started.
async fn swept(w: &World) {
    let began = Instant::now();
    while !w.path().join("state/addresses").exists() {
        assert!(began.elapsed() < Duration::from_secs(20), "{}", w.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A file system that never answers.
struct Hung {
    _device: std::fs::File,
    at: std::path::PathBuf,
}

impl Hung {
    fn new(at: &Path) -> Option<Hung> {
        std::fs::create_dir(at).unwrap();
        let device = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .ok()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("hung", at, "fuse", MountFlags::empty(), options.as_c_str()).ok()?;
        Some(Hung {
            _device: device,
            at: at.to_owned(),
        })
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn root_a_host_path_that_does_not_answer_fails_its_container_and_nothing_else() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let Some(hung) = Hung::new(&w.path().join("hung")) else {
        let _ = writeln!(
            std::io::stderr(),
            "\n*** SKIPPED: this test needs /dev/fuse ***\n"
        );
        return w.finish().await;
    };
    let pod = w.run_pod(w.pod_config("held-up", true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    let mut config = w.container_config("stuck", SLEEP);
    let path = hung.at.join("data");
    config.mounts.push(bind(&path, "/data"));
    let (created, stopped) = tokio::join!(w.create(&pod, config.clone()), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let began = Instant::now();
        let stopping = w.stop_pod(&pod);
        let ended = async {
            w.wait_exit(&id).await;
            began.elapsed()
        };
        let (stopped, ended) = tokio::join!(stopping, ended);
        assert!(
            ended < Duration::from_secs(5),
            "what runs ends at once: {ended:?}"
        );
        stopped
    });
    let error = created.unwrap_err();
    assert!(error.message().contains("hung/data"), "{error}");
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    stopped.unwrap();
    drop(hung);
    w.finish().await;
}

#[tokio::test]
async fn root_a_container_cannot_fill_the_hosts_run_through_the_pods_files() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let pod = w.run_pod(w.pod_config("greedy", true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    for file in ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"] {
        let fill = format!("head -c 8388608 /dev/zero >> {file}");
        let done = w.exec(&id, &["sh", "-c", &fill], 20).await.unwrap();
        assert_ne!(done.exit_code, 0, "{file}");
    }
    let kept = ["hosts", "resolv.conf", "hostname"].map(|name| {
        std::fs::metadata(w.path().join("state/pods").join(&pod).join("etc").join(name))
            .unwrap()
            .len()
    });
    assert!(kept.iter().sum::<u64>() <= 1 << 20, "{kept:?}");
    w.finish().await;
}

#[tokio::test]
async fn root_what_a_killed_worker_left_mounted_is_not_removed_with_the_bundle() {
    if cannot_run() {
        return;
    }
    let w = World::new(&[]).await;
    let data = w.path().join("precious");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("file"), "x").unwrap();
    let pod = w.run_pod(w.pod_config("left", true)).await.unwrap();
    let id = w.create(&pod, w.container_config("main", SLEEP)).await.unwrap();
    w.start(&id).await.unwrap();
    let planted = [
        w.path()
            .join("state/containers")
            .join(&id)
            .join(format!("state/{id}.work/mounts/0")),
        w.path().join("root/volumes").join(&id).join("9"),
        w.path().join("state/pods").join(&pod).join("kept"),
    ];
    for at in &planted {
        std::fs::create_dir_all(at).unwrap();
        rustix::mount::mount_bind(&data, at).unwrap();
    }
    w.remove(&id).await.unwrap();
    w.remove_pod(&pod).await.unwrap();
    assert!(planted.iter().all(|at| !at.exists()));
    assert_eq!(std::fs::read_to_string(data.join("file")).unwrap(), "x");
    w.finish().await;
}

#[tokio::test]
async fn root_a_pod_that_could_not_be_undone_is_not_said_to_be_stopped() {
    if cannot_run() {
        return;
    }
    let failpoints = "run_pod_sandbox.after_files=error,stop_pod_sandbox.after_kill=error";
    let mut w = World::new(&[("SLIPWAY_FAILPOINTS", failpoints)]).await;
    w.run_pod(w.pod_config("half", true)).await.unwrap_err();
    let [pod] = &w.pods().await[..] else {
        panic!("it is still there: {:?}", w.pods().await)
    };
    w.stop_pod(&pod.id).await.unwrap_err();
    w.kill9();
    w.restart(&[]).await;
    w.stop_pod(&pod.id).await.unwrap();
    w.finish().await;
}
