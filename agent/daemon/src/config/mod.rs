//! The configuration: the file as written, checked. Unknown keys are refused. Knows no setting's use.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

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
    /// The agent's own server.
    pub http: Http,
    /// What is logged.
    pub log: Log,
}

/// Where the driver is.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Driver {
    /// Its root.
    pub root: PathBuf,
    /// Its device nodes; empty: `dev` below the root.
    pub dev: PathBuf,
    /// libnvidia-ml; empty: looked for.
    pub library: PathBuf,
    /// How long NVML may take.
    pub deadline_ms: u64,
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

impl Default for Driver {
    fn default() -> Driver {
        Driver {
            root: "/".into(),
            dev: PathBuf::new(),
            library: PathBuf::new(),
            deadline_ms: 5000,
        }
    }
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
        }
    }
}

impl Default for Health {
    fn default() -> Health {
        Health {
            harmless_xids: slipway_gpu::health::HARMLESS.to_vec(),
            probe_seconds: 10,
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

impl Driver {
    /// Its folder of device nodes.
    pub fn dev_dir(&self) -> PathBuf {
        if self.dev.as_os_str().is_empty() {
            self.root.join("dev")
        } else {
            self.dev.clone()
        }
    }

    /// How long NVML may take.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms)
    }
}

impl Health {
    /// Time between probes.
    pub fn probe(&self) -> Duration {
        Duration::from_secs(self.probe_seconds)
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

    fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, value: &dyn std::fmt::Display, reason| {
            Err(ConfigError::Value {
                key,
                value: value.to_string(),
                reason,
            })
        };
        for (key, path) in [
            ("driver.root", &self.driver.root),
            ("paths.proc", &self.paths.proc),
            ("paths.sys", &self.paths.sys),
            ("paths.state", &self.paths.state),
            ("paths.kubelet", &self.paths.kubelet),
            ("paths.cdi", &self.paths.cdi),
            ("paths.pod_resources", &self.paths.pod_resources),
            ("paths.pods", &self.paths.pods),
            ("paths.kmsg", &self.paths.kmsg),
        ] {
            if !path.is_absolute() {
                return bad(key, &path.display(), "it is not an absolute path");
            }
        }
        for (key, path) in [
            ("driver.dev", &self.driver.dev),
            ("driver.library", &self.driver.library),
        ] {
            if !path.as_os_str().is_empty() && !path.is_absolute() {
                return bad(key, &path.display(), "it is neither empty nor an absolute path");
            }
        }
        let domain = self
            .resources
            .gpu
            .split_once('/')
            .filter(|(d, n)| !d.is_empty() && !n.is_empty());
        if domain.is_none() || self.resources.gpu.len() > 253 {
            return bad(
                "resources.gpu",
                &self.resources.gpu,
                "it is not of the form domain/name",
            );
        }
        let probe: Result<slipway_cdi::QualifiedName, _> = format!("{}=all", self.cdi.kind).parse();
        if probe.is_err() {
            return bad("cdi.kind", &self.cdi.kind, "it is not of the form vendor/class");
        }
        let hook = &self.cdi.hook;
        let known = hook
            .file_name()
            .is_some_and(|n| HOOK_PROGRAMS.iter().any(|known| n == *known));
        let usable = hook.as_os_str().is_empty() || hook.is_absolute() && known;
        if !usable {
            return bad(
                "cdi.hook",
                &hook.display().to_string(),
                "it is no absolute path of slipway-agent, nvidia-cdi-hook or nvidia-ctk",
            );
        }
        if !(1..=128).contains(&self.resources.replicas) {
            return bad(
                "resources.replicas",
                &self.resources.replicas,
                "it is not from 1 to 128",
            );
        }
        if !(1..=3600).contains(&self.health.probe_seconds) {
            return bad(
                "health.probe_seconds",
                &self.health.probe_seconds,
                "it is not from 1 to 3600",
            );
        }
        if !(100..=600_000).contains(&self.driver.deadline_ms) {
            return bad(
                "driver.deadline_ms",
                &self.driver.deadline_ms,
                "it is not from 100 to 600000",
            );
        }
        if self.log.level.parse::<tracing::Level>().is_err() {
            return bad(
                "log.level",
                &self.log.level,
                "it is none of error, warn, info, debug, trace",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("agent.toml"))
    }

    #[test]
    fn the_file_that_is_printed_says_what_holds_without_one() {
        let printed = parse(DEFAULT_TOML).expect("the default file is valid");
        assert_eq!(format!("{printed:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn unknown_keys_and_values_that_cannot_be_are_refused_by_name() {
        for (text, said) in [
            ("[driver]\nrooot = \"/\"\n", "rooot"),
            ("[driver]\nroot = \"driver\"\n", "driver.root"),
            ("[resources]\ngpu = \"gpu\"\n", "resources.gpu"),
            ("[resources]\nmig_strategy = \"both\"\n", "both"),
            ("[resources]\nreplicas = 0\n", "resources.replicas"),
            ("[cdi]\nkind = \"gpu\"\n", "cdi.kind"),
            ("[cdi]\nhook = \"/bin/true\"\n", "cdi.hook"),
            ("[cdi]\nhook = \"slipway-agent\"\n", "cdi.hook"),
            ("[log]\nlevel = \"loud\"\n", "log.level"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
