//! What slipwayd keeps about pods and containers in the catalog, in the words it is kept in.
//!
//! ```text
//! kind              id            name (unique)                     written
//! pod               pod id        name_namespace_uid_attempt        once, before the first outside effect: the intent
//! pod-state         pod id                                          at each change of phase; missing: never got READY
//! container         container id  podid_name_attempt                once, before the first outside effect: the intent
//! container-state   container id                                    at each change of phase; missing: never got CREATED
//! network-release   pod id                                          a CNI DEL not proven yet
//! ```
//! Fixed and changing halves are apart so that a change of state rewrites a few hundred bytes. Deleting goes state
//! first: what is left in between reads as an intent to be undone.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use slipway_image::Store;
use slipway_network::Attachment;

use crate::error::Error;
use crate::ids::{ContainerId, PodId};
use crate::model::{ContainerConfig, PodConfig, Resources};

/// Raised when an older slipwayd could no longer read what we write: it then leaves alone what has the new number.
const VERSION: u32 = 1;

/// The version written into records, and the newest that is read.
pub fn version() -> u32 {
    crate::version::records(VERSION)
}

/// A kind of record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Pod,
    PodState,
    Container,
    ContainerState,
    NetworkRelease,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::Pod => "pod",
            Kind::PodState => "pod-state",
            Kind::Container => "container",
            Kind::ContainerState => "container-state",
            Kind::NetworkRelease => "network-release",
        }
    }
}

/// A pod as it was asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodRecord {
    pub version: u32,
    pub id: PodId,
    pub created_at_ns: i64,
    /// Namespaces, mounts and processes mean nothing on another boot.
    pub boot_id: String,
    pub config: PodConfig,
}

/// What has become of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodState {
    pub version: u32,
    pub phase: PodPhase,
    pub network: PodNetworkState,
    /// Where each namespace is pinned.
    #[serde(default)]
    pub namespaces: Vec<PinnedNamespace>,
    /// The built-in init of a shared PID namespace.
    #[serde(default)]
    pub init_pid: Option<u32>,
    /// What UpdatePodSandboxResources said last.
    #[serde(default)]
    pub resources: Option<(Resources, Resources)>,
}

impl PodState {
    /// Of one that nobody has been told of yet.
    pub fn starting() -> PodState {
        PodState {
            version: version(),
            phase: PodPhase::Starting,
            network: PodNetworkState::Host,
            namespaces: Vec::new(),
            init_pid: None,
            resources: None,
        }
    }
}

/// One of a pod's namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedNamespace {
    pub kind: String,
    pub path: std::path::PathBuf,
}

/// Where a pod is in its life.
///
/// ```text
/// Starting ──▶ Ready ──▶ NotReady ──▶ Stopping ──▶ Stopped ──▶ Removing ──▶ (gone)
///     │          └──────────────────────▲             ▲
///     └▶ undone                         └─ (failed) ──┘ retried by the next StopPodSandbox, or at start
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodPhase {
    /// RunPodSandbox is in progress; nobody has been told of the pod.
    Starting,
    Ready,
    /// Its shim, or its init, is gone: nothing runs, the network is still attached.
    NotReady {
        reason: String,
    },
    /// StopPodSandbox has begun.
    Stopping,
    Stopped,
    /// RemovePodSandbox has begun.
    Removing,
}

impl PodPhase {
    /// Something is being given back: a full disk must not stand in the way.
    pub fn gives_back(&self) -> bool {
        match self {
            PodPhase::Starting | PodPhase::Ready => false,
            PodPhase::NotReady { .. } | PodPhase::Stopping | PodPhase::Stopped | PodPhase::Removing => true,
        }
    }
}

/// What the pod holds of the network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodNetworkState {
    /// The host's.
    Host,
    /// ADD is about to run, or was running when we died: DEL must run.
    Planned(Box<Attachment>),
    Attached(Box<Attachment>),
    /// DEL has been proven, or a network-release record has taken it over.
    Released,
}

/// A container as it was asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerRecord {
    pub version: u32,
    pub id: ContainerId,
    pub pod: PodId,
    pub created_at_ns: i64,
    pub boot_id: String,
    pub config: ContainerConfig,
}

/// What has become of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerState {
    pub version: u32,
    pub phase: ContainerPhase,
    pub made: Made,
    /// What UpdateContainerResources left in force; `None`: the configuration's.
    #[serde(default)]
    pub resources: Option<Resources>,
    /// Somebody had it failed: its end has this reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
}

/// Why a container must not go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// One word.
    pub reason: String,
    pub message: String,
    /// When that was asked for: what had ended by then is none of its doing.
    pub at_ns: i64,
    /// Its end is brought about by whoever finds it alive; else it is announced only.
    pub kill: bool,
    /// Until when it counts although it is only announced: whoever announced it may never come back.
    pub stands_until_ns: i64,
    /// Until when its pod gets no other container of its name.
    pub held_until_ns: i64,
}

impl Fault {
    /// An end as it is told: with this reason, unless it had come before.
    pub fn told(&self, exit: Exited) -> Exited {
        if self.caused(&exit) {
            return Exited {
                reason: self.reason.clone(),
                message: self.message.clone(),
                ..exit
            };
        }
        exit
    }

    /// Takes up what another request asks for; the first reason stays. Whether that changes anything.
    pub fn join(&mut self, other: &Fault) -> bool {
        let before = self.clone();
        self.kill |= other.kill;
        self.stands_until_ns = self.stands_until_ns.max(other.stands_until_ns);
        self.held_until_ns = self.held_until_ns.max(other.held_until_ns);
        before != *self
    }

    /// Whether it still counts then.
    pub fn stands_at(&self, at_ns: i64) -> bool {
        self.kill || at_ns < self.stands_until_ns
    }

    /// Whether the end came after it, and while it counted.
    pub fn caused(&self, exit: &Exited) -> bool {
        exit.finished_at_ns >= self.at_ns && self.stands_at(exit.finished_at_ns)
    }
}

/// What CreateContainer found out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Made {
    /// Image.id.
    pub image_id: String,
    /// The image as people know it: what was asked for, or a name of it when that was an id.
    pub image_name: String,
    /// What status answers as image_ref: a repository digest where there is one, else the id.
    pub image_ref: String,
    pub log_path: Option<std::path::PathBuf>,
    pub stop_signal: String,
    pub uid: u32,
    pub gid: u32,
    pub supplemental_groups: Vec<u32>,
    /// Of the container's init, as the host sees it; 0 until it is started.
    pub pid: u32,
    pub warnings: Vec<String>,
}

/// Where a container is in its life.
///
/// ```text
/// Creating ──▶ Created ──▶ Running ──▶ Exited ──▶ Removing ──▶ (gone)
///     └▶ undone    └────────────────────▲
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerPhase {
    /// CreateContainer is in progress; nobody has been told of it.
    Creating,
    /// The shim has it: its init waits in its namespaces and cgroup, or is being made.
    Created,
    Running {
        started_at_ns: i64,
    },
    Exited(Exited),
    /// RemoveContainer has begun; how it had ended before, if it had.
    Removing(Option<Exited>),
}

impl ContainerPhase {
    /// Something is being given back: a full disk must not stand in the way.
    pub fn gives_back(&self) -> bool {
        match self {
            ContainerPhase::Creating | ContainerPhase::Created | ContainerPhase::Running { .. } => false,
            ContainerPhase::Exited(_) | ContainerPhase::Removing(_) => true,
        }
    }
}

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exited {
    /// 0: it never started.
    pub started_at_ns: i64,
    pub finished_at_ns: i64,
    pub code: i32,
    /// Completed, Error, OOMKilled, or what happened to it.
    pub reason: String,
    pub message: String,
}

/// A CNI DEL that has not been proven: what to run, until it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkRelease {
    pub version: u32,
    pub pod: PodId,
    pub boot_id: String,
    pub since_ns: i64,
    pub attachment: Attachment,
}

/// The records of the catalog, off the async threads.
#[derive(Clone)]
pub struct Records {
    store: Store,
}

impl Records {
    pub fn new(store: Store) -> Records {
        Records { store }
    }

    /// Writes a record, new or changed.
    pub async fn put<T: Serialize>(&self, kind: Kind, id: &str, record: &T) -> Result<(), Error> {
        self.write(kind, id, None, record).await
    }

    /// Writes a record whose name nobody else may have.
    ///
    /// # Errors
    /// [`Error::NameTaken`] says who has it.
    pub async fn reserve<T: Serialize>(
        &self,
        kind: Kind,
        id: &str,
        name: &str,
        record: &T,
    ) -> Result<(), Error> {
        self.write(kind, id, Some(name.to_owned()), record).await
    }

    /// Writes a record that says what is being given back: an end, a removal. A full disk does not stop it.
    pub async fn put_giving_back<T: Serialize>(&self, kind: Kind, id: &str, record: &T) -> Result<(), Error> {
        let json = encode(kind, id, record)?;
        let (store, id) = (self.store.clone(), id.to_owned());
        crate::blocking::run(move || {
            store
                .records()
                .put_giving_back(kind.as_str(), &id, &json)
                .map_err(|error| Error::from_record(kind.as_str(), &id, error))
        })
        .await
    }

    async fn write<T: Serialize>(
        &self,
        kind: Kind,
        id: &str,
        name: Option<String>,
        record: &T,
    ) -> Result<(), Error> {
        let json = encode(kind, id, record)?;
        let (store, id) = (self.store.clone(), id.to_owned());
        crate::blocking::run(move || {
            store
                .records()
                .put(kind.as_str(), &id, name.as_deref(), &json)
                .map_err(|error| Error::from_record(kind.as_str(), name.as_deref().unwrap_or(&id), error))
        })
        .await
    }

    /// Removes a record; one that is not there is gone.
    pub async fn delete(&self, kind: Kind, id: &str) -> Result<(), Error> {
        self.delete_all([kind], id).await
    }

    /// Removes records of one thing in this order: what is left after a crash has to read as an intent.
    pub async fn delete_all<const N: usize>(&self, kinds: [Kind; N], id: &str) -> Result<(), Error> {
        let (store, id) = (self.store.clone(), id.to_owned());
        crate::blocking::run(move || {
            for kind in kinds {
                let deleted = store.records().delete(kind.as_str(), &id);
                deleted.map_err(|error| Error::from_record(kind.as_str(), &id, error))?;
            }
            Ok(())
        })
        .await
    }

    /// All records of a kind by id. One that cannot be read is noted and left alone, never dropped: a newer slipwayd may
    /// know it.
    pub async fn list<T: DeserializeOwned + Send + 'static>(
        &self,
        kind: Kind,
        unreadable: &mut Unreadable,
    ) -> Result<BTreeMap<String, T>, Error> {
        let store = self.store.clone();
        let rows = crate::blocking::run(move || {
            store
                .records()
                .list(kind.as_str())
                .map_err(|error| Error::from_record(kind.as_str(), "all", error))
        })
        .await?;
        let mut records = BTreeMap::new();
        for row in rows {
            match decode(&row.json) {
                Ok(record) => {
                    records.insert(row.id, record);
                }
                Err(why) => unreadable.note(kind, row.id, why),
            }
        }
        Ok(records)
    }
}

/// A record's version, which is looked at before anything else of it.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

fn decode<T: DeserializeOwned>(json: &str) -> Result<T, String> {
    let Versioned { version: found } = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let known = version();
    if found > known {
        return Err(format!(
            "it has version {found}, and this slipwayd knows up to {known}"
        ));
    }
    serde_json::from_str(json).map_err(|error| error.to_string())
}

fn encode<T: Serialize>(kind: Kind, id: &str, record: &T) -> Result<String, Error> {
    serde_json::to_string(record).map_err(|source| Error::Encode {
        what: kind.as_str(),
        id: id.to_owned(),
        source,
    })
}

/// Pods and containers that are known to exist and nothing else of them: a record of theirs, or of the pod they belong
/// to, cannot be read. Nothing of theirs is touched.
#[derive(Debug, Clone, Default)]
pub struct Unreadable(BTreeMap<String, Untold>);

/// Why one of them cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Untold {
    /// What the record is of: `pod`, `container-state` …
    pub kind: &'static str,
    pub why: String,
}

impl Unreadable {
    pub fn contains(&self, id: &str) -> bool {
        self.0.contains_key(id)
    }

    pub fn get(&self, id: &str) -> Option<&Untold> {
        self.0.get(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Untold)> {
        self.0.iter().map(|(id, untold)| (id.as_str(), untold))
    }

    /// Notes a record, and says so: somebody has to look at it.
    pub fn note(&mut self, kind: Kind, id: String, why: String) {
        let kind = kind.as_str();
        tracing::error!(
            kind,
            id,
            why,
            "a record cannot be read: what belongs to it is left alone, until a slipwayd that reads it comes or it is removed by hand"
        );
        self.0.entry(id).or_insert(Untold { kind, why });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_counts_for_its_time_and_a_kill_for_ever() {
        let exited = |finished_at_ns| Exited {
            finished_at_ns,
            reason: "Completed".into(),
            ..Exited::default()
        };
        let mut fault = Fault {
            reason: "GpuXid79".into(),
            message: "m".into(),
            at_ns: 10,
            kill: false,
            stands_until_ns: 20,
            held_until_ns: 0,
        };
        let told = |fault: &Fault, at| fault.told(exited(at)).reason;
        assert_eq!(
            [9, 10, 19, 20].map(|at| told(&fault, at)),
            ["Completed", "GpuXid79", "GpuXid79", "Completed"]
        );
        let again = Fault {
            stands_until_ns: 30,
            ..fault.clone()
        };
        assert!(fault.join(&again) && !fault.join(&again) && told(&fault, 29) == "GpuXid79");
        let kill = Fault {
            kill: true,
            stands_until_ns: 0,
            ..fault.clone()
        };
        assert!(fault.join(&kill) && fault.stands_at(i64::MAX) && told(&fault, 31) == "GpuXid79");
    }

    #[test]
    fn a_record_of_a_later_version_or_none_is_not_read_and_the_reason_is_told() {
        let record = NetworkRelease {
            version: version(),
            pod: PodId::random().unwrap(),
            boot_id: "b".into(),
            since_ns: 1,
            attachment: serde_json::from_value(serde_json::json!({
                "version": 1, "containerId": "a", "network": "n", "ifname": "eth0", "netns": "/n", "cniVersion": "1.0.0",
                "args": "", "plugins": [], "capabilityArgs": {}
            }))
            .unwrap(),
        };
        let mut json = serde_json::to_value(&record).unwrap();
        decode::<NetworkRelease>(&json.to_string()).unwrap();
        json["version"] = (version() + 1).into();
        // Whatever else a later version says: it is not looked at.
        json["pod"] = serde_json::Value::Null;
        let why = decode::<NetworkRelease>(&json.to_string()).unwrap_err();
        assert!(why.contains(&format!("version {}", version() + 1)), "{why}");
        assert!(decode::<NetworkRelease>("{\"torn\"").is_err());
    }
}
