//! The configuration: the file as written (`Raw`), and what it and the flags come to (`Config`), checked and absolute.
//!
//! Unknown keys are refused with their line. It reads one file and refuses to know what any setting is used for.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cli::Flags;

/// The default file, with comments: what `slipwayd config default` prints.
pub const DEFAULT_TOML: &str = include_str!("default.toml");
/// Read when no `--config` is given and it exists.
const DEFAULT_PATH: &str = "/etc/slipway/config.toml";
pub const BOOT_ID_FILE: &str = "/proc/sys/kernel/random/boot_id";

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration file {} is not valid:\n{message}", path.display())]
    Parse { path: PathBuf, message: String },
    #[error("{key} must be an absolute path without \"..\", not {:?}", value.display())]
    NotAbsolute { key: &'static str, value: PathBuf },
    #[error("{key} must not be {value}: {reason}")]
    Value {
        key: &'static str,
        value: String,
        reason: &'static str,
    },
}

/// The file as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    root: Option<PathBuf>,
    state: Option<PathBuf>,
    socket: Option<PathBuf>,
    fault_socket: Option<PathBuf>,
    log: RawLog,
    runtime: RawRuntime,
    network: RawNetwork,
    images: RawImages,
    cdi: RawCdi,
    stats: RawStats,
    streaming: RawStreaming,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    level: Option<String>,
    format: Option<LogFormat>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRuntime {
    cgroup_driver: Option<CgroupDriver>,
    cgroup_root: Option<String>,
    create_missing_mount_sources: Option<bool>,
    apparmor_profile: Option<String>,
    shm_size_mib: Option<u64>,
    volume_copy_limit_mib: Option<u64>,
    blockio_config_file: Option<PathBuf>,
    handlers: BTreeMap<String, RawHandler>,
    shim: Option<PathBuf>,
    worker: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawHandler {
    shm_size_mib: Option<u64>,
    privileged_without_host_devices: Option<bool>,
    no_new_privileges: Option<bool>,
    default_capabilities: Option<Vec<String>>,
    pass_annotations: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawNetwork {
    conf_dir: Option<PathBuf>,
    bin_dirs: Option<Vec<PathBuf>>,
    conf_template: Option<PathBuf>,
    gc: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawImages {
    certs_dir: Option<PathBuf>,
    docker_config: Option<PathBuf>,
    max_concurrent_downloads: Option<usize>,
    insecure_registries: Option<Vec<String>>,
    answer_with_local_builds: Option<bool>,
    pin_builds_days: Option<u32>,
    build_cache_unused_days: Option<u32>,
    build_cache_percent: Option<u8>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCdi {
    spec_dirs: Option<Vec<PathBuf>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawStats {
    layer_usage_max_age_secs: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawStreaming {
    address: Option<SocketAddr>,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    idle_timeout_secs: Option<u64>,
    stalled_timeout_secs: Option<u64>,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// Who owns the cgroup tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    Cgroupfs,
    Systemd,
}

/// The configuration slipwayd runs with.
#[derive(Debug, Clone, Serialize)]
pub struct Config {
    /// A flag only: nothing an installation may want to set.
    #[serde(skip)]
    pub boot_id_file: PathBuf,
    pub root: PathBuf,
    pub state: PathBuf,
    pub socket: PathBuf,
    /// Where a container can be failed, by root.
    pub fault_socket: PathBuf,
    pub log: Log,
    pub runtime: Runtime,
    pub network: Network,
    pub images: Images,
    pub cdi: Cdi,
    pub stats: Stats,
    pub streaming: Streaming,
}

#[derive(Debug, Clone, Serialize)]
pub struct Log {
    pub level: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Serialize)]
pub struct Runtime {
    pub cgroup_driver: CgroupDriver,
    pub cgroup_root: String,
    pub create_missing_mount_sources: bool,
    /// Empty: none.
    pub apparmor_profile: String,
    pub shm_size_mib: u64,
    pub volume_copy_limit_mib: u64,
    /// Classes of block IO that pods' annotations name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blockio_config_file: Option<PathBuf>,
    pub handlers: BTreeMap<String, Handler>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shim: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<PathBuf>,
}

/// One variant of the runtime, which a RuntimeClass names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Handler {
    pub shm_size_mib: u64,
    /// Privileged containers get every capability, and no device that they do not name.
    pub privileged_without_host_devices: bool,
    /// As if every container asked for no_new_privs.
    pub no_new_privileges: bool,
    /// In the place of the default set; what a container adds and drops counts from here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_capabilities: Option<Vec<String>>,
    /// Which annotations reach the runtime specification: names, or beginnings ending in `*`.
    pub pass_annotations: Vec<String>,
}

impl Runtime {
    /// The variant of this name; `None`: there is none.
    pub fn handler(&self, name: &str) -> Option<Handler> {
        if DEFAULT_HANDLERS.contains(&name) {
            return Some(Handler {
                shm_size_mib: self.shm_size_mib,
                ..Handler::default()
            });
        }
        self.handlers.get(name).cloned()
    }

    /// Every name that a RuntimeClass may have.
    pub fn handler_names(&self) -> impl Iterator<Item = &str> {
        DEFAULT_HANDLERS
            .into_iter()
            .chain(self.handlers.keys().map(String::as_str))
    }
}

/// The default, and ourselves by name.
const DEFAULT_HANDLERS: [&str; 2] = ["", "slipway"];

#[derive(Debug, Clone, Serialize)]
pub struct Network {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conf_template: Option<PathBuf>,
    pub gc: bool,
}

#[derive(Debug, Clone, Serialize)]
pub struct Images {
    pub certs_dir: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub docker_config: Option<PathBuf>,
    pub max_concurrent_downloads: usize,
    pub insecure_registries: Vec<String>,
    pub answer_with_local_builds: bool,
    /// 0: for ever.
    pub pin_builds_days: u32,
    /// 0: age is no reason to go.
    pub build_cache_unused_days: u32,
    pub build_cache_percent: u8,
}

impl Images {
    /// The limits of the store's build cache and of pins.
    #[must_use]
    pub fn upkeep(&self) -> slipway_image::Upkeep {
        let days = |days: u32| (days > 0).then(|| Duration::from_secs(u64::from(days) * 24 * 60 * 60));
        slipway_image::Upkeep {
            pin_builds_for: days(self.pin_builds_days),
            cache_unused_for: days(self.build_cache_unused_days),
            cache_percent: self.build_cache_percent,
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Cdi {
    pub spec_dirs: Vec<PathBuf>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    #[serde(rename = "layer_usage_max_age_secs", serialize_with = "whole_seconds")]
    pub layer_usage_max_age: Duration,
}

/// Where exec, attach and port-forward are served.
#[derive(Debug, Clone, Serialize)]
pub struct Streaming {
    pub address: SocketAddr,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
    #[serde(rename = "idle_timeout_secs", serialize_with = "whole_seconds")]
    pub idle_timeout: Duration,
    #[serde(rename = "stalled_timeout_secs", serialize_with = "whole_seconds")]
    pub stalled_timeout: Duration,
}

/// A certificate chain and its key, PEM.
#[derive(Debug, Clone, Serialize)]
pub struct TlsFiles {
    #[serde(rename = "tls_certificate")]
    pub certificate: PathBuf,
    #[serde(rename = "tls_key")]
    pub key: PathBuf,
}

fn whole_seconds<S: serde::Serializer>(age: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(age.as_secs())
}

impl Config {
    /// Reads the file that the flags name (or the default one, where it exists) and resolves it.
    ///
    /// # Errors
    /// The file cannot be read, has an unknown key or a value of the wrong type, or a value makes no sense.
    pub fn load(flags: &Flags) -> Result<Config, ConfigError> {
        let raw = match &flags.config {
            Some(path) => Raw::read(path)?,
            None if Path::new(DEFAULT_PATH).exists() => Raw::read(Path::new(DEFAULT_PATH))?,
            None => Raw::default(),
        };
        raw.resolve(flags)
    }

    /// The configuration as TOML, for `config check` and verbose status.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("plain tables of strings and numbers serialise")
    }
}

impl Raw {
    fn read(path: &Path) -> Result<Raw, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Raw::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Raw, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        })
    }

    fn resolve(self, flags: &Flags) -> Result<Config, ConfigError> {
        let state = absolute(
            "state",
            flags
                .state
                .clone()
                .or(self.state)
                .unwrap_or_else(|| "/run/slipway".into()),
        )?;
        let socket = flags
            .socket
            .clone()
            .or(self.socket)
            .unwrap_or_else(|| state.join("slipwayd.sock"));
        let fault_socket = self
            .fault_socket
            .unwrap_or_else(|| state.join("fault/fault.sock"));
        let bin_dirs = if flags.cni_bin_dir.is_empty() {
            self.network
                .bin_dirs
                .unwrap_or_else(|| vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()])
        } else {
            flags.cni_bin_dir.clone()
        };
        let conf_dir = flags
            .cni_conf_dir
            .clone()
            .or(self.network.conf_dir)
            .unwrap_or_else(|| "/etc/cni/net.d".into());
        Ok(Config {
            boot_id_file: flags.boot_id_file.clone().unwrap_or_else(|| BOOT_ID_FILE.into()),
            root: absolute(
                "root",
                flags
                    .root
                    .clone()
                    .or(self.root)
                    .unwrap_or_else(|| "/var/lib/slipway".into()),
            )?,
            socket: absolute("socket", socket)?,
            fault_socket: absolute("fault_socket", fault_socket)?,
            state,
            log: Log {
                level: log_level(flags.log_level.clone().or(self.log.level))?,
                format: self.log.format.unwrap_or(LogFormat::Text),
            },
            runtime: self.runtime.resolve()?,
            network: Network {
                conf_dir: absolute("network.conf_dir", conf_dir)?,
                bin_dirs: all_absolute("network.bin_dirs", bin_dirs)?,
                conf_template: self
                    .network
                    .conf_template
                    .map(|path| absolute("network.conf_template", path))
                    .transpose()?,
                gc: self.network.gc,
            },
            images: self.images.resolve()?,
            cdi: Cdi {
                spec_dirs: all_absolute(
                    "cdi.spec_dirs",
                    self.cdi
                        .spec_dirs
                        .unwrap_or_else(|| vec!["/etc/cdi".into(), "/var/run/cdi".into()]),
                )?,
            },
            stats: Stats {
                layer_usage_max_age: Duration::from_secs(self.stats.layer_usage_max_age_secs.unwrap_or(30)),
            },
            streaming: self.streaming.resolve()?,
        })
    }
}

impl RawRuntime {
    fn resolve(self) -> Result<Runtime, ConfigError> {
        let cgroup_root = self.cgroup_root.unwrap_or_else(|| "/slipway".to_owned());
        let plain = Path::new(&cgroup_root)
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
        if cgroup_root.is_empty() || !plain {
            return Err(ConfigError::Value {
                key: "runtime.cgroup_root",
                value: format!("{cgroup_root:?}"),
                reason: "it is a path below the cgroup mounts, or a slice",
            });
        }
        let apparmor_profile = self
            .apparmor_profile
            .unwrap_or_else(|| crate::apparmor::OWN.to_owned());
        if apparmor_profile.chars().any(char::is_control) {
            return Err(ConfigError::Value {
                key: "runtime.apparmor_profile",
                value: format!("{apparmor_profile:?}"),
                reason: "that is no profile's name",
            });
        }
        let shm_size_mib = self.shm_size_mib.unwrap_or(64);
        check_shm("runtime.shm_size_mib", shm_size_mib)?;
        let handlers = self
            .handlers
            .into_iter()
            .map(|(name, raw)| Ok((checked_handler(name)?, raw.resolve(shm_size_mib)?)))
            .collect::<Result<_, ConfigError>>()?;
        Ok(Runtime {
            cgroup_driver: self.cgroup_driver.unwrap_or(CgroupDriver::Cgroupfs),
            cgroup_root,
            create_missing_mount_sources: self.create_missing_mount_sources.unwrap_or(false),
            apparmor_profile,
            shm_size_mib,
            handlers,
            // More than a disk has is no limit; it must only not overflow as bytes.
            volume_copy_limit_mib: self.volume_copy_limit_mib.unwrap_or(1024).min(1 << 40),
            blockio_config_file: self
                .blockio_config_file
                .map(|path| absolute("runtime.blockio_config_file", path))
                .transpose()?,
            shim: self.shim.map(|path| absolute("runtime.shim", path)).transpose()?,
            worker: self
                .worker
                .map(|path| absolute("runtime.worker", path))
                .transpose()?,
        })
    }
}

fn check_shm(key: &'static str, mib: u64) -> Result<(), ConfigError> {
    if mib == 0 || mib > 1 << 30 {
        return Err(ConfigError::Value {
            key,
            value: mib.to_string(),
            reason: "a tmpfs of no size, or of more than a PiB, is a mistake",
        });
    }
    Ok(())
}

/// As Kubernetes wants a RuntimeClass's handler: a DNS label, and none of ours.
fn checked_handler(name: String) -> Result<String, ConfigError> {
    let label = name.len() <= 63
        && !name.starts_with('-')
        && !name.ends_with('-')
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if name.is_empty() || !label || DEFAULT_HANDLERS.contains(&name.as_str()) {
        return Err(ConfigError::Value {
            key: "runtime.handlers",
            value: format!("{name:?}"),
            reason: "a handler is named by a DNS label other than \"slipway\"",
        });
    }
    Ok(name)
}

impl RawHandler {
    fn resolve(self, shm_size_mib: u64) -> Result<Handler, ConfigError> {
        let shm_size_mib = self.shm_size_mib.unwrap_or(shm_size_mib);
        check_shm("runtime.handlers.*.shm_size_mib", shm_size_mib)?;
        Ok(Handler {
            shm_size_mib,
            privileged_without_host_devices: self.privileged_without_host_devices.unwrap_or(false),
            no_new_privileges: self.no_new_privileges.unwrap_or(false),
            default_capabilities: self.default_capabilities,
            pass_annotations: self.pass_annotations.unwrap_or_default(),
        })
    }
}

impl RawImages {
    fn resolve(self) -> Result<Images, ConfigError> {
        let max_concurrent_downloads = self.max_concurrent_downloads.unwrap_or(6);
        if max_concurrent_downloads == 0 {
            return Err(ConfigError::Value {
                key: "images.max_concurrent_downloads",
                value: "0".to_owned(),
                reason: "nothing would ever be pulled",
            });
        }
        let build_cache_percent = self.build_cache_percent.unwrap_or(10);
        if build_cache_percent > 100 {
            return Err(ConfigError::Value {
                key: "images.build_cache_percent",
                value: build_cache_percent.to_string(),
                reason: "it is a part of the filesystem, 0 to 100",
            });
        }
        Ok(Images {
            certs_dir: absolute(
                "images.certs_dir",
                self.certs_dir.unwrap_or_else(|| "/etc/slipway/certs.d".into()),
            )?,
            docker_config: self
                .docker_config
                .map(|path| absolute("images.docker_config", path))
                .transpose()?,
            max_concurrent_downloads,
            insecure_registries: self.insecure_registries.unwrap_or_default(),
            answer_with_local_builds: self.answer_with_local_builds.unwrap_or(true),
            pin_builds_days: self.pin_builds_days.unwrap_or(30),
            build_cache_unused_days: self.build_cache_unused_days.unwrap_or(30),
            build_cache_percent,
        })
    }
}

impl RawStreaming {
    fn resolve(self) -> Result<Streaming, ConfigError> {
        let address = self
            .address
            .unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0));
        if !address.ip().is_loopback() {
            return Err(ConfigError::Value {
                key: "streaming.address",
                value: address.to_string(),
                reason: "whoever connects there with a URL has a shell, and its clients are on this node: it is a \
                         loopback address",
            });
        }
        let idle_timeout = Duration::from_secs(self.idle_timeout_secs.unwrap_or(4 * 60 * 60));
        let stalled_timeout = Duration::from_secs(self.stalled_timeout_secs.unwrap_or(30 * 60));
        for (key, timeout) in [
            ("streaming.idle_timeout_secs", idle_timeout),
            ("streaming.stalled_timeout_secs", stalled_timeout),
        ] {
            if timeout.is_zero() {
                return Err(ConfigError::Value {
                    key,
                    value: "0".to_owned(),
                    reason: "every session would end at once",
                });
            }
        }
        let tls = match (self.tls_certificate, self.tls_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(TlsFiles {
                certificate: absolute("streaming.tls_certificate", certificate)?,
                key: absolute("streaming.tls_key", key)?,
            }),
            (Some(one), None) | (None, Some(one)) => {
                return Err(ConfigError::Value {
                    key: "streaming.tls_certificate and tls_key",
                    value: format!("{:?} alone", one.display()),
                    reason: "each needs the other",
                });
            }
        };
        Ok(Streaming {
            address,
            tls,
            idle_timeout,
            stalled_timeout,
        })
    }
}

/// A relative path would mean something else to each process that is handed it.
fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    let no_dots = path.components().all(|c| !matches!(c, Component::ParentDir));
    if path.is_absolute() && no_dots {
        // Components drop doubled and trailing slashes: these paths are compared with mountinfo's.
        Ok(path.components().collect())
    } else {
        Err(ConfigError::NotAbsolute { key, value: path })
    }
}

/// A word alone is a level: as a filter a misspelt one would be a target that nothing has, and silence.
fn log_level(asked: Option<String>) -> Result<String, ConfigError> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let level = asked.unwrap_or_else(|| "info".to_owned());
    let is_level = |word: &str| LEVELS.iter().any(|known| word.trim().eq_ignore_ascii_case(known));
    let alone = |word: &&str| !word.contains(['=', '[', ':']);
    match level.split(',').filter(alone).find(|word| !is_level(word)) {
        None => Ok(level),
        Some(_) => Err(ConfigError::Value {
            key: "log.level",
            value: format!("{level:?}"),
            reason: "a word alone is one of off, error, warn, info, debug, trace; a filter has the form TARGET=LEVEL,…",
        }),
    }
}

fn all_absolute(key: &'static str, paths: Vec<PathBuf>) -> Result<Vec<PathBuf>, ConfigError> {
    paths.into_iter().map(|path| absolute(key, path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Raw::parse(text, Path::new("test.toml"))?.resolve(&Flags::default())
    }

    #[test]
    fn the_default_file_says_what_an_empty_one_means() {
        let written = parse(DEFAULT_TOML).unwrap().to_toml();
        let empty = parse("").unwrap().to_toml();
        assert_eq!(written, empty);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = parse("root = \"/x\"\n\n[runtime]\ncgroup_drivr = \"systemd\"\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 4"), "{error}");
        assert!(error.contains("cgroup_drivr"), "{error}");
        assert!(error.contains("test.toml"), "{error}");
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused_with_its_line() {
        let error = parse("[runtime]\ncgroup_driver = \"cgroups\"\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(error.contains("systemd"), "{error}");
    }

    #[test]
    fn handlers_are_variants_of_the_runtime_and_have_proper_names() {
        let config =
            parse("[runtime]\nshm_size_mib = 8\n[runtime.handlers.strict]\nno_new_privileges = true\n")
                .unwrap();
        let names: Vec<&str> = config.runtime.handler_names().collect();
        assert_eq!(names, ["", "slipway", "strict"]);
        let strict = config.runtime.handler("strict").unwrap();
        assert!(strict.no_new_privileges && strict.shm_size_mib == 8);
        assert!(!config.runtime.handler("").unwrap().no_new_privileges);
        assert_eq!(config.runtime.handler("kata"), None);
        for bad in ["slipway", "Strict", "a.b", "\"\""] {
            assert!(
                parse(&format!("[runtime.handlers.{bad}]\nshm_size_mib = 8\n")).is_err(),
                "{bad}"
            );
        }
        assert!(parse("[runtime.handlers.x]\nkernel = \"y\"\n").is_err());
    }

    #[test]
    fn a_misspelt_level_of_the_log_is_refused() {
        for good in [
            "info",
            "OFF",
            "warn,slipwayd=debug",
            "slipwayd::pod=trace",
            "[span]=debug",
        ] {
            assert!(parse(&format!("[log]\nlevel = \"{good}\"\n")).is_ok(), "{good}");
        }
        for bad in ["inof", "", "warn,nonsense"] {
            let error = parse(&format!("[log]\nlevel = \"{bad}\"\n")).unwrap_err();
            assert!(error.to_string().starts_with("log.level must not be"), "{error}");
        }
    }

    #[test]
    fn relative_and_climbing_paths_are_refused_by_key() {
        for text in ["root = \"var/lib\"", "root = \"/var/../etc\""] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("root must be"), "{error}");
        }
    }

    #[test]
    fn the_socket_follows_the_state_directory_unless_it_is_named() {
        let flags = Flags {
            state: Some("/tmp/s/".into()),
            ..Flags::default()
        };
        let config = Raw::default().resolve(&flags).unwrap();
        assert_eq!(config.socket, Path::new("/tmp/s/slipwayd.sock"));
        assert_eq!(config.state.as_os_str(), "/tmp/s");
    }

    #[test]
    fn streams_are_served_on_loopback_and_a_certificate_needs_its_key() {
        let error = |text: &str| parse(&format!("[streaming]\n{text}")).unwrap_err().to_string();
        assert!(error("address = \"0.0.0.0:10010\"").contains("loopback"));
        assert!(error("address = \"localhost\"").contains("line 2"));
        assert!(error("tls_key = \"/key.pem\"").contains("each needs the other"));
        assert!(error("idle_timeout_secs = 0").contains("end at once"));
        assert!(error("stalled_timeout_secs = 0").contains("streaming.stalled_timeout_secs"));
        let all = "address = \"[::1]:1\"\ntls_certificate = \"/c\"\ntls_key = \"/k\"\nidle_timeout_secs = 60\nstalled_timeout_secs = 30";
        let text = parse(&format!("[streaming]\n{all}")).unwrap().to_toml();
        assert!(text.contains(all), "{text}");
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Flags {
            root: Some("/flag".into()),
            cni_bin_dir: vec!["/plugins".into()],
            log_level: Some("trace".into()),
            ..Flags::default()
        };
        let raw = Raw::parse("root = \"/file\"\n[log]\nlevel = \"warn\"", Path::new("x")).unwrap();
        let config = raw.resolve(&flags).unwrap();
        assert_eq!(config.root, Path::new("/flag"));
        assert_eq!(config.network.bin_dirs, [PathBuf::from("/plugins")]);
        assert_eq!(config.log.level, "trace");
    }
}
