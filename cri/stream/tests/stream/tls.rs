//! The server over TLS, with a certificate that openssl makes here.

use std::io::Write as _;
use std::path::Path;
use std::process::Command as Program;
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use slipway_stream::{BindError, Config, Server};

use crate::client::command::{Command, SPDY, WEBSOCKET};
use crate::fake::{Fake, World};

/// A server's configuration, and a client's that trusts it; `None` where openssl is not to be had.
pub fn make(dir: &Path) -> Option<(Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>)> {
    let (key, certificate) = (dir.join("key.pem"), dir.join("cert.pem"));
    let made = Program::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args([
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output();
    if !made.is_ok_and(|output| output.status.success()) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: openssl cannot make certificates");
        return None;
    }
    let certificate = CertificateDer::from_pem_file(&certificate).unwrap();
    let provider = Arc::new(default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.clone()],
            PrivateKeyDer::from_pem_file(&key).unwrap(),
        )
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Some((Arc::new(server), Arc::new(client)))
}

#[tokio::test]
async fn streams_go_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let Some((server, trust)) = make(dir.path()) else {
        return;
    };
    let world = World::with(Config {
        tls: Some(server),
        ..Config::default()
    })
    .await;
    for wire in [SPDY, WEBSOCKET] {
        let url = world.exec(&["cat"], false);
        assert!(url.starts_with("https://127.0.0.1:"), "{url}");
        let all = &["stdin", "stdout", "stderr"];
        let mut cat = Command::begin_trusting(&url, wire, all, Some(trust.clone())).await;
        let text = "x".repeat(300_000);
        cat.send("stdin", text.as_bytes()).await;
        cat.expect("stdout", &text).await;
        cat.end("stdin").await;
        assert_eq!(cat.finish().await.code(), 0);
    }
    world.settled().await;
}

#[tokio::test]
async fn only_loopback_addresses_are_served() {
    for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"] {
        let config = Config {
            listen: address.parse().unwrap(),
            ..Config::default()
        };
        let error = Server::bind(config, Fake::default()).await.unwrap_err();
        assert!(matches!(error, BindError::NotLoopback { .. }), "{error}");
    }
    let taken = World::start().await;
    let url = taken.port_forward();
    let address = crate::client::http::split(&url).1.parse().unwrap();
    let error = Server::bind(
        Config {
            listen: address,
            ..Config::default()
        },
        Fake::default(),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, BindError::Listen { .. }), "{error}");
}
