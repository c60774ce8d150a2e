//! A small world for one test: a private root and state, a busybox image in the store, a running slipwayd, a client.
//!
//! The big suites are in tests/; these tests exist so that this crate can be changed with nothing else built but the
//! shim's two programs. They are looked for in `$SLIPWAY_BIN`, then beside slipwayd itself.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use slipway_cri_api::v1;
use slipway_cri_api::v1::image_service_client::ImageServiceClient;
use slipway_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use slipway_fault_api::v1::fault_client::FaultClient;
use slipway_fault_api::v1::{FailContainerRequest, FailContainerResponse};
use slipway_image::{Digest, OwnerKind, Store, UnpackOptions};
use tonic::transport::{Channel, Endpoint, Uri};

pub const IMAGE: &str = "slipway.test/busybox:1";

pub struct World {
    dir: tempfile::TempDir,
    tag: Tag,
    child: Option<Child>,
    pub runtime: RuntimeServiceClient<Channel>,
    pub image: ImageServiceClient<Channel>,
}

fn programs() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_BIN_EXE_slipwayd"))
        .parent()
        .map(Path::to_owned);
    let dir = std::env::var_os("SLIPWAY_BIN").map(PathBuf::from).or(beside)?;
    ["containerd-shim-slipway-v1", "slipway-runc"]
        .iter()
        .all(|p| dir.join(p).exists())
        .then_some(dir)
}

/// What is missing for tests that run the real thing; told loudly.
pub fn cannot_run() -> bool {
    let missing = if !rustix::process::geteuid().is_root() {
        "root"
    } else if !Path::new("/bin/busybox").exists() {
        "/bin/busybox (Debian: busybox-static)"
    } else if programs().is_none() {
        "containerd-shim-slipway-v1 and slipway-runc in $SLIPWAY_BIN"
    } else {
        return false;
    };
    let _ = writeln!(
        std::io::stderr(),
        "\n*** SKIPPED: this test needs {missing} ***\n"
    );
    true
}

impl World {
    pub async fn new(env: &[(&str, &str)]) -> World {
        World::with(env, None).await
    }

    /// With the root on a file system of its own, as large as said, where that is asked for.
    pub async fn with(env: &[(&str, &str)], root_size: Option<&str>) -> World {
        let dir = tempfile::Builder::new()
            .prefix("slipway-test-")
            .tempdir_in("/var/tmp")
            .unwrap();
        if let Some(size) = root_size {
            let root = dir.path().join("root");
            std::fs::create_dir(&root).unwrap();
            let options = format!("size={size},mode=700");
            let mut mount = Command::new("mount");
            mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&root);
            assert!(mount.status().unwrap().success());
        }
        import_busybox(dir.path());
        let tag = Tag::new();
        network(dir.path(), tag);
        let (child, channel) = start(dir.path(), env).await;
        World {
            dir,
            tag,
            child: Some(child),
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            image: ImageServiceClient::new(channel),
        }
    }

    /// The parent of its pods' cgroups.
    pub fn cgroup(&self) -> String {
        self.tag.cgroup()
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// What the next start finds in its configuration besides its own: first keys of `[runtime]`, then tables.
    pub fn configure(&self, more: &str) {
        std::fs::write(self.path().join("more.toml"), more).unwrap();
    }

    /// Another hand in the catalog, while slipwayd is not there.
    pub fn store(&self) -> Store {
        Store::open(&self.path().join("root"), OwnerKind::Cli).unwrap()
    }

    /// The shims of this world.
    pub fn shims(&self) -> Vec<rustix::process::Pid> {
        let state = self.path().join("state").display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&cmdline).into_owned();
            if cmdline.contains("containerd-shim-slipway-v1") && cmdline.contains(&state) {
                let pid = entry.file_name().to_string_lossy().parse().unwrap();
                found.push(rustix::process::Pid::from_raw(pid).unwrap());
            }
        }
        found
    }

    /// Kills the shims of this world with SIGKILL.
    pub fn kill_shims(&self) {
        for pid in self.shims() {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
    }

    pub async fn node_status(&self) -> v1::StatusResponse {
        let request = v1::StatusRequest { verbose: true };
        self.runtime.clone().status(request).await.unwrap().into_inner()
    }

    pub async fn update(
        &self,
        id: &str,
        resources: v1::LinuxContainerResources,
    ) -> Result<(), tonic::Status> {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.into(),
            linux: Some(resources),
            ..Default::default()
        };
        self.runtime
            .clone()
            .update_container_resources(request)
            .await
            .map(|_| ())
    }

    pub async fn stats(&self) -> Result<Vec<v1::ContainerStats>, tonic::Status> {
        let request = v1::ListContainerStatsRequest::default();
        Ok(self
            .runtime
            .clone()
            .list_container_stats(request)
            .await?
            .into_inner()
            .stats)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("slipwayd.log")).unwrap_or_default()
    }

    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn terminate(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.log());
    }

    pub async fn wait_end(&mut self) {
        let began = Instant::now();
        while let Some(child) = self.child.as_mut() {
            if child.try_wait().unwrap().is_some() {
                self.child = None;
            }
            assert!(began.elapsed() < Duration::from_secs(10), "slipwayd did not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn restart(&mut self, env: &[(&str, &str)]) {
        assert!(self.child.is_none());
        let (child, channel) = start(self.path(), env).await;
        self.child = Some(child);
        self.runtime = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20);
        self.image = ImageServiceClient::new(channel);
    }

    /// Has a container failed, through the socket for that.
    pub async fn fail(&self, request: FailContainerRequest) -> Result<FailContainerResponse, tonic::Status> {
        ask_to_fail(self.path().join("state/fault/fault.sock"), request).await
    }

    pub fn pod_config(&self, name: &str, host_network: bool) -> v1::PodSandboxConfig {
        let network = if host_network {
            v1::NamespaceMode::Node
        } else {
            v1::NamespaceMode::Pod
        };
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.path().join("logs").join(name).display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/{name}", self.tag.cgroup()),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        network: network as i32,
                        pid: v1::NamespaceMode::Container as i32,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub fn container_config(&self, name: &str, command: &[&str]) -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: IMAGE.into(),
                ..Default::default()
            }),
            command: command.iter().map(|s| (*s).to_owned()).collect(),
            log_path: format!("{name}/0.log"),
            ..Default::default()
        }
    }

    pub async fn run_pod(&self, config: v1::PodSandboxConfig) -> Result<String, tonic::Status> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        Ok(self
            .runtime
            .clone()
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id)
    }

    pub async fn create(&self, pod: &str, config: v1::ContainerConfig) -> Result<String, tonic::Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config),
            sandbox_config: None,
        };
        Ok(self
            .runtime
            .clone()
            .create_container(request)
            .await?
            .into_inner()
            .container_id)
    }

    pub async fn start(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StartContainerRequest {
            container_id: id.into(),
        };
        self.runtime.clone().start_container(request).await.map(|_| ())
    }

    pub async fn stop(&self, id: &str, timeout: i64) -> Result<(), tonic::Status> {
        let request = v1::StopContainerRequest {
            container_id: id.into(),
            timeout,
        };
        self.runtime.clone().stop_container(request).await.map(|_| ())
    }

    pub async fn remove(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::RemoveContainerRequest {
            container_id: id.into(),
        };
        self.runtime.clone().remove_container(request).await.map(|_| ())
    }

    pub async fn exec(
        &self,
        id: &str,
        cmd: &[&str],
        timeout: i64,
    ) -> Result<v1::ExecSyncResponse, tonic::Status> {
        let request = v1::ExecSyncRequest {
            container_id: id.into(),
            cmd: cmd.iter().map(|s| (*s).to_owned()).collect(),
            timeout,
        };
        Ok(self.runtime.clone().exec_sync(request).await?.into_inner())
    }

    pub async fn status(&self, id: &str) -> Result<v1::ContainerStatus, tonic::Status> {
        let request = v1::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        Ok(self
            .runtime
            .clone()
            .container_status(request)
            .await?
            .into_inner()
            .status
            .unwrap())
    }

    /// Of a running container's init.
    pub async fn container_pid(&self, id: &str) -> i64 {
        let request = v1::ContainerStatusRequest {
            container_id: id.into(),
            verbose: true,
        };
        let status = self.runtime.clone().container_status(request).await.unwrap();
        let info: serde_json::Value = serde_json::from_str(&status.into_inner().info["info"]).unwrap();
        info["pid"].as_i64().unwrap()
    }

    pub async fn pod_status(&self, id: &str) -> Result<v1::PodSandboxStatusResponse, tonic::Status> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: true,
        };
        Ok(self
            .runtime
            .clone()
            .pod_sandbox_status(request)
            .await?
            .into_inner())
    }

    pub async fn wait_exit(&self, id: &str) -> v1::ContainerStatus {
        let began = Instant::now();
        loop {
            let status = self.status(id).await.unwrap();
            if status.state == v1::ContainerState::ContainerExited as i32 {
                return status;
            }
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "it does not end: {status:?}\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn stop_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.runtime.clone().stop_pod_sandbox(request).await.map(|_| ())
    }

    pub async fn remove_pod(&self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.runtime.clone().remove_pod_sandbox(request).await.map(|_| ())
    }

    pub async fn pods(&self) -> Vec<v1::PodSandbox> {
        let request = v1::ListPodSandboxRequest::default();
        self.runtime
            .clone()
            .list_pod_sandbox(request)
            .await
            .unwrap()
            .into_inner()
            .items
    }

    pub async fn containers(&self) -> Vec<v1::Container> {
        let request = v1::ListContainersRequest::default();
        self.runtime
            .clone()
            .list_containers(request)
            .await
            .unwrap()
            .into_inner()
            .containers
    }

    /// Everything of this world that is on the machine, besides its own files.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mine = self.path().to_string_lossy().into_owned();
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        found.extend(
            mountinfo
                .lines()
                .filter(|l| l.contains(&mine))
                .map(|l| format!("mount {l}")),
        );
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            if pid != self.pid() && cmdline.contains(&mine) {
                found.push(format!("process {pid} {cmdline}"));
            }
        }
        for dir in ["state/pods", "state/containers", "root/volumes"] {
            for entry in std::fs::read_dir(self.path().join(dir))
                .into_iter()
                .flatten()
                .flatten()
            {
                found.push(format!("{}", entry.path().display()));
            }
        }
        for entry in std::fs::read_dir(self.path().join("ipam/slipwaytest"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry
                .file_name()
                .to_string_lossy()
                .parse::<std::net::IpAddr>()
                .is_ok()
            {
                found.push(format!("address {}", entry.path().display()));
            }
        }
        found
    }

    /// As [`World::leftovers`], once what is on its way out is out: a shim's socket closes a moment before its process.
    pub async fn left(&self) -> Vec<String> {
        let began = Instant::now();
        loop {
            let found = self.leftovers();
            if found.is_empty() || began.elapsed() > Duration::from_secs(3) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Removes every pod, ends slipwayd, and proves that nothing is left.
    pub async fn finish(mut self) {
        for pod in self.pods().await {
            self.remove_pod(&pod.id)
                .await
                .unwrap_or_else(|e| panic!("{e}\n{}", self.log()));
        }
        assert!(self.containers().await.is_empty());
        self.terminate();
        if std::env::var_os("SHOW_LOG").is_some() {
            eprintln!("{}", self.log());
        }
        let _ = Command::new("ip")
            .args(["link", "delete", &self.tag.bridge()])
            .stderr(Stdio::null())
            .status();
        self.unmount_root();
        let left = self.left().await;
        assert!(left.is_empty(), "left over: {left:#?}\n{}", self.log());
        self.remove_parent_cgroups();
    }
}

impl World {
    /// Takes away the cgroups above the pods', which are the caller's own as kubelet's are; the kernel refuses that while any
    /// pod's is below them.
    fn remove_parent_cgroups(&self) {
        let name = self.tag.cgroup();
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let group = hierarchy.path().join(name.trim_start_matches('/'));
            if let Err(error) = std::fs::remove_dir(&group)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                let below: Vec<_> = std::fs::read_dir(&group)
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|entry| entry.path())
                    .filter(|path| path.is_dir())
                    .collect();
                panic!("cgroups left over below {}: {error}: {below:?}", group.display());
            }
        }
    }

    fn unmount_root(&self) {
        let _ = Command::new("umount")
            .arg(self.path().join("root"))
            .stderr(Stdio::null())
            .status();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        self.kill9();
        self.unmount_root();
    }
}

/// One request of `slipway.fault.v1`, on a connection of its own.
pub async fn ask_to_fail(
    socket: PathBuf,
    request: FailContainerRequest,
) -> Result<FailContainerResponse, tonic::Status> {
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
    });
    let channel = Endpoint::from_static("http://slipwayd")
        .connect_with_connector(connector)
        .await
        .map_err(|e| tonic::Status::unavailable(format!("{e:?}")))?;
    let mut client = FaultClient::new(channel);
    Ok(client.fail_container(request).await?.into_inner())
}

async fn start(dir: &Path, env: &[(&str, &str)]) -> (Child, Channel) {
    let bin = programs().unwrap();
    let level =
        std::env::var("LOG_LEVEL").unwrap_or_else(|_| "debug,h2=info,tower=info,hyper=info".to_owned());
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("slipwayd.log"))
        .unwrap();
    let more = std::fs::read_to_string(dir.join("more.toml")).unwrap_or_default();
    std::fs::write(
        dir.join("config.toml"),
        format!(
            "[runtime]\nshim = \"{0}/containerd-shim-slipway-v1\"\nworker = \"{0}/slipway-runc\"\n{more}",
            bin.canonicalize().unwrap().display()
        ),
    )
    .unwrap();
    // A test that writes this file has rebooted the machine.
    let boot_id = dir.join("boot_id");
    // $SLIPWAYD names another build of it, for measuring.
    let program = std::env::var_os("SLIPWAYD").unwrap_or_else(|| env!("CARGO_BIN_EXE_slipwayd").into());
    #[allow(clippy::zombie_processes, reason = "who gets the child waits for it")]
    let mut child = Command::new(program)
        .arg("--config")
        .arg(dir.join("config.toml"))
        .arg("--root")
        .arg(dir.join("root"))
        .arg("--state")
        .arg(dir.join("state"))
        .arg("--cni-conf-dir")
        .arg(dir.join("cni"))
        .arg("--cni-bin-dir")
        .arg(dir.join("cni-bin"))
        .args(["--cni-bin-dir", "/opt/cni/bin", "--cni-bin-dir", "/usr/lib/cni"])
        .args(["--log-level", &level])
        .args(boot_id.exists().then_some("--boot-id-file"))
        .args(boot_id.exists().then_some(&boot_id))
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let socket = dir.join("state/slipwayd.sock");
    let began = Instant::now();
    loop {
        let socket = socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(socket).await?)) }
        });
        if let Ok(channel) = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await
        {
            return (child, channel);
        }
        if began.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!(
                "slipwayd does not listen: {}",
                std::fs::read_to_string(dir.join("slipwayd.log")).unwrap()
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What names a world's things outside its directory, so that worlds of one process stand side by side.
#[derive(Clone, Copy)]
struct Tag {
    process: u32,
    world: u32,
}

impl Tag {
    fn new() -> Tag {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Tag {
            process: std::process::id(),
            world: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn cgroup(self) -> String {
        format!("/slipway-test-{}-{}", self.process, self.world)
    }

    fn bridge(self) -> String {
        format!("swt{}-{}", self.process % 1_000_000, self.world)
    }

    fn subnet(self) -> String {
        let n = (self.process * 31 + self.world) % (50 * 250);
        format!("10.{}.{}.0/24", 200 + n / 250, n % 250)
    }
}

/// A bridge network of this world's own.
fn network(dir: &Path, tag: Tag) {
    let (bridge, subnet) = (tag.bridge(), tag.subnet());
    let conflist = format!(
        r#"{{"cniVersion":"1.0.0","name":"slipwaytest","plugins":[
            {{"type":"bridge","bridge":"{bridge}","isGateway":true,"ipMasq":false,
              "ipam":{{"type":"host-local","dataDir":"{0}/ipam","ranges":[[{{"subnet":"{subnet}"}}]]}}}},
            {{"type":"stubborn"}}]}}"#,
        dir.display()
    );
    // A plugin whose DEL fails while the file `stubborn` is there, and hangs while `hang` is.
    let stubborn = format!(
        "#!/usr/bin/env python3\nimport json, os, sys, time\n\
         if os.environ['CNI_COMMAND'] == 'VERSION':\n    print('{{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}}'); sys.exit()\n\
         conf = json.load(sys.stdin)\n\
         while os.environ['CNI_COMMAND'] == 'DEL' and os.path.exists('{0}/hang'):\n    time.sleep(0.05)\n\
         if os.environ['CNI_COMMAND'] == 'DEL' and os.path.exists('{0}/stubborn'):\n\
         \x20   print(json.dumps(dict(cniVersion='1.0.0', code=999, msg='I will not'))); sys.exit(1)\n\
         if os.environ['CNI_COMMAND'] == 'ADD':\n    print(json.dumps(conf['prevResult']))\n",
        dir.display()
    );
    std::fs::create_dir_all(dir.join("cni-bin")).unwrap();
    std::fs::write(dir.join("cni-bin/stubborn"), stubborn).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.join("cni-bin/stubborn"), mode).unwrap();
    std::fs::create_dir_all(dir.join("cni")).unwrap();
    std::fs::write(dir.join("cni/10-test.conflist"), conflist).unwrap();
}

/// Writes a docker archive with busybox and imports it into the store.
fn import_busybox(dir: &Path) {
    let rootfs = dir.join("rootfs");
    for sub in ["bin", "etc", "tmp", "data"] {
        std::fs::create_dir_all(rootfs.join(sub)).unwrap();
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    let list = Command::new("/bin/busybox")
        .arg("--list")
        .output()
        .unwrap()
        .stdout;
    for applet in String::from_utf8(list)
        .unwrap()
        .lines()
        .filter(|a| *a != "busybox")
    {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        rootfs.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/tmp:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(
        rootfs.join("etc/group"),
        "root:x:0:\napp:x:1000:\nvideo:x:44:app\n",
    )
    .unwrap();
    std::fs::write(rootfs.join("data/seed"), "from the image\n").unwrap();
    let tar = |from: &Path, to: &Path| {
        let status = Command::new("tar")
            .arg("-C")
            .arg(from)
            .arg("-cf")
            .arg(to)
            .arg(".")
            .status()
            .unwrap();
        assert!(status.success());
    };
    let archive = dir.join("archive");
    std::fs::create_dir_all(&archive).unwrap();
    tar(&rootfs, &archive.join("layer.tar"));
    let diff_id = Digest::of(&std::fs::read(archive.join("layer.tar")).unwrap());
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["PATH=/bin"],"Cmd":["sh"],"Volumes":{{"/data":{{}}}}}},
            "rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}},"history":[{{"created_by":"test"}}]}}"#
    );
    let name = format!("{}.json", Digest::of(config.as_bytes()).hex());
    std::fs::write(archive.join(&name), &config).unwrap();
    let manifest = format!(r#"[{{"Config":"{name}","RepoTags":["{IMAGE}"],"Layers":["layer.tar"]}}]"#);
    std::fs::write(archive.join("manifest.json"), manifest).unwrap();
    tar(&archive, &dir.join("image.tar"));
    let store = Store::open(&dir.join("root"), OwnerKind::Cli).unwrap();
    let mut file = std::fs::File::open(dir.join("image.tar")).unwrap();
    store.import(&mut file, &UnpackOptions::default()).unwrap();
    for path in [rootfs, archive] {
        std::fs::remove_dir_all(path).unwrap();
    }
}
