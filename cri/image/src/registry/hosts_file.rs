//! The form of `hosts.toml`, and what one of its tables makes of an endpoint.
//!
//! Owns what the keys mean. Which file speaks about a registry, and in which order its hosts are asked, is
//! [`super::hosts`]'s.

use super::hosts::{Endpoint, HostsError, authority, is_loopback};
use super::tls::{ClientPair, Tls};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use toml::Spanned;
use url::Url;

// Keys that newer versions of containerd may have do not make a file useless: unknown ones are passed over.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct File {
    pub server: Option<String>,
    #[serde(flatten)]
    pub own: HostTable,
    pub host: BTreeMap<String, Spanned<HostTable>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct HostTable {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    override_path: bool,
    dial_timeout: Option<String>,
    header: BTreeMap<String, OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn all(&self) -> &[String] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(many) => many,
        }
    }
}

/// `client = "both.pem"`, `["a.pem", "b.pem"]` or `[["cert.pem", "key.pem"], …]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Many(Vec<ClientEntry>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ClientEntry {
    Both(String),
    Pair([String; 2]),
}

/// One file being read, for messages and for what lies beside it.
pub(super) struct Reading<'a> {
    pub path: &'a Path,
    pub directory: &'a Path,
}

impl Reading<'_> {
    /// The endpoint that a host's table describes.
    pub fn endpoint(&self, host: &str, table: &HostTable, upstream: bool) -> Result<Endpoint, HostsError> {
        let bad = || HostsError::Url {
            path: self.path.to_owned(),
            host: host.to_owned(),
        };
        let text = match host.contains("://") {
            true => host.to_owned(),
            false => {
                let name = host.split('/').next().unwrap_or(host);
                let name = name.rsplit_once(':').map_or(name, |(name, _)| name);
                format!("{}://{host}", if is_loopback(name) { "http" } else { "https" })
            }
        };
        let mut base = Url::parse(&text).map_err(|_| bad())?;
        let usable = matches!(base.scheme(), "http" | "https")
            && base.has_host()
            && base.username().is_empty()
            && base.query().is_none();
        if !usable {
            return Err(bad());
        }
        let mut path = base.path().trim_end_matches('/').to_owned();
        if !table.override_path && !path.ends_with("/v2") {
            path.push_str("/v2");
        }
        base.set_path(&path);
        let mut endpoint = Endpoint {
            host: authority(&base),
            base,
            pull: true,
            resolve: true,
            push: true,
            tls: Tls::default(),
            headers: HeaderMap::new(),
            upstream,
            dial_timeout: None,
        };
        self.apply(&mut endpoint, table)?;
        Ok(endpoint)
    }

    /// What a table says, said of an endpoint.
    pub fn apply(&self, endpoint: &mut Endpoint, table: &HostTable) -> Result<(), HostsError> {
        let path = || self.path.to_owned();
        if let Some(capabilities) = &table.capabilities {
            (endpoint.pull, endpoint.resolve, endpoint.push) = (false, false, false);
            for capability in capabilities {
                match capability.as_str() {
                    "pull" => endpoint.pull = true,
                    "resolve" => endpoint.resolve = true,
                    "push" => endpoint.push = true,
                    // For referrers, which we do not ask for.
                    "referrers" => {}
                    other => {
                        return Err(HostsError::Capability {
                            path: path(),
                            capability: other.to_owned(),
                        });
                    }
                }
            }
        }
        for file in table.ca.iter().flat_map(OneOrMany::all) {
            endpoint.tls.ca.push(self.pem(file)?);
        }
        let clients: Vec<(&str, &str)> = match &table.client {
            None => Vec::new(),
            Some(Client::One(both)) => vec![(both, both)],
            Some(Client::Many(many)) => many
                .iter()
                .map(|entry| match entry {
                    ClientEntry::Both(both) => (both.as_str(), both.as_str()),
                    ClientEntry::Pair([cert, key]) if key.is_empty() => (cert.as_str(), cert.as_str()),
                    ClientEntry::Pair([cert, key]) => (cert.as_str(), key.as_str()),
                })
                .collect(),
        };
        for (cert, key) in clients {
            endpoint.tls.clients.push(ClientPair {
                cert: self.pem(cert)?,
                key: self.pem(key)?,
            });
        }
        endpoint.tls.skip_verify |= table.skip_verify.unwrap_or_default();
        for (name, values) in &table.header {
            let bad = || HostsError::Header {
                path: path(),
                name: name.clone(),
            };
            let header: HeaderName = name.parse().map_err(|_| bad())?;
            for value in values.all() {
                let value: HeaderValue = value.parse().map_err(|_| bad())?;
                endpoint.headers.append(header.clone(), value);
            }
        }
        if let Some(timeout) = &table.dial_timeout {
            let parsed = duration(timeout);
            let bad = || HostsError::Duration {
                path: path(),
                timeout: timeout.clone(),
            };
            endpoint.dial_timeout = Some(parsed.ok_or_else(bad)?);
        }
        Ok(())
    }

    fn pem(&self, file: &str) -> Result<Vec<u8>, HostsError> {
        let path = self.directory.join(file);
        let bytes = std::fs::read(&path).map_err(|source| HostsError::Read {
            path: path.clone(),
            source,
        })?;
        match bytes.windows(11).any(|window| window == b"-----BEGIN ") {
            true => Ok(bytes),
            false => Err(HostsError::NoCertificate { path }),
        }
    }
}

/// The simple forms of a Go duration.
fn duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}
