//! Where a registry's images are served: `hosts.toml` as containerd reads it.
//!
//! ```text
//! <certs_dir>/
//!   docker.io/hosts.toml           for references of docker.io
//!   quay.io:443/hosts.toml         also as quay.io_443_/
//!   quay.io/{*.crt, *.cert, *.key} docker's way of saying CA and client certificates, where there is no hosts.toml
//!   _default/hosts.toml            for every registry without a directory of its own
//! ```
//! The hosts of the file are asked in its order, then `server` (the registry itself by default). Owns where
//! to look; refuses to make requests. The files are read again for each pull: an edit counts at once.

use super::hosts_file::{File, Reading};
use super::tls::{ClientPair, Tls};
use reqwest::header::HeaderMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use url::Url;

/// One place to ask, with the way to ask there.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// The base of the API, ending in `/v2` without a slash (or what override_path says).
    pub base: Url,
    /// For messages: `host` or `host:port`.
    pub host: String,
    /// May be asked for objects by digest.
    pub pull: bool,
    /// May be asked what a tag means.
    pub resolve: bool,
    /// May be pushed to.
    pub push: bool,
    /// Certificates.
    pub tls: Tls,
    /// Sent with each request to this host, and to no other.
    pub headers: HeaderMap,
    /// The registry of the reference, as it is or as `server` says: explicit credentials are meant for it.
    pub upstream: bool,
    /// How long a connection may take, where the file says so.
    pub dial_timeout: Option<Duration>,
}

/// `hosts.toml`, or something it names, cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostsError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a hosts.toml", path.display())]
    Parse { path: PathBuf, source: toml::de::Error },
    #[error("{}: {host:?} is not the URL of a registry", path.display())]
    Url { path: PathBuf, host: String },
    #[error("{}: {capability:?} is not a capability: pull, resolve or push", path.display())]
    Capability { path: PathBuf, capability: String },
    #[error("{}: {name:?} cannot be sent as a header", path.display())]
    Header { path: PathBuf, name: String },
    #[error("{}: {timeout:?} is not a duration, as in 10s", path.display())]
    Duration { path: PathBuf, timeout: String },
    #[error("{} holds no certificate in PEM form", path.display())]
    NoCertificate { path: PathBuf },
}

/// The places to ask for a registry's images, in order. Blocks.
pub(crate) fn endpoints(
    certs_dir: Option<&Path>,
    registry: &str,
    insecure: &[String],
) -> Result<Vec<Endpoint>, HostsError> {
    let directory = certs_dir.and_then(|dir| directory(dir, registry));
    let Some(directory) = directory else {
        return Ok(defaults(registry, insecure, Tls::default()));
    };
    let path = directory.join("hosts.toml");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(defaults(registry, insecure, docker_certificates(&directory)?));
        }
        Err(source) => return Err(HostsError::Read { path, source }),
    };
    let file: File = toml::from_str(&text).map_err(|source| HostsError::Parse {
        path: path.clone(),
        source,
    })?;
    let reading = Reading {
        path: &path,
        directory: &directory,
    };
    // Tables come sorted by name; their order in the file is the order to ask in.
    let mut hosts: Vec<_> = file.host.iter().collect();
    hosts.sort_by_key(|(_, table)| table.span().start);
    let mut endpoints: Vec<Endpoint> = Vec::with_capacity(hosts.len() + 2);
    for (host, table) in hosts {
        endpoints.push(reading.endpoint(host, table.as_ref(), false)?);
    }
    match &file.server {
        Some(server) => endpoints.push(reading.endpoint(server, &file.own, true)?),
        None => {
            for mut endpoint in defaults(registry, insecure, Tls::default()) {
                reading.apply(&mut endpoint, &file.own)?;
                endpoints.push(endpoint);
            }
        }
    }
    Ok(endpoints)
}

/// The directory that speaks about a registry.
fn directory(certs_dir: &Path, registry: &str) -> Option<PathBuf> {
    // A reference's registry never has a slash, and never is `..`.
    let escaped = registry
        .rsplit_once(':')
        .map(|(host, port)| format!("{host}_{port}_"));
    let names = escaped
        .into_iter()
        .chain([registry.to_owned(), "_default".to_owned()]);
    names.map(|name| certs_dir.join(name)).find(|dir| dir.is_dir())
}

/// Whether a host is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The registry itself: https, but plain http on this machine (unless the port is 443), and for insecure ones
/// https without checks, then http.
fn defaults(registry: &str, insecure: &[String], tls: Tls) -> Vec<Endpoint> {
    let served_by = if registry == "docker.io" {
        "registry-1.docker.io"
    } else {
        registry
    };
    let (name, port) = match served_by.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (served_by, None),
    };
    let at = |scheme: &str, tls: Tls| {
        // What parsed as the host of a reference parses as the host of a URL; if not, nobody can be asked.
        let base = Url::parse(&format!("{scheme}://{served_by}/v2")).ok()?;
        let host = served_by.to_owned();
        let headers = HeaderMap::new();
        Some(Endpoint {
            base,
            host,
            pull: true,
            resolve: true,
            push: true,
            tls,
            headers,
            upstream: true,
            dial_timeout: None,
        })
    };
    let listed = insecure.iter().any(|host| host == registry || host == name);
    let plain = is_loopback(name) && port != Some("443") && !tls.is_set();
    match (listed, plain) {
        (_, true) => at("http", tls).into_iter().collect(),
        (true, false) => {
            let unchecked = Tls {
                skip_verify: true,
                ..tls.clone()
            };
            at("https", unchecked)
                .into_iter()
                .chain(at("http", tls))
                .collect()
        }
        (false, false) => at("https", tls).into_iter().collect(),
    }
}

/// Certificates as docker has them in a host's directory.
fn docker_certificates(directory: &Path) -> Result<Tls, HostsError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| HostsError::Read {
            path: path.to_owned(),
            source,
        })
    };
    let entries = std::fs::read_dir(directory).map_err(|source| HostsError::Read {
        path: directory.to_owned(),
        source,
    })?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    let mut tls = Tls::default();
    for path in &paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(read(path)?),
            Some("cert") => {
                tls.clients.push(ClientPair {
                    cert: read(path)?,
                    key: read(&path.with_extension("key"))?,
                });
            }
            _ => {}
        }
    }
    Ok(tls)
}

/// `host` or `host:port` of a URL.
pub(crate) fn authority(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (host, _) => host.unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(registry: &str, files: &[(&str, &str)]) -> Result<Vec<Endpoint>, HostsError> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        endpoints(Some(dir.path()), registry, &[])
    }

    fn bases(endpoints: &[Endpoint]) -> Vec<&str> {
        endpoints.iter().map(|endpoint| endpoint.base.as_str()).collect()
    }

    #[test]
    fn without_files_the_registry_itself_is_asked() {
        let of = |registry: &str| {
            let endpoints = endpoints(None, registry, &["insecure.x".to_owned()]).unwrap();
            endpoints.iter().map(|e| e.base.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(of("docker.io"), ["https://registry-1.docker.io/v2"]);
        assert_eq!(of("quay.io"), ["https://quay.io/v2"]);
        assert_eq!(of("h.x:5000"), ["https://h.x:5000/v2"]);
        assert_eq!(of("127.0.0.1:5000"), ["http://127.0.0.1:5000/v2"]);
        assert_eq!(of("localhost"), ["http://localhost/v2"]);
        assert_eq!(of("[::1]:5000"), ["http://[::1]:5000/v2"]);
        assert_eq!(of("localhost:443"), ["https://localhost/v2"]);
        assert_eq!(
            of("insecure.x:8080"),
            ["https://insecure.x:8080/v2", "http://insecure.x:8080/v2"]
        );
    }

    #[test]
    fn hosts_are_asked_in_the_order_of_the_file_and_then_the_server() {
        let text = r#"
            server = "https://registry-1.docker.io"
            [host."https://z.mirror"]
              capabilities = ["pull"]
            [host."http://a.mirror:81/prefix"]
              capabilities = ["pull", "resolve"]
            [host."http://a.mirror:81/prefix".header]
              x-team = ["one", "two"]
            [host."https://m.mirror/api/registry"]
              override_path = true
              skip_verify = true
              dial_timeout = "250ms"
        "#;
        let endpoints = read("docker.io", &[("docker.io/hosts.toml", text)]).unwrap();
        assert_eq!(
            bases(&endpoints),
            [
                "https://z.mirror/v2",
                "http://a.mirror:81/prefix/v2",
                "https://m.mirror/api/registry",
                "https://registry-1.docker.io/v2"
            ]
        );
        let may: Vec<(bool, bool, bool)> = endpoints.iter().map(|e| (e.pull, e.resolve, e.push)).collect();
        assert_eq!(
            may,
            [
                (true, false, false),
                (true, true, false),
                (true, true, true),
                (true, true, true)
            ]
        );
        assert_eq!(endpoints[1].headers.get_all("x-team").iter().count(), 2);
        assert!(endpoints[2].tls.skip_verify && !endpoints[3].tls.skip_verify);
        assert_eq!(endpoints[2].dial_timeout, Some(Duration::from_millis(250)));
        let upstream: Vec<bool> = endpoints.iter().map(|e| e.upstream).collect();
        assert_eq!(upstream, [false, false, false, true]);
    }

    #[test]
    fn the_default_directory_is_for_registries_without_their_own() {
        let files = [
            ("_default/hosts.toml", "[host.\"http://127.0.0.1:5000\"]"),
            ("h.x_81_/hosts.toml", "server = \"http://h.x:81\""),
            ("i.x:82/hosts.toml", "server = \"i.x:82\""),
        ];
        let of = |registry| bases(&read(registry, &files).unwrap()).join(" ");
        assert_eq!(of("quay.io"), "http://127.0.0.1:5000/v2 https://quay.io/v2");
        assert_eq!(of("h.x:81"), "http://h.x:81/v2");
        assert_eq!(of("i.x:82"), "https://i.x:82/v2");
    }

    #[test]
    fn keys_of_the_file_itself_are_for_the_server() {
        let text = "skip_verify = true\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"https://m.x\"]";
        let endpoints = read("q.x", &[("q.x/hosts.toml", text)]).unwrap();
        assert!(!endpoints[0].tls.skip_verify && endpoints[0].push);
        assert!(endpoints[1].tls.skip_verify && !endpoints[1].push);
    }

    #[test]
    fn certificates_are_read_relative_to_the_file_and_docker_style_without_one() {
        let pem = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";
        let text = "ca = \"ca.pem\"\nclient = [[\"c.pem\", \"k.pem\"], [\"c.pem\", \"\"]]";
        let files = [
            ("q.x/hosts.toml", text),
            ("q.x/ca.pem", pem),
            ("q.x/c.pem", pem),
            ("q.x/k.pem", pem),
        ];
        let endpoints = read("q.x", &files).unwrap();
        assert_eq!(
            (endpoints[0].tls.ca.len(), endpoints[0].tls.clients.len()),
            (1, 2)
        );
        let files = [
            ("q.x/a.crt", pem),
            ("q.x/b.cert", pem),
            ("q.x/b.key", pem),
            ("q.x/README", ""),
        ];
        let endpoints = read("q.x", &files).unwrap();
        assert_eq!(
            (endpoints[0].tls.ca.len(), endpoints[0].tls.clients.len()),
            (1, 1)
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let error = |text: &str| read("q.x", &[("q.x/hosts.toml", text)]).unwrap_err().to_string();
        assert!(error("server = 3").contains("hosts.toml"));
        assert!(error("capabilities = [\"fly\"]").contains("\"fly\""));
        assert!(error("ca = \"gone.pem\"").contains("gone.pem"));
        assert!(error("[host.\"ftp://x\"]").contains("ftp://x"));
        assert!(error("[host.\"https://u:p@x\"]").contains("is not the URL"));
        assert!(error("dial_timeout = \"soon\"").contains("soon"));
        assert!(error("[header]\n\"b ad\" = \"x\"").contains("b ad"));
    }

    #[test]
    fn unknown_keys_do_not_make_a_file_useless() {
        let endpoints = read(
            "q.x",
            &[("q.x/hosts.toml", "future = 1\n[host.\"https://m.x\"]\nnew = true")],
        );
        assert_eq!(endpoints.unwrap().len(), 2);
    }
}
