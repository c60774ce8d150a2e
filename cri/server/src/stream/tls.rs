//! The streaming server's certificate and key, read from their PEM files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::TlsFiles;

/// Why they cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read a PEM {what} from {}", path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        source: PemError,
    },
    #[error("the key {} does not belong to the certificate {}", key.display(), certificate.display())]
    Pair {
        certificate: PathBuf,
        key: PathBuf,
        source: rustls::Error,
    },
    #[error("cannot set TLS up")]
    Versions { source: rustls::Error },
}

/// Reads a certificate chain and its key.
///
/// # Errors
/// [`TlsError`] names the file.
pub fn load(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let unreadable = |what, path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::Read { what, path, source }
    };
    let (certificate, key) = (&files.certificate, &files.key);
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(unreadable("certificate", certificate))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(unreadable("private key", key))?;
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|source| TlsError::Versions { source })?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|source| TlsError::Pair {
            certificate: certificate.clone(),
            key: key.clone(),
            source,
        })?;
    Ok(Arc::new(config))
}
