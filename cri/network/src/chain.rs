//! Running a network's plugins in their order, each with its request, and whose turn it is.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::{OwnedMutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::time::Instant;

use crate::attachment::{Attachment, PluginConfig};
use crate::config::{self, Folder, Network};
use crate::error::{CniError, PluginError};
use crate::netns;
use crate::plugin::{self, Call};
use crate::result::NetworkResult;
use crate::version::Versions;

/// How long one waits for a moment without other operations, and how often is looked.
const ALONE: Duration = Duration::from_secs(600);
const ALONE_PAUSE: Duration = Duration::from_millis(50);

/// How long a plugin may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    pub(crate) add: Duration,
    pub(crate) del: Duration,
    pub(crate) check: Duration,
    pub(crate) probe: Duration,
}

/// The folder of configurations, the plugins' binaries, and who is at work.
#[derive(Debug)]
pub(crate) struct Plugins {
    pub(crate) folder: Folder,
    pub(crate) bin_dirs: Vec<PathBuf>,
    pub(crate) deadlines: Deadlines,
    versions: Versions,
    /// Shared by operations on containers; GC takes it alone.
    pub(crate) gate: RwLock<()>,
    /// Why the plugins cannot work, as they said when they were last asked.
    pub(crate) complaint: Mutex<Option<String>>,
    busy: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Plugins {
    pub(crate) fn complaint(&self) -> Option<String> {
        self.complaint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn complain(&self, reason: Option<String>) {
        *self.complaint.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    pub(crate) fn new(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>, deadlines: Deadlines) -> Plugins {
        // Plugins run in another working directory than ours.
        let absolute = |dir: PathBuf| std::path::absolute(&dir).unwrap_or(dir);
        Plugins {
            folder: Folder::new(absolute(conf_dir)),
            bin_dirs: bin_dirs.into_iter().map(absolute).collect(),
            deadlines,
            versions: Versions::default(),
            gate: RwLock::new(()),
            complaint: Mutex::default(),
            busy: Mutex::default(),
        }
    }

    /// The folders of binaries, for messages and as CNI_PATH.
    pub(crate) fn dirs(&self, separator: &str) -> String {
        let dirs: Vec<_> = self.bin_dirs.iter().map(|d| d.display().to_string()).collect();
        dirs.join(separator)
    }

    /// Waits for a moment in which nothing else is under way. Not in the queue: behind whoever waits there for one slow
    /// plugin, everybody else would wait too.
    pub(crate) async fn alone(&self, network: &str) -> Result<RwLockWriteGuard<'_, ()>, CniError> {
        let until = Instant::now() + ALONE;
        loop {
            if let Ok(gate) = self.gate.try_write() {
                return Ok(gate);
            }
            if Instant::now() >= until {
                return Err(CniError::Busy {
                    network: network.to_owned(),
                    waited: ALONE,
                });
            }
            tokio::time::sleep(ALONE_PAUSE).await;
        }
    }

    /// Waits for one's turn at a container.
    pub(crate) async fn enter(&self, id: &str) -> (RwLockReadGuard<'_, ()>, Turn<'_>) {
        let gate = self.gate.read().await;
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(busy.entry(id.to_owned()).or_default())
        };
        // Made before waiting: given up while waiting, it takes the entry away too.
        let mut turn = Turn {
            plugins: self,
            id: id.to_owned(),
            held: None,
        };
        turn.held = Some(lock.lock_owned().await);
        (gate, turn)
    }

    /// The newest version that the configuration offers and all its plugins know. They are asked
    /// only where there is a choice.
    pub(crate) async fn choose_version(&self, network: &Network) -> Result<String, CniError> {
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

    /// A plugin's binary.
    pub(crate) fn program(
        &self,
        act: &'static str,
        network: &str,
        plugin: &PluginConfig,
    ) -> Result<PathBuf, CniError> {
        plugin::find(&plugin.kind, &self.bin_dirs).ok_or_else(|| CniError::PluginMissing {
            act,
            network: network.to_owned(),
            plugin: plugin.kind.clone(),
            dirs: self.dirs(", "),
        })
    }

    /// Runs ADD of all plugins; `ran` tells how far it came.
    pub(crate) async fn add_chain(
        &self,
        attachment: &mut Attachment,
        ran: &mut usize,
    ) -> Result<(), CniError> {
        for i in 0..attachment.plugins.len() {
            *ran = i;
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

    /// Asks the plugins, last one first, to undo what ADD did.
    ///
    /// A complete connection stops at the first failure: as long as a later plugin holds something
    /// (a mapped port), an earlier one must not let go of what it points to (the address). One that
    /// was never complete has served nobody: all plugins are asked.
    pub(crate) async fn del_chain(&self, attachment: &Attachment) -> Result<(), CniError> {
        let mut first = Ok(());
        for plugin in attachment.plugins.iter().rev() {
            let got = self.del_one(attachment, plugin).await;
            if attachment.complete {
                got?;
            } else {
                first = first.and(got);
            }
        }
        first
    }

    /// As [`Plugins::del_chain`] right after `failed` ended an ADD at plugin number `ran`: what counts
    /// is what plugins up to there say. The one that failed may refuse to undo with the very words
    /// with which it refused to do (a configuration it does not take): it has done nothing then.
    pub(crate) async fn undo(
        &self,
        attachment: &Attachment,
        ran: usize,
        failed: &CniError,
    ) -> Result<(), CniError> {
        let mut first = Ok(());
        for (i, plugin) in attachment.plugins.iter().enumerate().rev() {
            match self.del_one(attachment, plugin).await {
                Err(_) if i > ran => {}
                Err(e) if i == ran && same_answer(&e, failed) => {}
                got => first = first.and(got),
            }
        }
        first
    }

    async fn del_one(&self, attachment: &Attachment, plugin: &PluginConfig) -> Result<(), CniError> {
        let prev = attachment
            .result
            .as_ref()
            .filter(|_| at_least(&attachment.cni_version, "0.4.0"));
        // The namespace may go at any time: looked at for each plugin.
        let netns = Some(&attachment.netns).filter(|n| netns::is_pinned(n));
        let env = self.env(attachment, netns);
        let stdin = request(attachment, plugin, prev);
        match self
            .call("DEL", attachment, plugin, env, stdin, self.deadlines.del)
            .await
        {
            // "Container unknown": there is nothing left to undo.
            Ok(_)
            | Err(CniError::Plugin {
                source: PluginError::Answer { code: 3, .. },
                ..
            }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    pub(crate) async fn ask_status(&self) -> Result<(), CniError> {
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

    pub(crate) fn env(
        &self,
        attachment: &Attachment,
        netns: Option<&PathBuf>,
    ) -> Vec<(&'static str, String)> {
        let mut env = vec![
            ("CNI_CONTAINERID", attachment.container_id.clone()),
            ("CNI_IFNAME", attachment.ifname.clone()),
            ("CNI_ARGS", attachment.args.clone()),
            ("CNI_PATH", self.dirs(":")),
        ];
        if let Some(netns) = netns {
            env.push(("CNI_NETNS", netns.display().to_string()));
        }
        env
    }

    pub(crate) async fn call(
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
    pub(crate) async fn call_network(
        &self,
        act: &'static str,
        network: &str,
        plugin: &PluginConfig,
        config: Map<String, Value>,
    ) -> Result<(), CniError> {
        let program = self.program(act, network, plugin)?;
        let env = vec![("CNI_PATH", self.dirs(":"))];
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
pub(crate) struct Turn<'a> {
    plugins: &'a Plugins,
    id: String,
    held: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut busy = self.plugins.busy.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Whether two failures of one plugin are the same refusal, or it did not even start both times.
fn same_answer(a: &CniError, b: &CniError) -> bool {
    let (CniError::Plugin { source: a, .. }, CniError::Plugin { source: b, .. }) = (a, b) else {
        return false;
    };
    match (a, b) {
        (
            PluginError::Answer {
                code: c1, msg: m1, ..
            },
            PluginError::Answer {
                code: c2, msg: m2, ..
            },
        ) => c1 == c2 && m1 == m2,
        (PluginError::Run { .. }, PluginError::Run { .. }) => true,
        _ => false,
    }
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
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
pub(crate) fn at_least(version: &str, wanted: &str) -> bool {
    let place = |v: &str| config::VERSIONS.iter().position(|known| *known == v);
    place(version) >= place(wanted)
}

/// A plugin's configuration as it is given on standard input: untouched but for the protocol's own keys.
pub(crate) fn base_request(plugin: &PluginConfig, network: &str, version: &str) -> Map<String, Value> {
    let mut config = plugin.config.clone();
    config.retain(|k, _| {
        !matches!(k.as_str(), "capabilities" | "runtimeConfig" | "prevResult") && !k.starts_with("cni.dev/")
    });
    config.insert("cniVersion".to_owned(), version.into());
    config.insert("name".to_owned(), network.into());
    config
}

pub(crate) fn request(attachment: &Attachment, plugin: &PluginConfig, prev: Option<&Value>) -> Vec<u8> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_made_absolute_since_plugins_run_elsewhere() {
        let second = Duration::from_secs(1);
        let deadlines = Deadlines {
            add: second,
            del: second,
            check: second,
            probe: second,
        };
        let plugins = Plugins::new(
            "net.d".into(),
            vec!["bin".into(), "/usr/lib/cni".into()],
            deadlines,
        );
        assert!(
            plugins.bin_dirs.iter().all(|d| d.is_absolute()),
            "{:?}",
            plugins.bin_dirs
        );
    }
}
