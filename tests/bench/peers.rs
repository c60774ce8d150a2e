//! The two runtimes under measurement, each with a root, socket, bridge, subnet and cgroup parent of its own.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::cri::Cri;
use harness::image::{BUSYBOX, run_slipway};
use harness::{Daemon, Lab, Setup, cmd, lab, leftovers};

/// What containerd's sandboxes run.
const SANDBOX: &str = "slipway.test/sandbox:1";

/// A runtime under measurement.
pub struct Peer {
    /// A client of it.
    pub cri: Cri,
    /// The pid of its daemon.
    pub pid: u32,
    /// What the command lines of its shims contain.
    shim: (&'static str, PathBuf),
    inner: Inner,
}

enum Inner {
    Slipway(Box<Daemon>),
    Containerd { child: Child, socket: PathBuf },
}

/// A directory in memory, where what does not survive a reboot lies on a node (`/run`). Gone when dropped.
pub struct InMemory(PathBuf);

impl InMemory {
    /// Makes `dir` one.
    pub fn new(dir: PathBuf) -> Result<InMemory> {
        std::fs::create_dir_all(&dir)?;
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", &dir, "tmpfs", flags, Some(c"mode=0700"))
            .with_context(|| format!("mounting a tmpfs on {}", dir.display()))?;
        Ok(InMemory(dir))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::empty());
    }
}

/// The state directories of both runtimes, in memory.
pub fn state_in_memory(lab: &Lab) -> Result<[InMemory; 2]> {
    Ok([
        InMemory::new(lab.join("state"))?,
        InMemory::new(lab.join("ctrd/run"))?,
    ])
}

/// The bridges both made.
pub fn bridges(lab: &Lab) -> [String; 2] {
    [lab.bridge(), format!("ct{}", lab.tag())]
}

/// Where both look for devices.
pub fn cdi(lab: &Lab) -> PathBuf {
    lab.join("cdi")
}

/// Ours.
pub async fn slipway(lab: &Lab) -> Result<Peer> {
    let setup = Setup {
        args: vec!["--log-level".into(), "warn".into()],
        config: format!("[cdi]\nspec_dirs = [{:?}]\n", cdi(lab)),
        ..Default::default()
    };
    let d = Daemon::start(lab, &setup).await?;
    Ok(Peer {
        cri: d.cri().await?,
        pid: d.pid(),
        shim: ("containerd-shim-slipway-v1", d.state().to_owned()),
        inner: Inner::Slipway(Box::new(d)),
    })
}

/// containerd 2.4 with runc, its sandbox image made of busybox.
pub async fn containerd(lab: &Lab) -> Result<Peer> {
    let dir = lab.join("ctrd");
    let socket = dir.join("run/containerd.sock");
    let bridge = &bridges(lab)[1];
    let subnet = lab.second_subnet();
    let conf = serde_json::json!({
        "cniVersion": "1.0.0", "name": format!("{}-ct", lab.network()),
        "plugins": [
            { "type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
              "ipam": { "type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{ "subnet": subnet }]],
                        "routes": [{ "dst": "0.0.0.0/0" }] } },
            { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }
        ]
    });
    lab.write("ctrd/cni/10.conflist", serde_json::to_vec(&conf)?)?;
    let config = lab.write(
        "ctrd/config.toml",
        format!(
            "version = 3
root = '{root}'
state = '{state}'
disabled_plugins = ['io.containerd.nri.v1.nri', 'io.containerd.snapshotter.v1.devmapper']
[grpc]
  address = '{socket}'
[ttrpc]
  address = '{socket}.ttrpc'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{SANDBOX}'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '{certs}'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{cni}']
  conf_dir = '{conf}'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  cdi_spec_dirs = ['{cdi}']
",
            root = dir.join("root").display(),
            state = dir.join("run").display(),
            socket = socket.display(),
            cdi = cdi(lab).display(),
            certs = dir.join("certs").display(),
            cni = lab::cni_bin().display(),
            conf = dir.join("cni").display(),
        ),
    )?;
    let log = std::fs::File::create(dir.join("log"))?;
    let path = format!(
        "{}:/usr/sbin:/usr/bin:/sbin:/bin",
        lab::cache().join("tools/bin").display()
    );
    let child = Command::new(lab::tool("containerd"))
        .arg("--config")
        .arg(config)
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting containerd (tests/setup/go-tools.sh containerd builds it)")?;
    let began = Instant::now();
    let cri = loop {
        if let Ok(c) = Cri::connect(&socket).await
            && c.runtime
                .clone()
                .status(harness::v1::StatusRequest::default())
                .await
                .is_ok()
        {
            break c;
        }
        if began.elapsed() > Duration::from_secs(20) {
            bail!(
                "containerd does not answer:\n{}",
                std::fs::read_to_string(dir.join("log"))?
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    // A sandbox's container has to go on for as long as its pod does.
    let context = lab.join("sandbox-context");
    lab.write(
        "sandbox-context/Dockerfile",
        format!("FROM {BUSYBOX}\nCMD [\"sleep\", \"1000000\"]\n"),
    )?;
    run_slipway(lab, &["build", "-t", SANDBOX, &context.display().to_string()])?.ok()?;
    let address = socket.display().to_string();
    for (image, file) in [(BUSYBOX, "busybox.tar"), (SANDBOX, "sandbox.tar")] {
        let tar = lab.join(file).display().to_string();
        run_slipway(lab, &["save", "-o", &tar, image])?.ok()?;
        let import = ["--address", &address, "-n", "k8s.io", "images", "import", &tar];
        cmd::run(
            &mut cmd::command(lab::tool("ctr"), import),
            Duration::from_secs(60),
        )?
        .ok()?;
    }
    let pid = child.id();
    Ok(Peer {
        cri,
        pid,
        shim: ("containerd-shim-runc-v2", dir),
        inner: Inner::Containerd { child, socket },
    })
}

impl Peer {
    /// The containerd socket, where this is containerd.
    pub fn containerd_socket(&self) -> Option<&PathBuf> {
        match &self.inner {
            Inner::Containerd { socket, .. } => Some(socket),
            Inner::Slipway(_) => None,
        }
    }

    /// Pids of its shims.
    pub fn shims(&self) -> Vec<u32> {
        leftovers::processes_naming(&self.shim.1)
            .into_iter()
            .filter(|(_, c)| c.contains(self.shim.0))
            .map(|(p, _)| p)
            .collect()
    }

    /// Proportional set sizes of the daemon and of all its shims, in KiB.
    pub fn pss(&self) -> (f64, Vec<f64>) {
        (pss(self.pid), self.shims().into_iter().map(pss).collect())
    }

    /// CPU seconds of the daemon and its ended children so far.
    pub fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let after = stat.rsplit(") ").next().unwrap_or_default();
        // utime, stime, cutime, cstime: fields 14 to 17 of proc(5), 11 to 14 after the command.
        after
            .split(' ')
            .skip(11)
            .take(4)
            .filter_map(|f| f.parse::<f64>().ok())
            .sum::<f64>()
            / 100.0
    }

    /// Removes every pod and ends the daemon.
    pub async fn stop(&mut self) -> Result<()> {
        for p in self.cri.pods().await? {
            self.cri.remove_pod(&p.id).await?;
        }
        match &mut self.inner {
            Inner::Slipway(d) => d.stop(),
            Inner::Containerd { child, .. } => {
                if let Some(pid) = i32::try_from(child.id())
                    .ok()
                    .and_then(rustix::process::Pid::from_raw)
                {
                    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
                }
                child.wait()?;
                Ok(())
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Inner::Containerd { child, .. } = &mut self.inner {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn pss(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix("Pss:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").trim().parse().ok())
        .unwrap_or(0.0)
}
