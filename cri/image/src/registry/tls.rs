//! TLS of one host: which authorities are believed, which certificate we show. ring does the cryptography.
//!
//! Owns rustls's configuration. Refuses to read files, except for the system's certificates, once.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::sync::{Arc, OnceLock};

/// What one host needs; PEM bytes, so that a changed file is another value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Tls {
    /// Authorities beside the system's.
    pub ca: Vec<Vec<u8>>,
    /// Certificates to show; the first is used.
    pub clients: Vec<ClientPair>,
    /// Believe any certificate.
    pub skip_verify: bool,
}

/// A certificate chain with its key, in PEM.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct ClientPair {
    /// The chain.
    pub cert: Vec<u8>,
    /// The key.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for ClientPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientPair(…)")
    }
}

/// The certificates given for a host cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("a CA certificate cannot be read")]
    Ca(#[source] rustls::pki_types::pem::Error),
    #[error("a CA certificate cannot be used")]
    CaUse(#[source] rustls::Error),
    #[error("the client certificate or its key cannot be read")]
    Client(#[source] rustls::pki_types::pem::Error),
    #[error("TLS cannot be set up")]
    Config(#[source] rustls::Error),
}

impl Tls {
    /// Whether anything is asked for.
    pub fn is_set(&self) -> bool {
        *self != Tls::default()
    }

    /// rustls's configuration. Reads the system's certificates when it is the first.
    pub fn config(&self) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Config)?;
        let builder = match self.skip_verify {
            true => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(BelieveAnything { provider })),
            false => builder.with_root_certificates(self.roots()?),
        };
        let mut config = match self.clients.first() {
            None => builder.with_no_client_auth(),
            Some(pair) => {
                let chain: Result<Vec<CertificateDer<'static>>, _> =
                    CertificateDer::pem_slice_iter(&pair.cert).collect();
                let key = PrivateKeyDer::from_pem_slice(&pair.key).map_err(TlsError::Client)?;
                let chain = chain.map_err(TlsError::Client)?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(TlsError::Config)?
            }
        };
        // Parallel transfers are meant to be parallel connections.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    /// For connections that must not become TLS ones.
    pub fn believing_nobody() -> Result<ClientConfig, TlsError> {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Config)?;
        Ok(builder
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth())
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let system = system_roots();
        if self.ca.is_empty() {
            return Ok(system);
        }
        let mut roots = RootCertStore::clone(&system);
        for pem in &self.ca {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                roots
                    .add(certificate.map_err(TlsError::Ca)?)
                    .map_err(TlsError::CaUse)?;
            }
        }
        Ok(Arc::new(roots))
    }
}

/// The system's authorities (`SSL_CERT_FILE` and `SSL_CERT_DIR` count). A node without any can still pull from
/// hosts whose `ca` is given.
fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let roots = ROOTS.get_or_init(|| {
        let found = rustls_native_certs::load_native_certs();
        for error in found.errors {
            tracing::warn!(%error, "cannot read some of the system's certificates");
        }
        let mut roots = RootCertStore::empty();
        let (added, ignored) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            tracing::warn!(
                ignored,
                "the system has no CA certificates: https needs them (package ca-certificates)"
            );
        }
        Arc::new(roots)
    });
    Arc::clone(roots)
}

/// For `skip_verify`: who asked for it gets it.
#[derive(Debug)]
struct BelieveAnything {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for BelieveAnything {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
