//! How the API server is reached: a pod's service account, or a kubeconfig. Read anew for every connection, since tokens and
//! certificates are replaced while we run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::Uri;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;

const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Where the way is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the pod: variables, and files of its service account.
    InCluster,
    /// In a kubeconfig file.
    Kubeconfig(PathBuf),
}

/// Why there is no way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// A file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// This is not a pod.
    #[error(
        "find the API server: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set (kubernetes.api = \"in-cluster\" is for pods)"
    )]
    NotInCluster,
    /// The file is no kubeconfig.
    #[error("read the kubeconfig {} as YAML", path.display())]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: slipway_cdi::ParseError,
    },
    /// Something that it has to have is not in it, or something that is not done.
    #[error("use the kubeconfig {}: {what}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What.
        what: String,
    },
    /// A certificate or key is not one.
    #[error("use the {what} of the API server's access")]
    Tls {
        /// Which.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The way.
#[derive(Debug)]
pub struct Access {
    /// Scheme, host and port.
    pub server: Uri,
    /// For https.
    pub tls: Arc<ClientConfig>,
    /// A bearer token.
    pub token: Option<String>,
}

fn read(path: &Path) -> Result<Vec<u8>, AccessError> {
    std::fs::read(path).map_err(|source| AccessError::Read {
        path: path.to_owned(),
        source,
    })
}

impl Source {
    /// Reads the way.
    ///
    /// # Errors
    /// A file is not there, or not what it should be.
    pub fn load(&self) -> Result<Access, AccessError> {
        match self {
            Source::InCluster => in_cluster(),
            Source::Kubeconfig(path) => Kubeconfig::read(path)?.access(),
        }
    }
}

fn in_cluster() -> Result<Access, AccessError> {
    let var = |name| std::env::var(name).map_err(|_| AccessError::NotInCluster);
    let (host, port) = (var("KUBERNETES_SERVICE_HOST")?, var("KUBERNETES_SERVICE_PORT")?);
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        host
    };
    let server = format!("https://{host}:{port}");
    let account = Path::new(ACCOUNT);
    let token = String::from_utf8_lossy(&read(&account.join("token"))?)
        .trim()
        .to_owned();
    Ok(Access {
        server: server.parse().map_err(|_| AccessError::NotInCluster)?,
        tls: tls(Some(&read(&account.join("ca.crt"))?), None)?,
        token: Some(token),
    })
}

fn failed<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> AccessError {
    move |e| AccessError::Tls {
        what,
        source: Box::new(e),
    }
}

/// Certificate and key, as PEM.
type Identity = (Vec<u8>, Vec<u8>);

fn tls(authority: Option<&[u8]>, identity: Option<Identity>) -> Result<Arc<ClientConfig>, AccessError> {
    let mut roots = RootCertStore::empty();
    for certificate in authority.into_iter().flat_map(CertificateDer::pem_slice_iter) {
        let certificate = certificate.map_err(failed("authority's certificate"))?;
        roots
            .add(certificate)
            .map_err(failed("authority's certificate"))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(failed("protocol versions"))?
        .with_root_certificates(roots);
    Ok(Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&certificate).collect();
            let chain = chain.map_err(failed("client's certificate"))?;
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(failed("client's key"))?;
            let with = builder.with_client_auth_cert(chain, key);
            with.map_err(failed("client's certificate and key"))?
        }
    }))
}

/// A kubeconfig, and its current context's cluster and user.
struct Kubeconfig<'a> {
    path: &'a Path,
    cluster: Value,
    user: Value,
}

impl<'a> Kubeconfig<'a> {
    fn read(path: &'a Path) -> Result<Kubeconfig<'a>, AccessError> {
        let text = String::from_utf8_lossy(&read(path)?).into_owned();
        let all = slipway_cdi::yaml(&text).map_err(|source| AccessError::Yaml {
            path: path.to_owned(),
            source,
        })?;
        let not = |what: String| AccessError::Kubeconfig {
            path: path.to_owned(),
            what,
        };
        let named = |list: &str, entry: &str, name: &str| {
            let all = all[list].as_array().into_iter().flatten();
            let found = all.filter(|e| e["name"] == name).map(|e| e[entry].clone()).next();
            found.ok_or_else(|| not(format!("there is no {entry} {name:?}")))
        };
        let current = all["current-context"].as_str().unwrap_or_default();
        let context = named("contexts", "context", current)?;
        let of = |key: &str| context[key].as_str().unwrap_or_default().to_owned();
        Ok(Kubeconfig {
            path,
            cluster: named("clusters", "cluster", &of("cluster"))?,
            user: named("users", "user", &of("user"))?,
        })
    }

    fn not(&self, what: impl Into<String>) -> AccessError {
        AccessError::Kubeconfig {
            path: self.path.to_owned(),
            what: what.into(),
        }
    }

    /// A file by its path (relative to the kubeconfig), or the same in base64.
    fn bytes(&self, from: &Value, key: &str) -> Result<Option<Vec<u8>>, AccessError> {
        use base64::Engine;
        if let Some(data) = from[format!("{key}-data")].as_str() {
            let data: String = data.split_whitespace().collect();
            let bytes = base64::engine::general_purpose::STANDARD.decode(data);
            return bytes
                .map(Some)
                .map_err(|e| self.not(format!("{key}-data is not base64: {e}")));
        }
        match from[key].as_str() {
            Some(file) => {
                let folder = self.path.parent().unwrap_or(Path::new("/"));
                read(&folder.join(file)).map(Some)
            }
            None => Ok(None),
        }
    }

    fn access(&self) -> Result<Access, AccessError> {
        let server = self.cluster["server"].as_str().unwrap_or_default();
        let server: Uri = server
            .parse()
            .map_err(|_| self.not(format!("{server:?} is no URL of a server")))?;
        if server.host().is_none() || !matches!(server.scheme_str(), Some("http" | "https")) {
            return Err(self.not(format!("{server} is no URL of a server")));
        }
        for key in ["exec", "auth-provider", "username"] {
            if !self.user[key].is_null() {
                return Err(self.not(format!(
                    "users' {key} is not done here: give it a token, a tokenFile or a client's certificate"
                )));
            }
        }
        if self.cluster["insecure-skip-tls-verify"].as_str() == Some("true") {
            return Err(self.not("insecure-skip-tls-verify is not done: give it the authority's certificate"));
        }
        let certificate = self.bytes(&self.user, "client-certificate")?;
        let identity = certificate.zip(self.bytes(&self.user, "client-key")?);
        let authority = self.bytes(&self.cluster, "certificate-authority")?;
        let token = match (self.user["token"].as_str(), self.user["tokenFile"].as_str()) {
            (Some(token), _) => Some(token.to_owned()),
            (None, Some(file)) => Some(String::from_utf8_lossy(&read(Path::new(file))?).trim().to_owned()),
            (None, None) => None,
        };
        Ok(Access {
            server,
            tls: tls(authority.as_deref(), identity)?,
            token,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Access, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config");
        std::fs::write(&path, text).expect("written");
        std::fs::write(dir.path().join("token"), "secret\n").expect("written");
        let text = text.replace("DIR", &dir.path().display().to_string());
        std::fs::write(&path, text).expect("written");
        Source::Kubeconfig(path).load().map_err(|e| e.to_string())
    }

    fn config(cluster: &str, user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: other\n  cluster: {{server: \"https://other\"}}\n- name: c\n  cluster: {cluster}\nusers:\n- name: u\n  user: {user}\ncontexts:\n- name: x\n  context: {{cluster: c, user: u}}\ncurrent-context: x\n"
        )
    }

    #[test]
    fn the_current_contexts_server_and_token_are_taken() {
        let access = load(&config(
            "{server: \"https://10.0.0.1:6443\"}",
            "{tokenFile: DIR/token}",
        ))
        .expect("a way");
        assert_eq!(access.server, "https://10.0.0.1:6443");
        assert_eq!(access.token.as_deref(), Some("secret"));
        let access = load(&config("{server: \"http://localhost\"}", "{token: abc}")).expect("a way");
        assert_eq!(access.token.as_deref(), Some("abc"));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (text, said) in [
            (config("{server: \"https://a\"}", "{exec: {command: x}}"), "exec"),
            (config("{server: nowhere}", "{token: a}"), "nowhere"),
            (
                config("{server: \"https://a\"}", "{token: a}")
                    .replace("current-context: x", "current-context: y"),
                "\"y\"",
            ),
            (
                config(
                    "{server: \"https://a\", certificate-authority-data: \"%\"}",
                    "{token: a}",
                ),
                "certificate-authority-data",
            ),
            (
                config(
                    "{server: \"https://a\", certificate-authority: none.crt}",
                    "{token: a}",
                ),
                "none.crt",
            ),
            (config("{server: \"https://a\"}", "{username: x}"), "username"),
            ("{".to_owned(), "YAML"),
        ] {
            let error = load(&text).expect_err(&text);
            assert!(error.contains(said), "{said}: {error}");
        }
    }
}
