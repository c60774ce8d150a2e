//! Registries: the distribution protocol, who we are to them, and where they are.
//!
//! Owns every HTTP request of the program. Refuses to know the store: what arrives is bytes and descriptors.

mod auth;
mod challenge;
pub(crate) mod client;
mod credentials;
mod docker_config;
pub(crate) mod failure;
mod hosts;
mod hosts_file;
pub(crate) mod manifest;
#[cfg(test)]
mod origin_tests;
pub(crate) mod retry;
mod tls;
pub(crate) mod transport;

pub use credentials::{AuthFields, BadAuthField, Credentials};

use std::path::PathBuf;
use std::time::Duration;

/// What PullImage answers for a tag whose newest writer was a build on this node, when the registry says not
/// found, denied, or cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum LocalBuilds {
    /// That build: it exists nowhere else.
    #[default]
    Answer,
    /// What the registry said.
    Refuse,
}

/// How registries are reached.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// The tree of `<host>/hosts.toml` files.
    pub certs_dir: Option<PathBuf>,
    /// Docker's `config.json`; [`RegistryConfig::user_docker_config`] is where a user has it. `None`: nobody's.
    pub docker_config: Option<PathBuf>,
    /// Transfers at a time, of all pulls and pushes together.
    pub max_concurrent: usize,
    /// What we call ourselves.
    pub user_agent: String,
    /// Registries (`host` or `host:port`) that are spoken to over plain http, or https without checks.
    pub insecure: Vec<String>,
    /// What a pull answers for a local build that no registry knows.
    pub local_builds: LocalBuilds,
    /// How often a transfer that makes no progress is tried.
    pub attempts: u32,
    /// The pause before the second attempt; it doubles with each one.
    pub first_pause: Duration,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long a registry may be silent in the middle of an answer.
    pub read_timeout: Duration,
    /// A transfer that brings less than [`RegistryConfig::slow_bytes`] while it is waited for this long is cut, and
    /// has made no progress.
    pub slow_window: Duration,
    /// See [`RegistryConfig::slow_window`]: far below what any link brings that still works.
    pub slow_bytes: u64,
    /// Blobs at least this long are fetched in ranges, several at a time, where the registry can do that.
    pub range_threshold: u64,
    /// How long a range is.
    pub range_chunk: u64,
    /// Bytes a second of one connection from which on several are not worth it.
    pub fast_enough: u64,
}

impl Default for RegistryConfig {
    fn default() -> RegistryConfig {
        RegistryConfig {
            certs_dir: None,
            docker_config: None,
            max_concurrent: 6,
            user_agent: concat!("slipway/", env!("CARGO_PKG_VERSION")).to_owned(),
            insecure: Vec::new(),
            local_builds: LocalBuilds::Answer,
            attempts: 6,
            first_pause: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(15),
            read_timeout: Duration::from_secs(60),
            slow_window: Duration::from_secs(60),
            slow_bytes: 64 << 10,
            range_threshold: 32 << 20,
            range_chunk: 4 << 20,
            fast_enough: 100 << 20,
        }
    }
}

impl RegistryConfig {
    /// Where a user has docker's configuration: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
    pub fn user_docker_config() -> Option<PathBuf> {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let directory = set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")))?;
        Some(directory.join("config.json"))
    }
}
