//! One node: its runtime with a root and state of its own, and the kubelet on it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use slipway_fake_gpu::{Driver, Topology};

use super::Cluster;
use super::pki::Pki;
use crate::cri::Cri;
use crate::{image, lab};

/// kubelet's socket for device plugins is in one place, whatever its root is: each kubelet of this machine sees a folder of
/// its own there. The folder, then the program with its arguments.
const PLUGINS_OF_ITS_OWN: &str = "at=/var/lib/kubelet/device-plugins; mkdir -p $at; \
    mount --make-private $(stat -c %m $at); mount --bind $1 $at; shift; exec \"$@\"";

impl Cluster {
    /// Node `n`'s directory.
    pub fn node_dir(&self, n: usize) -> PathBuf {
        self.dir().join(format!("node{n}"))
    }

    /// The CRI socket of node `n`.
    pub fn socket(&self, n: usize) -> PathBuf {
        let name = if self.has_containerd(n) {
            "containerd.sock"
        } else {
            "slipwayd.sock"
        };
        self.node_dir(n).join("state").join(name)
    }

    /// The name of node `n`'s runtime among the processes.
    pub fn runtime(&self, n: usize) -> String {
        let program = if self.has_containerd(n) {
            "containerd"
        } else {
            "slipwayd"
        };
        format!("{program}{n}")
    }

    /// `slipway ARGS` on node `n`'s store.
    pub fn slipway(&self, n: usize, args: &[&str]) -> std::process::Command {
        let mut c = image::slipway(
            &self.node_dir(n).join("root"),
            &self.node_dir(n).join("state"),
            args,
        );
        c.arg("--certs-dir").arg(self.node_dir(n).join("certs.d"));
        c
    }

    pub(super) fn prepare_node(&self, n: usize, pki: &Pki) -> Result<()> {
        let dir = self.node_dir(n);
        for d in [
            "root", "state", "static", "podlogs", "kubelet", "plugins", "certs.d", "cdi",
        ] {
            std::fs::create_dir_all(dir.join(d))?;
        }
        self.net().write_cni(n, &dir.join("cni"), &dir.join("ipam"))?;
        let at = |p: &str| dir.join(p).display().to_string();
        let name = &self.net().name;
        let runtime = if self.has_containerd(n) {
            self.containerd_config(n)
        } else {
            self.slipwayd_config(n)
        };
        std::fs::write(dir.join("config.toml"), runtime).context("writing config.toml")?;
        let kubelet = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\naddress: 0.0.0.0\nport: {port}\nhealthzPort: {healthz}\nauthentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {ca}}}}}\nauthorization: {{mode: Webhook}}\nfailCgroupV1: false\ncgroupDriver: cgroupfs\ncgroupRoot: /{name}/node{n}\noomScoreAdj: 0\nfailSwapOn: false\ncontainerRuntimeEndpoint: unix://{socket}\nimageServiceEndpoint: unix://{socket}\nstaticPodPath: {static_pods}\nresolvConf: /etc/resolv.conf\nclusterDNS: [{dns}]\nclusterDomain: cluster.local\nmakeIPTablesUtilChains: false\nevictionHard: {{memory.available: 100Mi, nodefs.available: \"1%\", imagefs.available: \"1%\"}}\npodLogsDir: {logs}\nvolumePluginDir: {plugins}\nserializeImagePulls: false\nnodeStatusUpdateFrequency: 2s\nnodeStatusReportFrequency: 10s\nsyncFrequency: 10s\nfeatureGates: {{PodAndContainerStatsFromCRI: true{gates}}}\n{taints}{more}",
            port = self.ports.kubelet,
            healthz = self.ports.healthz,
            ca = pki.path("ca.crt").display(),
            socket = self.socket(n).display(),
            static_pods = at("static"),
            dns = self.net().node(1),
            logs = at("podlogs"),
            plugins = at("plugins"),
            gates = self.gates(n),
            taints = self.taints(n),
            more = self.options.kubelet,
        );
        std::fs::write(dir.join("kubelet.yaml"), kubelet).context("writing kubelet.yaml")
    }

    fn gates(&self, n: usize) -> String {
        let of_node = self.options.gates.iter().filter(|(node, _)| *node == n);
        of_node.map(|(_, gate)| format!(", {gate}")).collect()
    }

    /// A node to compare with gets only the pods that name it.
    fn taints(&self, n: usize) -> &'static str {
        if self.has_containerd(n) && self.options.containerd.len() < self.options.net.count {
            "registerWithTaints: [{key: slipway.test/peer, effect: NoSchedule}]\n"
        } else {
            ""
        }
    }

    fn slipwayd_config(&self, n: usize) -> String {
        let dir = self.node_dir(n);
        let at = |p: &str| dir.join(p).display().to_string();
        format!(
            "root = \"{}\"\nstate = \"{}\"\n[runtime]\ncgroup_root = \"/{}/node{n}/slipway\"\n[network]\nconf_dir = \"{}\"\nbin_dirs = [\"{}\"]\n[images]\ncerts_dir = \"{}\"\n[cdi]\nspec_dirs = [\"{}\"]\n{}",
            at("root"),
            at("state"),
            self.net().name,
            at("cni"),
            lab::cni_bin().display(),
            at("certs.d"),
            at("cdi"),
            self.options.slipwayd
        )
    }

    /// Has every node ask `server` ("http://address:port") for the images of the registry `host`.
    ///
    /// # Errors
    /// A file could not be written.
    pub fn trust_registry(&self, host: &str, server: &str) -> Result<()> {
        for n in self.nodes() {
            let dir = self.node_dir(n).join("certs.d").join(host);
            std::fs::create_dir_all(&dir)?;
            let text = format!(
                "server = \"{server}\"\n[host.\"{server}\"]\n  capabilities = [\"pull\", \"resolve\", \"push\"]\n"
            );
            std::fs::write(dir.join("hosts.toml"), text)
                .with_context(|| format!("writing below {}", dir.display()))?;
        }
        Ok(())
    }

    /// A manifest with the places of an installed node replaced by those of node `n`.
    pub fn localise(&self, manifest: &str, n: usize) -> String {
        let dir = self.node_dir(n);
        let programs = lab::bin("slipway").with_file_name("");
        // Where the registries' files are mounted stays; where they come from does not.
        [
            ("/var/lib/slipway", dir.join("root")),
            ("/run/slipway", dir.join("state")),
            ("path: /etc/slipway/certs.d", dir.join("certs.d")),
            ("path: /usr/local/bin", programs),
        ]
        .into_iter()
        .fold(manifest.to_owned(), |text, (from, to)| {
            let key = from
                .split_inclusive("path: ")
                .next()
                .filter(|k| *k == "path: ")
                .unwrap_or("");
            text.replace(from, &format!("{key}{}", to.display()))
        })
    }

    /// A command that runs in node `n`'s network.
    pub(super) fn on(&self, n: usize, program: &Path) -> std::process::Command {
        let inside = self.net().inside(n);
        match inside.split_first() {
            Some((first, rest)) => {
                let mut c = std::process::Command::new(first);
                c.args(rest).arg(program);
                c
            }
            None => std::process::Command::new(program),
        }
    }

    /// Starts node `n`'s runtime.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_runtime(&self, n: usize) -> Result<()> {
        if self.has_containerd(n) {
            return self.start_containerd(n);
        }
        let mut c = self.on(n, &lab::bin("slipwayd"));
        c.arg("--config")
            .arg(self.node_dir(n).join("config.toml"))
            .args(["--log-level", "info,slipwayd=debug"]);
        let boot = self.boot_id(n);
        if boot.exists() {
            c.arg("--boot-id-file").arg(boot);
        }
        self.processes().start(&self.runtime(n), &c)
    }

    /// Starts node `n`'s kubelet.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_kubelet(&self, n: usize) -> Result<()> {
        let dir = self.node_dir(n);
        self.share_kubelet_root(n)?;
        let mut c = self.on(n, Path::new("unshare"));
        c.args([
            "--mount",
            "--propagation",
            "unchanged",
            "sh",
            "-ec",
            PLUGINS_OF_ITS_OWN,
            "sh",
        ])
        .arg(dir.join("kubelet/device-plugins"))
        .arg(lab::tool("kubelet"))
        .arg("--config")
        .arg(dir.join("kubelet.yaml"))
        .arg("--kubeconfig")
        .arg(self.dir().join(format!("pki/node{n}.conf")))
        .arg("--root-dir")
        .arg(dir.join("kubelet"))
        .arg("--cert-dir")
        .arg(dir.join("kubelet-pki"))
        .arg(format!("--hostname-override=node{n}"))
        .arg(format!("--node-ip={}", self.net().node(n)))
        .arg("--v=2");
        self.processes().start(&format!("kubelet{n}"), &c)
    }

    /// What kubelet mounts below its root has to be seen by slipwayd: it is a mount that both have, before kubelet gets a
    /// mount namespace of its own.
    fn share_kubelet_root(&self, n: usize) -> Result<()> {
        let root = self.node_dir(n).join("kubelet");
        std::fs::create_dir_all(root.join("device-plugins"))?;
        let root = root.display();
        crate::cmd::sh(&format!(
            "mountpoint -q '{root}' || {{ mount --bind '{root}' '{root}' && mount --make-rshared '{root}'; }}"
        ))?;
        Ok(())
    }

    /// Where things of node `n` are, as slipway-agent's configuration says it.
    pub fn agent_places(&self, n: usize, driver: &Driver) -> String {
        let dir = self.node_dir(n);
        format!(
            "[driver]\nroot = {:?}\ndev = {:?}\n[paths]\nproc = {:?}\nsys = {:?}\nstate = {:?}\nkubelet = {:?}\ncdi = {:?}\npod_resources = {:?}\npods = {:?}\n[health]\nprobe_seconds = 2\n[faults]\nsocket = {:?}\n",
            driver.root(),
            driver.dev(),
            driver.proc(),
            driver.sys(),
            dir.join("agent"),
            dir.join("kubelet/device-plugins"),
            dir.join("cdi"),
            dir.join("kubelet/pod-resources/kubelet.sock"),
            dir.join("kubelet/pods-api/pods-api.sock"),
            dir.join("state/fault/fault.sock"),
        )
    }

    /// Gives node `n` a GPU driver with this topology, and starts slipway-agent on it.
    ///
    /// # Errors
    /// A file could not be written, or it could not be started.
    pub fn start_gpus(&self, n: usize, topology: &Topology) -> Result<Driver> {
        self.start_gpus_with(n, topology, "")
    }

    /// The same with `more` at the end of the agent's configuration, which is that of its `[faults]`. An agent that was there
    /// before is ended, and nothing is left of its driver and of what it knew.
    ///
    /// # Errors
    /// As [`Cluster::start_gpus`].
    pub fn start_gpus_with(&self, n: usize, topology: &Topology, more: &str) -> Result<Driver> {
        let dir = self.node_dir(n);
        self.processes()
            .end(&format!("agent{n}"), Duration::from_secs(5))?;
        for old in ["driver", "agent"] {
            if let Err(e) = std::fs::remove_dir_all(dir.join(old))
                && e.kind() != std::io::ErrorKind::NotFound
            {
                return Err(e).with_context(|| format!("removing {}", dir.join(old).display()));
            }
        }
        let driver = Driver::lay_out(&dir.join("driver"), topology)?;
        let config = format!(
            "[http]\nlisten = \"{}:0\"\n[kubernetes]\napi = {:?}\nnode = \"node{n}\"\n{}{more}",
            self.net().node(n),
            // With kubelet's own rights; a DaemonSet has fewer.
            self.dir().join(format!("pki/node{n}.conf")),
            self.agent_places(n, &driver),
        );
        std::fs::write(dir.join("agent.toml"), config)?;
        self.start_agent(n)?;
        Ok(driver)
    }

    /// Starts node `n`'s slipway-agent, whose driver is there ([`Cluster::start_gpus`]).
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_agent(&self, n: usize) -> Result<()> {
        let dir = self.node_dir(n);
        let mut c = self.on(n, &lab::bin("slipway-agent"));
        c.arg("--config")
            .arg(dir.join("agent.toml"))
            .env(slipway_fake_gpu::FOLDER, dir.join("driver/nvml"));
        self.processes().start(&format!("agent{n}"), &c)
    }

    /// Where node `n`'s slipway-agent serves HTTP ("address:port"), as its log says; `None` before it does.
    pub fn agent_address(&self, n: usize) -> Option<String> {
        let log = std::fs::read_to_string(self.processes().log(&format!("agent{n}"))).ok()?;
        let line = log.lines().rfind(|l| l.contains("HTTP is served"))?;
        Some(line.split_once("address=")?.1.trim().to_owned())
    }

    /// The environment and arguments with which `slipway-agent VERB` looks at what node `n`'s agent sees, for a shell.
    pub fn agent_command(&self, n: usize) -> String {
        let dir = self.node_dir(n);
        format!(
            "{}={} {} --config {}",
            slipway_fake_gpu::FOLDER,
            dir.join("driver/nvml").display(),
            lab::bin("slipway-agent").display(),
            dir.join("agent.toml").display()
        )
    }

    /// Waits until node `n`'s kubelet says that it may hand out `count` of `resource`; how long that took.
    ///
    /// # Errors
    /// It does not within `limit`: the end of the agent's log.
    pub async fn wait_allocatable(
        &self,
        n: usize,
        resource: &str,
        count: usize,
        limit: Duration,
    ) -> Result<Duration> {
        let began = Instant::now();
        let path = format!(
            "jsonpath={{.status.allocatable.{}}}",
            resource.replace('.', "\\.")
        );
        loop {
            let o = self.kubectl_for(
                &["get", "node", &format!("node{n}"), "-o", &path],
                Duration::from_secs(10),
            )?;
            if o.stdout.trim() == count.to_string() {
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                bail!(
                    "node{n} has {:?} {resource} after {limit:?}, not {count}\n{}",
                    o.stdout.trim(),
                    self.processes().tail(&format!("agent{n}"), 30)
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until node `n`'s runtime listens: a kubelet that starts before it does ends.
    ///
    /// # Errors
    /// It does not within 20 seconds: the end of its log.
    pub async fn wait_runtime(&self, n: usize) -> Result<Cri> {
        let began = Instant::now();
        loop {
            match self.cri(n).await {
                Ok(c) => return Ok(c),
                Err(e) if began.elapsed() > Duration::from_secs(20) => {
                    return Err(e.context(self.processes().tail(&self.runtime(n), 30)));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Waits until node `n` is Ready.
    ///
    /// # Errors
    /// It is not within `limit`, or its kubelet or runtime ended: the end of their logs.
    pub async fn wait_ready(&self, n: usize, limit: Duration) -> Result<()> {
        let began = Instant::now();
        let node = format!("node{n}");
        let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
        loop {
            let o = self.kubectl_for(&["get", "node", &node, "-o", path], Duration::from_secs(10));
            if o.is_ok_and(|o| o.stdout.trim() == "True") {
                return Ok(());
            }
            for name in [self.runtime(n), format!("kubelet{n}")] {
                if !self.processes().alive(&name) {
                    bail!("{name} ended:\n{}", self.processes().tail(&name, 30));
                }
            }
            if began.elapsed() > limit {
                bail!(
                    "{node} is not Ready after {limit:?}\n--- kubelet\n{}\n--- its runtime\n{}",
                    self.processes().tail(&format!("kubelet{n}"), 30),
                    self.processes().tail(&self.runtime(n), 30)
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Removes every pod of node `n`'s runtime and ends it. One that died is started again, to clean up.
    ///
    /// # Errors
    /// A pod cannot be removed, or it does not end.
    pub async fn drain(&self, n: usize) -> Result<()> {
        let name = self.runtime(n);
        if !self.node_dir(n).join("config.toml").exists() {
            return Ok(());
        }
        if !self.processes().alive(&name) {
            self.start_runtime(n)?;
        }
        remove_all(&self.wait_runtime(n).await?).await?;
        self.processes().end(&name, Duration::from_secs(10))
    }
}

async fn remove_all(cri: &Cri) -> Result<()> {
    let mut tasks = tokio::task::JoinSet::new();
    for p in cri.pods().await? {
        let cri = cri.clone();
        tasks.spawn(async move { cri.remove_pod(&p.id).await });
    }
    while let Some(r) = tasks.join_next().await {
        r??;
    }
    Ok(())
}
