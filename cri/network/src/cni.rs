//! The operations on the configured network: ADD, DEL, CHECK, STATUS, GC, after CNI 1.1 section 3.
//!
//! Locking: operations on one container id run one after another; GC runs alone, as the
//! specification asks. Lock order: the gate (shared for ADD, DEL, CHECK; alone for GC), then the
//! container's.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::{OwnedMutexGuard, RwLock, RwLockReadGuard};

use crate::attachment::{self, Attachment, PluginConfig};
use crate::config::{self, Folder, Network};
use crate::error::{CniError, PluginError};
use crate::netns;
use crate::plugin::{self, Call};
use crate::pod::PodNetwork;
use crate::result::NetworkResult;
use crate::version::Versions;

/// The pod's interface.
const IFNAME: &str = "eth0";

/// Whether pods can be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkStatus {
    /// They can.
    Ready {
        /// The network's name.
        network: String,
    },
    /// They cannot.
    NotReady {
        /// Why, as a sentence for `kubectl describe node`.
        reason: String,
    },
}

/// How long a plugin may take.
#[derive(Debug, Clone, Copy)]
struct Deadlines {
    add: Duration,
    del: Duration,
    check: Duration,
    probe: Duration,
}

/// The configured network and its plugins. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cni {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: Folder,
    bin_dirs: Vec<PathBuf>,
    versions: Versions,
    deadlines: Deadlines,
    gate: RwLock<()>,
    busy: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Cni {
    /// The network configured in `conf_dir`, with plugins from `bin_dirs` (the first that has one
    /// wins). Nothing is read yet.
    pub fn new(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>) -> Cni {
        let deadlines = Deadlines {
            add: Duration::from_secs(90),
            del: Duration::from_secs(90),
            check: Duration::from_secs(30),
            probe: Duration::from_secs(10),
        };
        Cni {
            inner: Arc::new(Inner {
                folder: Folder::new(conf_dir),
                bin_dirs,
                versions: Versions::default(),
                deadlines,
                gate: RwLock::new(()),
                busy: Mutex::default(),
            }),
        }
    }
    /// Whether there is a usable network whose plugins are there; the folder is read again when it
    /// has changed.
    pub fn status(&self) -> NetworkStatus {
        let network = match self.inner.folder.network() {
            Ok(network) => network,
            Err(reason) => return NetworkStatus::NotReady { reason },
        };
        let missing = network
            .plugins
            .iter()
            .find(|p| plugin::find(&p.kind, &self.inner.bin_dirs).is_none());
        match missing {
            Some(p) => NetworkStatus::NotReady {
                reason: format!(
                    "network {}: CNI plugin {:?} is not in {}",
                    network.name,
                    p.kind,
                    self.inner.dirs()
                ),
            },
            None => NetworkStatus::Ready {
                network: network.name.clone(),
            },
        }
    }

    /// As [`Cni::status`], and asks the plugins themselves where they speak 1.1 (STATUS).
    pub async fn probe(&self) -> NetworkStatus {
        let status = self.status();
        if !matches!(status, NetworkStatus::Ready { .. }) {
            return status;
        }
        match self.inner.ask_status().await {
            Ok(()) => status,
            Err(e) => NetworkStatus::NotReady { reason: chain(&e) },
        }
    }

    /// What [`Cni::add`] would do for this pod: to be recorded before it is done.
    ///
    /// # Errors
    /// No usable network, or arguments that CNI cannot carry.
    pub async fn plan(&self, pod: &PodNetwork) -> Result<Attachment, CniError> {
        let network = self
            .inner
            .folder
            .network()
            .map_err(|reason| CniError::NotReady { reason })?;
        check_pod(pod)?;
        Ok(Attachment {
            version: attachment::VERSION,
            container_id: pod.id.clone(),
            network: network.name.clone(),
            ifname: IFNAME.to_owned(),
            netns: pod.netns.clone(),
            cni_version: self.inner.choose_version(&network).await?,
            disable_check: network.disable_check,
            args: pod.cni_args()?,
            plugins: network.plugins.clone(),
            capability_args: pod.capability_args(),
            result: None,
            complete: false,
            ips: Vec::new(),
        })
    }

    /// Connects a pod to the network: [`Cni::plan`] and [`Cni::attach`] in one.
    ///
    /// # Errors
    /// As of both.
    pub async fn add(&self, pod: &PodNetwork) -> Result<Attachment, CniError> {
        let plan = self.plan(pod).await?;
        self.attach(plan).await
    }

    /// Carries out a plan. When a plugin fails, all of them are told to undo it (DEL) before the
    /// error is returned; whether that worked is in the log, and the plan can be given to
    /// [`Cni::del`] again.
    ///
    /// # Errors
    /// The failing plugin's, or a result without an address for the pod.
    pub async fn attach(&self, plan: Attachment) -> Result<Attachment, CniError> {
        plan.known_version()?;
        if !netns::is_pinned(&plan.netns) {
            let value = plan.netns.display().to_string();
            return Err(CniError::Argument {
                what: "netns",
                value,
                reason: "is not a network namespace",
            });
        }
        let (_gate, _turn) = self.inner.enter(&plan.container_id).await;
        let mut attachment = plan;
        match self.inner.add_chain(&mut attachment).await {
            Ok(()) => Ok(attachment),
            Err(error) => {
                if let Err(undo) = self.inner.del_chain(&attachment).await {
                    tracing::warn!(
                        container = attachment.container_id,
                        error = chain(&undo),
                        "undoing a failed CNI ADD failed too"
                    );
                }
                Err(error)
            }
        }
    }

    /// Disconnects a pod, from what was kept of ADD (or of the plan for it): neither today's
    /// configuration nor the namespace need exist. May be called again and again.
    ///
    /// # Errors
    /// The first plugin that fails; those before it in the chain have not been asked then.
    pub async fn del(&self, attachment: &Attachment) -> Result<(), CniError> {
        attachment.known_version()?;
        let (_gate, _turn) = self.inner.enter(&attachment.container_id).await;
        self.inner.del_chain(attachment).await
    }

    /// Asks the plugins whether the pod's connection is as ADD left it. Does nothing where the
    /// protocol or the configuration does not have it.
    ///
    /// # Errors
    /// The first plugin that finds something wrong.
    pub async fn check(&self, attachment: &Attachment) -> Result<(), CniError> {
        attachment.known_version()?;
        let speaks = at_least(&attachment.cni_version, "0.4.0");
        if attachment.disable_check || !attachment.complete || !speaks {
            return Ok(());
        }
        let (_gate, _turn) = self.inner.enter(&attachment.container_id).await;
        for plugin in &attachment.plugins {
            let env = self.inner.env(attachment, Some(&attachment.netns));
            let stdin = request(attachment, plugin, attachment.result.as_ref());
            self.inner
                .call(
                    "CHECK",
                    attachment,
                    plugin,
                    env,
                    stdin,
                    self.inner.deadlines.check,
                )
                .await?;
        }
        Ok(())
    }

    /// Tells the plugins of `network`, which the caller alone uses, which attachments are valid;
    /// they let go of everything else. Does nothing when another network is configured, when the
    /// configuration forbids it, or before CNI 1.1.
    ///
    /// # Errors
    /// The first plugin's that failed, after all were asked.
    pub async fn gc(&self, network: &str, valid: &[Attachment]) -> Result<(), CniError> {
        let configured = self
            .inner
            .folder
            .network()
            .map_err(|reason| CniError::NotReady { reason })?;
        if configured.name != network || configured.disable_gc {
            return Ok(());
        }
        let version = self.inner.choose_version(&configured).await?;
        if !at_least(&version, "1.1.0") {
            return Ok(());
        }
        let _alone = self.inner.gate.write().await;
        let valid: Vec<Value> = valid
            .iter()
            .filter(|a| a.network == network)
            .map(|a| json!({"containerID": a.container_id, "ifname": a.ifname}))
            .collect();
        let mut first = Ok(());
        for plugin in &configured.plugins {
            let mut config = base_request(plugin, network, &version);
            config.insert(
                "cni.dev/valid-attachments".to_owned(),
                Value::Array(valid.clone()),
            );
            let got = self.inner.call_network("GC", network, plugin, config).await;
            first = first.and(got);
        }
        first
    }
}

impl Inner {
    fn dirs(&self) -> String {
        self.bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Waits for one's turn at a container.
    async fn enter(&self, id: &str) -> (RwLockReadGuard<'_, ()>, Turn<'_>) {
        let gate = self.gate.read().await;
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(busy.entry(id.to_owned()).or_default())
        };
        let held = lock.lock_owned().await;
        (
            gate,
            Turn {
                inner: self,
                id: id.to_owned(),
                held: Some(held),
            },
        )
    }

    /// The newest version that the configuration offers and all its plugins know. They are asked
    /// only where there is a choice.
    async fn choose_version(&self, network: &Network) -> Result<String, CniError> {
        if let [only] = network.versions.as_slice() {
            return Ok(only.clone());
        }
        let mut common = network.versions.clone();
        let mut known_text = String::new();
        for plugin in &network.plugins {
            let program = self.program("VERSION", &network.name, plugin)?;
            let known = self.versions.of(&program, self.deadlines.probe).await;
            let known = known.map_err(|source| plugin_failed("VERSION", &network.name, plugin, source))?;
            common.retain(|v| known.contains(v));
            if common.is_empty() {
                known_text = format!("{}: {}", plugin.kind, known.join(", "));
                break;
            }
        }
        let wanted = network.versions.join(", ");
        common
            .into_iter()
            .next()
            .ok_or_else(|| CniError::NoCommonVersion {
                network: network.name.clone(),
                wanted,
                known: known_text,
            })
    }

    fn program(&self, act: &'static str, network: &str, plugin: &PluginConfig) -> Result<PathBuf, CniError> {
        plugin::find(&plugin.kind, &self.bin_dirs).ok_or_else(|| CniError::PluginMissing {
            act,
            network: network.to_owned(),
            plugin: plugin.kind.clone(),
            dirs: self.dirs(),
        })
    }

    async fn add_chain(&self, attachment: &mut Attachment) -> Result<(), CniError> {
        for i in 0..attachment.plugins.len() {
            let plugin = &attachment.plugins[i];
            let env = self.env(attachment, Some(&attachment.netns));
            let stdin = request(attachment, plugin, attachment.result.as_ref());
            let output = self
                .call("ADD", attachment, plugin, env, stdin, self.deadlines.add)
                .await?;
            let result = serde_json::from_slice::<Value>(&output)
                .map_err(|e| plugin_failed("ADD", &attachment.network, plugin, PluginError::NotJson(e)))?;
            attachment.result = Some(result);
        }
        let bad = |reason| CniError::BadResult {
            act: "ADD",
            network: attachment.network.clone(),
            reason,
        };
        let result = attachment
            .result
            .as_ref()
            .map(NetworkResult::parse)
            .transpose()
            .map_err(bad)?;
        let ips = result.map(|r| r.ips_of(&attachment.ifname)).unwrap_or_default();
        if ips.is_empty() {
            return Err(bad(format!("it has no address for {}", attachment.ifname)));
        }
        attachment.ips = ips;
        attachment.complete = true;
        Ok(())
    }

    async fn del_chain(&self, attachment: &Attachment) -> Result<(), CniError> {
        let prev = attachment
            .result
            .as_ref()
            .filter(|_| at_least(&attachment.cni_version, "0.4.0"));
        for plugin in attachment.plugins.iter().rev() {
            // The namespace may go at any time: looked at for each plugin.
            let netns = Some(&attachment.netns).filter(|n| netns::is_pinned(n));
            let env = self.env(attachment, netns);
            let stdin = request(attachment, plugin, prev);
            match self
                .call("DEL", attachment, plugin, env, stdin, self.deadlines.del)
                .await
            {
                Ok(_) => {}
                // "Container unknown": there is nothing left to undo.
                Err(CniError::Plugin {
                    source: PluginError::Answer { code: 3, .. },
                    ..
                }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn ask_status(&self) -> Result<(), CniError> {
        let network = self
            .folder
            .network()
            .map_err(|reason| CniError::NotReady { reason })?;
        let version = self.choose_version(&network).await?;
        if !at_least(&version, "1.1.0") {
            return Ok(());
        }
        for plugin in &network.plugins {
            let config = base_request(plugin, &network.name, &version);
            self.call_network("STATUS", &network.name, plugin, config).await?;
        }
        Ok(())
    }

    fn env(&self, attachment: &Attachment, netns: Option<&PathBuf>) -> Vec<(&'static str, String)> {
        let mut env = vec![
            ("CNI_CONTAINERID", attachment.container_id.clone()),
            ("CNI_IFNAME", attachment.ifname.clone()),
            ("CNI_ARGS", attachment.args.clone()),
            ("CNI_PATH", self.cni_path()),
        ];
        if let Some(netns) = netns {
            env.push(("CNI_NETNS", netns.display().to_string()));
        }
        env
    }

    fn cni_path(&self) -> String {
        self.bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect::<Vec<_>>()
            .join(":")
    }

    async fn call(
        &self,
        act: &'static str,
        attachment: &Attachment,
        plugin: &PluginConfig,
        env: Vec<(&'static str, String)>,
        stdin: Vec<u8>,
        deadline: Duration,
    ) -> Result<Vec<u8>, CniError> {
        let program = self.program(act, &attachment.network, plugin)?;
        plugin::run(Call {
            program: &program,
            command: act,
            env,
            stdin,
            deadline,
        })
        .await
        .map_err(|source| plugin_failed(act, &attachment.network, plugin, source))
    }

    /// Calls that concern no container: STATUS and GC.
    async fn call_network(
        &self,
        act: &'static str,
        network: &str,
        plugin: &PluginConfig,
        config: Map<String, Value>,
    ) -> Result<(), CniError> {
        let program = self.program(act, network, plugin)?;
        let env = vec![("CNI_PATH", self.cni_path())];
        let stdin = Value::Object(config).to_string().into_bytes();
        plugin::run(Call {
            program: &program,
            command: act,
            env,
            stdin,
            deadline: self.deadlines.probe,
        })
        .await
        .map(|_| ())
        .map_err(|source| plugin_failed(act, network, plugin, source))
    }
}

/// One's turn at a container; the entry goes when nobody else waits for it.
struct Turn<'a> {
    inner: &'a Inner,
    id: String,
    held: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut busy = self.inner.busy.lock().unwrap_or_else(PoisonError::into_inner);
        self.held = None;
        if busy
            .get(&self.id)
            .is_some_and(|lock| Arc::strong_count(lock) == 1)
        {
            busy.remove(&self.id);
        }
    }
}

fn plugin_failed(act: &'static str, network: &str, plugin: &PluginConfig, source: PluginError) -> CniError {
    CniError::Plugin {
        act,
        network: network.to_owned(),
        plugin: plugin.kind.clone(),
        source,
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text.push_str(": ");
        text.push_str(&e.to_string());
        source = e.source();
    }
    text
}

/// Whether a version is that one or newer, among those we speak.
fn at_least(version: &str, wanted: &str) -> bool {
    let place = |v: &str| config::VERSIONS.iter().position(|known| *known == v);
    place(version) >= place(wanted)
}

/// A plugin's configuration as it is given on standard input: untouched but for the protocol's own keys.
fn base_request(plugin: &PluginConfig, network: &str, version: &str) -> Map<String, Value> {
    let mut config = plugin.config.clone();
    config.retain(|k, _| {
        !matches!(k.as_str(), "capabilities" | "runtimeConfig" | "prevResult") && !k.starts_with("cni.dev/")
    });
    config.insert("cniVersion".to_owned(), version.into());
    config.insert("name".to_owned(), network.into());
    config
}

fn request(attachment: &Attachment, plugin: &PluginConfig, prev: Option<&Value>) -> Vec<u8> {
    let mut config = base_request(plugin, &attachment.network, &attachment.cni_version);
    let wanted: Map<String, Value> = attachment
        .capability_args
        .iter()
        .filter(|(name, _)| plugin.has_capability(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !wanted.is_empty() {
        config.insert("runtimeConfig".to_owned(), Value::Object(wanted));
    }
    if let Some(prev) = prev {
        config.insert("prevResult".to_owned(), prev.clone());
    }
    Value::Object(config).to_string().into_bytes()
}

fn check_pod(pod: &PodNetwork) -> Result<(), CniError> {
    let bad = |what, value: &str, reason| {
        Err(CniError::Argument {
            what,
            value: value.to_owned(),
            reason,
        })
    };
    if !config::is_identifier(&pod.id) {
        return bad("container id", &pod.id, "has characters it may not have");
    }
    if !pod.netns.is_absolute() {
        return bad(
            "netns",
            &pod.netns.display().to_string(),
            "is not an absolute path",
        );
    }
    Ok(())
}
