//! The configuration: the file as written, checked. Unknown keys are refused. Knows no setting's use.

mod check;
mod driver;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use slipway_gpu::health::Policy;
use slipway_gpu::signs::{Action, Limits, Rules, Sign};

use crate::kube::Source;

pub use driver::Driver;

/// The default file, with comments.
pub const DEFAULT_TOML: &str = include_str!("default.toml");
/// Read when no `--config` is given and it exists.
pub const DEFAULT_PATH: &str = "/etc/slipway/agent.toml";

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It cannot be read.
    #[error("read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or has other keys.
    #[error("the configuration file {} is not valid:\n{message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A value that cannot be.
    #[error("{key} must not be {value:?}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        reason: &'static str,
    },
}

/// The whole configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the driver is.
    pub driver: Driver,
    /// Where everything else is.
    pub paths: Paths,
    /// What kubelet hands out.
    pub resources: Resources,
    /// The CDI file.
    pub cdi: Cdi,
    /// When a GPU is well.
    pub health: Health,
    /// What is done about those who have a sick GPU.
    pub faults: Faults,
    /// The agent's own server.
    pub http: Http,
    /// What Kubernetes is told.
    pub kubernetes: Kubernetes,
    /// What is logged.
    pub log: Log,
}

/// Where everything else is.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// /proc.
    pub proc: PathBuf,
    /// /sys.
    pub sys: PathBuf,
    /// What is kept.
    pub state: PathBuf,
    /// kubelet's folder of plugins.
    pub kubelet: PathBuf,
    /// The folder of the CDI file.
    pub cdi: PathBuf,
    /// kubelet's socket for who has which device.
    pub pod_resources: PathBuf,
    /// kubelet's socket for its pods.
    pub pods: PathBuf,
    /// The kernel's log.
    pub kmsg: PathBuf,
}

/// How MIG devices are handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigStrategy {
    /// Not.
    None,
    /// As GPUs.
    Single,
    /// By profile.
    Mixed,
}

/// How a container gets its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Allocate {
    /// By CDI names.
    Cdi,
    /// As nodes, mounts and variables.
    Nodes,
}

/// What kubelet hands out.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// The name of whole GPUs.
    pub gpu: String,
    /// MIG.
    pub mig_strategy: MigStrategy,
    /// The way into the container.
    pub allocate: Allocate,
    /// Containers a GPU.
    pub replicas: u32,
    /// Refuse more than one replica a container.
    pub one_replica_a_container: bool,
}

/// The CDI file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cdi {
    /// Vendor and class.
    pub kind: String,
    /// The hooks' program; empty for this one.
    pub hook: PathBuf,
    /// What every container with a GPU gets beside it, where the node has it.
    pub extra: Vec<Extra>,
}

/// Nodes of the machine that work with its GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extra {
    /// GPUDirect Storage.
    Gds,
    /// GDRCopy.
    Gdrcopy,
    /// InfiniBand and RoCE.
    Mofed,
    /// The first IMEX channel.
    Imex,
}

/// The programs that can do the CDI file's hooks.
const HOOK_PROGRAMS: [&str; 3] = ["slipway-agent", "nvidia-cdi-hook", "nvidia-ctk"];

/// When a GPU is well.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// XIDs that condemn nothing.
    pub harmless_xids: Vec<u64>,
    /// Time between probes.
    pub probe_seconds: u64,
    /// Looks that have to find a sign gone.
    pub well_after: u32,
    /// What is done about signs of illness, where it is not the usual.
    pub signs: BTreeMap<Sign, Action>,
    /// How much of something is a sign.
    pub limits: Limits,
}

/// What is done about the containers that have a GPU which an XID has condemned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultAction {
    /// They are ended, and their pods evicted where kubelet would start them again.
    FailAndEvict,
    /// They are ended.
    Fail,
    /// Nothing.
    None,
}

/// What is done about those who have a sick GPU.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// What.
    pub action: FaultAction,
    /// slipwayd's socket for it.
    pub socket: PathBuf,
    /// How long the node may take to hand out less.
    pub wait_seconds: u64,
    /// How long a GPU does not answer until it is lost; 0: for ever.
    pub lost_seconds: u64,
    /// How long a disruption budget is heeded; 0: for ever.
    pub evict_seconds: u64,
    /// Whether containers are kept from starting on a sick GPU.
    pub refuse_start: bool,
}

impl Faults {
    /// After what time of silence a GPU is lost; none: never.
    pub fn lost(&self) -> Option<Duration> {
        (self.lost_seconds > 0).then(|| Duration::from_secs(self.lost_seconds))
    }
}

impl Default for Faults {
    fn default() -> Faults {
        Faults {
            action: FaultAction::FailAndEvict,
            socket: slipway_fault_api::SOCKET.into(),
            wait_seconds: 15,
            lost_seconds: 120,
            evict_seconds: 300,
            refuse_start: true,
        }
    }
}

/// The agent's own server.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Where; none: not at all.
    #[serde(deserialize_with = "address")]
    pub listen: Option<SocketAddr>,
}

impl Default for Http {
    fn default() -> Http {
        Http {
            listen: Some(SocketAddr::from(([0, 0, 0, 0], 9400))),
        }
    }
}

/// Where the node's labels go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelsBy {
    /// Nowhere.
    None,
    /// To the API server.
    Api,
    /// Into a file of node feature discovery's.
    Nfd,
}

/// What Kubernetes is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// "auto", "in-cluster", "none", or a kubeconfig's path.
    pub api: String,
    /// The node's name; empty: looked for.
    pub node: String,
    /// The way of the node's labels.
    pub labels: LabelsBy,
    /// The file for node feature discovery.
    pub nfd_file: PathBuf,
}

impl Default for Kubernetes {
    fn default() -> Kubernetes {
        Kubernetes {
            api: "auto".into(),
            node: String::new(),
            labels: LabelsBy::Api,
            nfd_file: "/etc/kubernetes/node-feature-discovery/features.d/slipway-agent".into(),
        }
    }
}

impl Kubernetes {
    /// How the API server is reached; none: not at all.
    pub fn source(&self) -> Option<Source> {
        let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        match self.api.as_str() {
            "none" => None,
            "auto" => in_pod.then_some(Source::InCluster),
            "in-cluster" => Some(Source::InCluster),
            path => Some(Source::Kubeconfig(path.into())),
        }
    }

    /// The node's name: as configured, as a DaemonSet says it, or the machine's.
    pub fn node(&self) -> String {
        if !self.node.is_empty() {
            return self.node.clone();
        }
        let machine = || {
            rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .to_lowercase()
        };
        std::env::var("NODE_NAME").unwrap_or_else(|_| machine())
    }
}

/// An address, or an empty text.
fn address<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(from)?;
    match text.as_str() {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// What is logged.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The level.
    pub level: String,
    /// The form.
    pub format: LogFormat,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Default for Paths {
    fn default() -> Paths {
        Paths {
            proc: "/proc".into(),
            sys: "/sys".into(),
            state: "/var/lib/slipway-agent".into(),
            kubelet: "/var/lib/kubelet/device-plugins".into(),
            cdi: "/var/run/cdi".into(),
            pod_resources: "/var/lib/kubelet/pod-resources/kubelet.sock".into(),
            pods: "/var/lib/kubelet/pods-api/pods-api.sock".into(),
            kmsg: "/dev/kmsg".into(),
        }
    }
}

impl Default for Resources {
    fn default() -> Resources {
        Resources {
            gpu: "nvidia.com/gpu".into(),
            mig_strategy: MigStrategy::None,
            allocate: Allocate::Cdi,
            replicas: 1,
            one_replica_a_container: true,
        }
    }
}

impl Default for Cdi {
    fn default() -> Cdi {
        Cdi {
            kind: "nvidia.com/gpu".into(),
            hook: PathBuf::new(),
            extra: Vec::new(),
        }
    }
}

impl Default for Health {
    fn default() -> Health {
        Health {
            harmless_xids: slipway_gpu::health::HARMLESS.to_vec(),
            probe_seconds: 10,
            well_after: Rules::default().well_after,
            signs: BTreeMap::new(),
            limits: Limits::default(),
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

impl Health {
    /// Time between probes.
    pub fn probe(&self) -> Duration {
        Duration::from_secs(self.probe_seconds)
    }

    /// What condemns a GPU.
    pub fn policy(&self) -> Policy {
        Policy {
            harmless: self.harmless_xids.clone(),
            rules: Rules {
                actions: self.signs.clone(),
                limits: self.limits.clone(),
                well_after: self.well_after,
            },
        }
    }
}

impl Config {
    /// Reads `path`, or the file in the usual place if there is one, or takes the defaults.
    ///
    /// # Errors
    /// It cannot be read, has unknown keys, or values that cannot be.
    pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
        let usual = Path::new(DEFAULT_PATH);
        let path = match path {
            Some(path) => path,
            None if usual.exists() => usual,
            None => return Ok(Config::default()),
        };
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Config::parse(&text, path)
    }

    /// Parses a file's text; `path` is for the error.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.to_owned(),
            message: e.to_string(),
        })?;
        config.check()?;
        Ok(config)
    }
}
