//! A real Kubernetes cluster on one machine, with slipwayd under every kubelet: `make cluster` and the kubelet suite.
//!
//! ```text
//! <dir>/
//!   cluster.json         what was asked for and which ports were taken; who finds it can take the cluster down
//!   pki/                 the authority, certificates, kubeconfigs (admin.conf is the user's)
//!   etcd/  log/  pid/    of every process
//!   node1/ node2/ …      kubelet.yaml, kubelet/, podlogs/, static/; the runtime's root/ state/ config.toml; cni/ ipam/ certs.d/ cdi/;
//!                        with GPUs: driver/ (a fake one), slipway-agent's agent/ agent.toml
//! ```
//! Node 1 is the host; every further node is a network namespace with a runtime and a kubelet of its own. There is no
//! kube-proxy: a Service needs to be headless, and its names come from the cluster's own DNS server; pods reach the API server
//! by the Service `kubernetes`, whose address a rule of the firewall leads to it. What is changed of the machine itself is put
//! back by the last cluster on it (host.rs).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cmd::{self, Output};
use crate::cri::Cri;
use crate::{lab, leftovers};

mod audit;
mod containerd;
pub mod dns;
mod examples;
mod host;
mod net;
mod node;
mod pki;
mod power;
mod process;

pub use audit::Asked;
pub use net::Net;
pub use process::Processes;

use pki::Pki;

/// What a cluster is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// Where everything of it lies; made, and removed by [`Cluster::down`].
    pub dir: PathBuf,
    /// Names and addresses, and the number of nodes.
    pub net: Net,
    /// The program whose `dns` verb is the cluster's DNS server (tests/cluster).
    pub program: PathBuf,
    /// Lines for the end of every slipwayd's configuration.
    #[serde(default)]
    pub slipwayd: String,
    /// Lines for the end of every kubelet's configuration.
    #[serde(default)]
    pub kubelet: String,
    /// Feature gates of a node's kubelet beside those that all have: "Name: true".
    #[serde(default)]
    pub gates: Vec<(usize, String)>,
    /// The nodes (from 1) that have containerd and runc instead of slipwayd, to compare with.
    #[serde(default)]
    pub containerd: Vec<usize>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Ports {
    api: u16,
    etcd: u16,
    peer: u16,
    manager: u16,
    scheduler: u16,
    kubelet: u16,
    healthz: u16,
}

/// A cluster that was brought up, by this process or another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cluster {
    options: Options,
    ports: Ports,
}

/// How long each part took to come up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Took {
    /// From nothing to an API server that says it is ready.
    pub api: Duration,
    /// From nothing to every node Ready.
    pub ready: Duration,
}

const FILE: &str = "cluster.json";

impl Cluster {
    /// Brings a cluster up and waits until its nodes are Ready. On failure everything is taken down again.
    ///
    /// # Errors
    /// A program is missing or does not come up: the error has the end of its log.
    pub async fn up(options: Options) -> Result<(Cluster, Took)> {
        if options.dir.join(FILE).exists() {
            bail!(
                "there is a cluster in {}: take it down first",
                options.dir.display()
            );
        }
        for program in [
            "etcd",
            "kube-apiserver",
            "kube-controller-manager",
            "kube-scheduler",
            "kubelet",
            "kubectl",
        ] {
            if !lab::tool(program).exists() {
                bail!(
                    "{} is not there (tests/setup/go-tools.sh etcd kubernetes makes it)",
                    lab::tool(program).display()
                );
            }
        }
        let free = || -> Result<u16> { Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()) };
        let prefer = |port: u16| -> Result<u16> {
            if std::net::TcpListener::bind(("0.0.0.0", port)).is_ok() {
                Ok(port)
            } else {
                free()
            }
        };
        let ports = Ports {
            api: prefer(6443)?,
            etcd: free()?,
            peer: free()?,
            manager: free()?,
            scheduler: free()?,
            kubelet: prefer(10250)?,
            healthz: free()?,
        };
        std::fs::create_dir_all(&options.dir).with_context(|| format!("making {}", options.dir.display()))?;
        let cluster = Cluster { options, ports };
        std::fs::write(cluster.dir().join(FILE), serde_json::to_vec_pretty(&cluster)?)?;
        match cluster.bring_up().await {
            Ok(took) => Ok((cluster, took)),
            Err(e) => {
                let down = cluster.down().await;
                Err(match down {
                    Ok(()) => e,
                    Err(d) => e.context(format!("and taking it down again: {d:#}")),
                })
            }
        }
    }

    /// The cluster in `dir`; `None` when there is none.
    ///
    /// # Errors
    /// Its description cannot be read.
    pub fn find(dir: &Path) -> Result<Option<Cluster>> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Some(
            serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?,
        ))
    }

    async fn bring_up(&self) -> Result<Took> {
        let began = Instant::now();
        host::enter(self.dir())?;
        let pki = self.make_pki()?;
        self.options.net.up(self.ports.api)?;
        self.make_cgroup()?;
        self.start_etcd()?;
        self.start_apiserver(&pki)?;
        // The runtimes come up meanwhile.
        for n in self.nodes() {
            self.prepare_node(n, &pki)?;
            self.start_runtime(n)?;
        }
        self.wait_api().await?;
        let api = began.elapsed();
        self.start_controllers(&pki)?;
        for n in self.nodes() {
            self.wait_runtime(n).await?;
            self.start_kubelet(n)?;
        }
        self.start_dns()?;
        for n in self.nodes() {
            self.wait_ready(n, Duration::from_secs(60)).await?;
        }
        Ok(Took {
            api,
            ready: began.elapsed(),
        })
    }

    /// The directory of everything.
    pub fn dir(&self) -> &Path {
        &self.options.dir
    }

    /// Names and addresses.
    pub fn net(&self) -> &Net {
        &self.options.net
    }

    /// Node numbers, from 1.
    pub fn nodes(&self) -> std::ops::RangeInclusive<usize> {
        1..=self.options.net.count
    }

    /// Its processes: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, dns; slipwayd1 (or containerd1), kubelet1, agent1, …
    pub fn processes(&self) -> Processes {
        Processes::of(self.dir())
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir().join("pki/admin.conf")
    }

    /// `kubectl ARGS` as the administrator.
    pub fn kubectl_command(&self, args: &[&str]) -> std::process::Command {
        let mut c = cmd::command(lab::tool("kubectl"), args);
        c.env("KUBECONFIG", self.kubeconfig())
            .env("KUBECACHEDIR", self.dir().join("kubectl-cache"));
        c
    }

    /// Runs kubectl for at most `limit`, whatever its exit code.
    ///
    /// # Errors
    /// It could not be started or ran past the limit.
    pub fn kubectl_for(&self, args: &[&str], limit: Duration) -> Result<Output> {
        cmd::run(&mut self.kubectl_command(args), limit)
    }

    /// Runs kubectl, which has to succeed within two minutes; its standard output.
    ///
    /// # Errors
    /// It failed: what it said.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let o = self.kubectl_for(args, Duration::from_secs(120))?;
        Ok(o.ok()
            .with_context(|| format!("kubectl {}", args.join(" ")))?
            .stdout)
    }

    /// `kubectl apply` of a manifest.
    ///
    /// # Errors
    /// As [`Cluster::kubectl`].
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let file = tempfile::NamedTempFile::new_in(self.dir())?;
        std::fs::write(file.path(), manifest)?;
        self.kubectl(&["apply", "-f", &file.path().display().to_string()])
            .with_context(|| manifest.to_owned())?;
        Ok(())
    }

    fn make_pki(&self) -> Result<Pki> {
        let pki = Pki::new(&self.dir().join("pki"))?;
        let host = self.net().node(1);
        let names = [
            "IP:127.0.0.1".to_owned(),
            format!("IP:{}", net::API_SERVICE),
            format!("IP:{host}"),
            "DNS:localhost".to_owned(),
            "DNS:kubernetes.default.svc".to_owned(),
        ];
        pki.certificate("apiserver", "/CN=kube-apiserver", &names)?;
        let mut users = vec![
            ("admin".to_owned(), "/O=system:masters/CN=admin".to_owned()),
            (
                "manager".to_owned(),
                "/CN=system:kube-controller-manager".to_owned(),
            ),
            ("scheduler".to_owned(), "/CN=system:kube-scheduler".to_owned()),
            (
                "apiserver-kubelet".to_owned(),
                "/O=system:masters/CN=apiserver-kubelet".to_owned(),
            ),
        ];
        users.extend(self.nodes().map(|n| {
            (
                format!("node{n}"),
                format!("/O=system:nodes/CN=system:node:node{n}"),
            )
        }));
        for (name, subject) in &users {
            pki.certificate(name, subject, &[])?;
            pki.kubeconfig(name, &format!("https://{host}:{}", self.ports.api))?;
        }
        Ok(pki)
    }

    /// The parent of every kubelet's tree, in each hierarchy: kubelet wants its root there beforehand.
    fn make_cgroup(&self) -> Result<()> {
        for top in self.cgroup_tops()? {
            for dir in [top.join(&self.net().name)].into_iter().chain(
                self.nodes()
                    .map(|n| top.join(&self.net().name).join(format!("node{n}"))),
            ) {
                std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
                // cpuset of v1: empty until filled, and then no process can enter.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let above = dir.parent().map(|p| p.join(file));
                    if top.file_name().is_some_and(|n| n == "cpuset")
                        && let Some(value) = above.and_then(|p| std::fs::read_to_string(p).ok())
                    {
                        std::fs::write(dir.join(file), value.trim())?;
                    }
                }
            }
        }
        Ok(())
    }

    fn cgroup_tops(&self) -> Result<Vec<PathBuf>> {
        let root = Path::new("/sys/fs/cgroup");
        if root.join("cgroup.controllers").exists() {
            return Ok(vec![root.to_owned()]);
        }
        let mut tops = Vec::new();
        for e in std::fs::read_dir(root)? {
            let e = e?;
            // Links are other names of the same hierarchy.
            if e.file_type()?.is_dir() {
                tops.push(e.path());
            }
        }
        Ok(tops)
    }

    fn start_etcd(&self) -> Result<()> {
        let client = format!("http://127.0.0.1:{}", self.ports.etcd);
        let peer = format!("http://127.0.0.1:{}", self.ports.peer);
        let mut c = std::process::Command::new(lab::tool("etcd"));
        c.arg("--data-dir").arg(self.dir().join("etcd")).args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &format!("default={peer}"),
            "--unsafe-no-fsync",
            "--log-level",
            "warn",
        ]);
        self.processes().start("etcd", &c)
    }

    fn start_apiserver(&self, pki: &Pki) -> Result<()> {
        let file = |name: &str| pki.path(name).display().to_string();
        let mut c = std::process::Command::new(lab::tool("kube-apiserver"));
        c.args(self.audit()?);
        c.args([
            format!("--etcd-servers=http://127.0.0.1:{}", self.ports.etcd),
            "--bind-address=0.0.0.0".into(),
            format!("--advertise-address={}", self.net().node(1)),
            format!("--secure-port={}", self.ports.api),
            format!("--client-ca-file={}", file("ca.crt")),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", file("sa.pub")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            "--service-cluster-ip-range=10.96.0.0/16".into(),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--allow-privileged".into(),
            format!("--kubelet-client-certificate={}", file("apiserver-kubelet.crt")),
            format!("--kubelet-client-key={}", file("apiserver-kubelet.key")),
            "--kubelet-preferred-address-types=InternalIP".into(),
            "--endpoint-reconciler-type=none".into(),
        ]);
        self.processes().start("kube-apiserver", &c)
    }

    async fn wait_api(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let o = self.kubectl_for(&["get", "--raw", "/readyz"], Duration::from_secs(10));
            if o.is_ok_and(|o| o.code == 0) {
                return Ok(());
            }
            for name in ["etcd", "kube-apiserver"] {
                if !self.processes().alive(name) {
                    bail!("{name} ended:\n{}", self.processes().tail(name, 30));
                }
            }
            if began.elapsed() > Duration::from_secs(90) {
                bail!(
                    "the API server is not ready:\n{}",
                    self.processes().tail("kube-apiserver", 30)
                );
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn start_controllers(&self, pki: &Pki) -> Result<()> {
        let file = |name: &str| pki.path(name).display().to_string();
        let mut manager = std::process::Command::new(lab::tool("kube-controller-manager"));
        manager.args([
            format!("--kubeconfig={}", file("manager.conf")),
            format!("--service-account-private-key-file={}", file("sa.key")),
            format!("--root-ca-file={}", file("ca.crt")),
            "--use-service-account-credentials".into(),
            "--bind-address=127.0.0.1".into(),
            format!("--secure-port={}", self.ports.manager),
            "--leader-elect=false".into(),
        ]);
        self.processes().start("kube-controller-manager", &manager)?;
        let mut scheduler = std::process::Command::new(lab::tool("kube-scheduler"));
        scheduler.args([
            format!("--kubeconfig={}", file("scheduler.conf")),
            "--bind-address=127.0.0.1".into(),
            format!("--secure-port={}", self.ports.scheduler),
            "--leader-elect=false".into(),
        ]);
        self.processes().start("kube-scheduler", &scheduler)
    }

    fn start_dns(&self) -> Result<()> {
        let mut c = std::process::Command::new(&self.options.program);
        c.arg("dns")
            .arg(format!("{}:53", self.net().node(1)))
            .arg(lab::tool("kubectl"))
            .arg(self.kubeconfig());
        self.processes().start("dns", &c)
    }

    /// Takes everything down, and proves that nothing is left.
    ///
    /// # Errors
    /// Something is.
    pub async fn down(&self) -> Result<()> {
        let p = self.processes();
        let short = Duration::from_secs(2);
        for n in self.nodes() {
            p.end(&format!("kubelet{n}"), Duration::from_secs(5))?;
            p.end(&format!("agent{n}"), Duration::from_secs(2))?;
        }
        let mut wrong = Vec::new();
        for n in self.nodes() {
            if let Err(e) = self.drain(n).await {
                wrong.push(format!("node{n}: {e:#}"));
            }
        }
        // The API server waits for its watchers: two seconds are enough for a cluster that is thrown away.
        for name in [
            "dns",
            "kube-scheduler",
            "kube-controller-manager",
            "kube-apiserver",
            "etcd",
        ] {
            p.end(name, short)?;
        }
        let mut mounts = leftovers::mounts_under(self.dir());
        // kubelet's own (its root is a mount, and so are Secrets and tokens), and nothing of a runtime's.
        let of_kubelet = |m: &String| {
            self.nodes()
                .any(|n| Path::new(m).starts_with(self.node_dir(n).join("kubelet")))
        };
        wrong.extend(
            mounts
                .iter()
                .filter(|m| !of_kubelet(m))
                .map(|m| format!("mount {m}")),
        );
        mounts.reverse();
        for m in mounts {
            let _ = cmd::sh(&format!("umount -l '{m}'"));
        }
        self.net().down(self.ports.api);
        self.remove_cgroups(&mut wrong);
        forget_container_links(self.dir());
        if wrong.is_empty() {
            wrong = host::leave(self.dir())?;
        }
        if wrong.is_empty() {
            std::fs::remove_dir_all(self.dir())
                .with_context(|| format!("removing {}", self.dir().display()))?;
            wrong = self.left();
        }
        if !wrong.is_empty() {
            bail!(
                "left behind by the cluster in {}:\n  {}",
                self.dir().display(),
                wrong.join("\n  ")
            );
        }
        Ok(())
    }

    fn remove_cgroups(&self, wrong: &mut Vec<String>) {
        // By its whole name: others on the machine have longer ones that begin with it.
        for top in self.cgroup_tops().unwrap_or_default() {
            let ours = top.join(&self.net().name);
            if ours.exists() {
                let _ = cmd::sh(&format!(
                    "find '{}' -depth -type d -exec rmdir {{}} + 2>/dev/null || true",
                    ours.display()
                ));
            }
            if ours.exists() {
                wrong.push(format!("cgroup {}", ours.display()));
            }
        }
    }

    /// What the machine still shows of this cluster.
    fn left(&self) -> Vec<String> {
        let mut found = Vec::new();
        found.extend(
            leftovers::mounts_under(self.dir())
                .into_iter()
                .map(|m| format!("mount {m}")),
        );
        found.extend(
            leftovers::processes_naming(self.dir())
                .into_iter()
                .map(|(p, c)| format!("process {p}: {c}")),
        );
        found.extend(self.net().links().into_iter().map(|l| format!("link {l}")));
        found.extend(
            leftovers::firewall_rules_naming(&self.net().name)
                .into_iter()
                .filter(|r| self.net().names_us(r))
                .map(|r| format!("firewall rule {r}")),
        );
        for n in self.nodes() {
            if let Some(ns) = self.net().netns(n)
                && Path::new("/run/netns").join(&ns).exists()
            {
                found.push(format!("network namespace {ns}"));
            }
        }
        found
    }

    /// A client of node `n`'s runtime.
    ///
    /// # Errors
    /// It does not listen.
    pub async fn cri(&self, n: usize) -> Result<Cri> {
        Cri::connect(&self.socket(n)).await
    }
}

/// kubelet keeps links to the logs of its containers in /var/log/containers, wherever the logs are.
fn forget_container_links(dir: &Path) {
    for e in std::fs::read_dir("/var/log/containers")
        .into_iter()
        .flatten()
        .flatten()
    {
        if std::fs::read_link(e.path()).is_ok_and(|t| t.starts_with(dir)) {
            let _ = std::fs::remove_file(e.path());
        }
    }
}
