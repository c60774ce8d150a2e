//! The operations on the configured network: ADD, DEL, CHECK, STATUS, GC, after CNI 1.1 section 3.
//!
//! Locking: operations on one container id run one after another; GC runs alone, as the
//! specification asks. Lock order: the gate (shared for ADD, DEL, CHECK; alone for GC), then the
//! container's.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::attachment::{self, Attachment};
use crate::chain::{Deadlines, Plugins, at_least, base_request, chain, request};
use crate::config;
use crate::error::CniError;
use crate::netns;
use crate::plugin;
use crate::pod::PodNetwork;
use crate::reservation;
use crate::template::{self, PodCidrs};

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

/// What became of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    /// It is filled in, at this path.
    Written(PathBuf),
    /// It was, with the same.
    Unchanged(PathBuf),
    /// There is a network of this name already, which is not ours to replace.
    OtherNetwork(String),
}

/// The file that a template becomes. Early among the others, as the network that was meant for the node.
const RENDERED: &str = "10-slipway-net.conflist";

/// The configured network and its plugins. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cni {
    inner: Arc<Plugins>,
}

impl Cni {
    /// The network configured in `conf_dir`, with plugins from `bin_dirs` (the first that has one
    /// wins). Nothing is read yet.
    pub fn new(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>) -> Cni {
        Cni::with_deadline(conf_dir, bin_dirs, Duration::from_secs(90))
    }

    /// As [`Cni::new`], with how long each plugin may take for ADD and DEL.
    pub fn with_deadline(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>, deadline: Duration) -> Cni {
        let deadlines = Deadlines {
            add: deadline,
            del: deadline,
            check: deadline.min(Duration::from_secs(30)),
            probe: deadline.min(Duration::from_secs(10)),
        };
        Cni {
            inner: Arc::new(Plugins::new(conf_dir, bin_dirs, deadlines)),
        }
    }

    /// Whether there is a usable network whose plugins are there, and did not say otherwise when [`Cni::probe`] last asked;
    /// the folder is read again when it has changed.
    pub fn status(&self) -> NetworkStatus {
        match (self.configured(), self.inner.complaint()) {
            (NetworkStatus::Ready { .. }, Some(reason)) => NetworkStatus::NotReady { reason },
            (status, _) => status,
        }
    }

    /// The configured network's name, whether its plugins can work or not.
    pub fn network(&self) -> Option<String> {
        self.inner
            .folder
            .network()
            .ok()
            .map(|network| network.name.clone())
    }

    fn configured(&self) -> NetworkStatus {
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
                    self.inner.dirs(", ")
                ),
            },
            None => NetworkStatus::Ready {
                network: network.name.clone(),
            },
        }
    }

    /// Makes the network configuration from a template and the addresses that the node's pods may have. A network that
    /// somebody else has configured stays.
    ///
    /// # Errors
    /// The template cannot be filled in, does not come to a configuration, or cannot be written.
    pub fn install(&self, template: &str, cidrs: &PodCidrs) -> Result<Installed, CniError> {
        let text = template::render(template, cidrs)?;
        let (network, _) =
            config::parse_list(text.as_bytes()).map_err(|reason| CniError::Rendered { reason })?;
        if network.plugins.is_empty() {
            let reason = "it has no plugins".to_owned();
            return Err(CniError::Rendered { reason });
        }
        let dir = self.inner.folder.dir();
        let path = dir.join(RENDERED);
        match std::fs::read(&path) {
            Ok(old) if old == text.as_bytes() => return Ok(Installed::Unchanged(path)),
            Ok(_) => {}
            Err(_) => {
                if let Ok(network) = self.inner.folder.network() {
                    return Ok(Installed::OtherNetwork(network.name.clone()));
                }
            }
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CniError::Write { path, source }
        };
        std::fs::create_dir_all(dir).map_err(failed(dir))?;
        // No name that anybody takes for a configuration; whole or not there.
        let new = dir.join(format!("{RENDERED}.new"));
        std::fs::File::create(&new)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .map_err(failed(&new))?;
        std::fs::rename(&new, &path).map_err(failed(&path))?;
        Ok(Installed::Written(path))
    }

    /// As [`Cni::status`], but asks the plugins themselves where they speak 1.1 (STATUS).
    pub async fn probe(&self) -> NetworkStatus {
        let answer = match self.configured() {
            NetworkStatus::Ready { .. } => self.inner.ask_status().await,
            NetworkStatus::NotReady { .. } => Ok(()),
        };
        self.inner.complain(answer.err().map(|e| chain(&e)));
        self.status()
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
    /// error is returned.
    ///
    /// # Errors
    /// The failing plugin's, or a result without an address for the pod: nothing is left of it
    /// then. [`CniError::NotUndone`] when something may be: the plan is to be given to
    /// [`Cni::del`] until that succeeds.
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
        for plugin in &plan.plugins {
            self.inner.program("ADD", &plan.network, plugin)?;
        }
        let mut attachment = plan;
        let mut ran = 0;
        match self.inner.add_chain(&mut attachment, &mut ran).await {
            Ok(()) => Ok(attachment),
            Err(error) => match self.inner.undo(&attachment, ran, &error).await {
                Ok(()) => Err(error),
                Err(undo) => Err(CniError::NotUndone {
                    add: Box::new(error),
                    undo: chain(&undo),
                }),
            },
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
    /// they let go of everything else. `valid` is called when no other operation is under way, and
    /// none begins until this has ended; while some are under way others begin as ever. Does nothing when another network is configured, when the
    /// configuration forbids it, or before CNI 1.1.
    ///
    /// # Errors
    /// The first plugin's that failed, after all were asked; [`CniError::Busy`] when there was no moment without another
    /// operation for a long time.
    pub async fn gc(&self, network: &str, valid: impl FnOnce() -> Vec<Attachment>) -> Result<(), CniError> {
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
        let _alone = self.inner.alone(network).await?;
        let valid: Vec<Value> = valid()
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

    /// Lets go of the addresses of the configured network that were reserved before `boot`, the moment this boot began: what
    /// used them is gone, whoever it belonged to, and after a power cut DEL may not find them. Reservations that name a
    /// container id which is `known` stay. The addresses. Blocks; does nothing where the addresses are not `host-local`'s.
    ///
    /// # Errors
    /// No usable network; a reservation that cannot be read or removed; another operation that holds their lock for seconds.
    pub fn forget_before(
        &self,
        boot: SystemTime,
        known: impl Fn(&str) -> bool,
    ) -> Result<Vec<IpAddr>, CniError> {
        let network = self
            .inner
            .folder
            .network()
            .map_err(|reason| CniError::NotReady { reason })?;
        let mut gone = Vec::new();
        for folder in reservation::folders(&network.name, &network.plugins) {
            let some = reservation::forget(&folder, boot, &known)
                .map_err(|(path, source)| CniError::Reservation { path, source })?;
            gone.extend(some);
        }
        Ok(gone)
    }
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
    for port in pod.port_mappings.iter().filter(|p| p.host_port != 0) {
        if port.container_port == 0 {
            return bad(
                "port mapping",
                &port.host_port.to_string(),
                "leads to port 0 of the pod",
            );
        }
        if !port.host_ip.is_empty() && port.host_ip.parse::<std::net::IpAddr>().is_err() {
            return bad("port mapping", &port.host_ip, "is not an address of the host");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_becomes_the_network_unless_there_is_another() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("net.d");
        let cni = Cni::new(dir.clone(), Vec::new());
        let template = r#"{"cniVersion":"1.0.0","name":"node","plugins":[{"type":"ptp","ipam":{"subnet":"{{.PodCIDR}}"}}]}"#;
        let cidrs = |text| PodCidrs::parse(text).unwrap();
        let path = dir.join(RENDERED);
        assert_eq!(
            cni.install(template, &cidrs("10.1.0.0/24")).unwrap(),
            Installed::Written(path.clone())
        );
        assert_eq!(
            cni.install(template, &cidrs("10.1.0.0/24")).unwrap(),
            Installed::Unchanged(path.clone())
        );
        assert_eq!(
            cni.install(template, &cidrs("10.2.0.0/24")).unwrap(),
            Installed::Written(path.clone())
        );
        assert!(std::fs::read_to_string(&path).unwrap().contains("10.2.0.0/24"));
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);

        std::fs::remove_file(&path).unwrap();
        let other = r#"{"cniVersion":"1.0.0","name":"other","type":"ptp"}"#;
        std::fs::write(dir.join("20-other.conf"), other).unwrap();
        let stays = cni.install(template, &cidrs("10.1.0.0/24")).unwrap();
        assert_eq!(stays, Installed::OtherNetwork("other".into()));
        assert!(!path.exists());
        for bad in [
            "{{.Other}}",
            "{}",
            r#"{"cniVersion":"1.0.0","name":"x","plugins":[]}"#,
        ] {
            assert!(cni.install(bad, &cidrs("10.1.0.0/24")).is_err(), "{bad}");
        }
    }
}
