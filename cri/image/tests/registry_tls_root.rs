//! TLS as hosts.toml has it, against Debian's docker-registry with certificates that openssl makes here. Unpacking
//! needs root.
#![allow(clippy::unwrap_used)]

mod registry_support;

use registry_support::image::{self, three_layers};
use registry_support::real::Registry;
use registry_support::{Node, amd64, chain, quick, root, write};
use slipway_image::{PullError, RegistryConfig, Silent};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

/// An authority, a certificate of 127.0.0.1 and one of a client.
fn certificates(dir: &Path) -> bool {
    let script = r#"
        set -e; cd "$0"
        key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"; }
        key ca; openssl req -x509 -new -key ca.key -days 2 -subj /CN=slipway-test -out ca.pem \
            -addext basicConstraints=critical,CA:TRUE
        sign() {
            key "$1"; openssl req -new -key "$1.key" -subj "/CN=$1" -out "$1.csr"
            printf 'subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=%s\n' "$2" > "$1.ext"
            openssl x509 -req -in "$1.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile "$1.ext" -out "$1.pem"
        }
        sign server serverAuth; sign client clientAuth"#;
    let status = Command::new("sh")
        .args(["-c", script])
        .arg(dir)
        .stderr(std::process::Stdio::null())
        .status();
    let made = status.is_ok_and(|status| status.success());
    if !made {
        let _ = writeln!(std::io::stderr(), "SKIPPED: openssl cannot make certificates");
    }
    made
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_private_authority_a_client_certificate_and_no_checks_at_all() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    if !certificates(dir.path()) {
        return;
    }
    let path = |name: &str| dir.path().join(name).display().to_string();
    let tls = format!(
        "  tls:\n    certificate: {}\n    key: {}\n",
        path("server.pem"),
        path("server.key")
    );
    let with_clients = format!("{tls}    clientcas:\n      - {}\n", path("ca.pem"));
    let made = image::oci(&three_layers("tls"), "amd64");
    for (settings, wants_client) in [(&tls, false), (&with_clients, true)] {
        let Some(registry) = Registry::start_with("", settings) else {
            return;
        };
        let certs = dir.path().join(format!("certs-{wants_client}"));
        let pull = async |hosts: &str| {
            let text = format!("server = \"https://{}\"\n{hosts}", registry.host);
            write(&certs, "hub.test/hosts.toml", &text);
            let config = RegistryConfig {
                certs_dir: Some(certs.clone()),
                ..quick()
            };
            let node = Node::new();
            let name = slipway_image::Reference::parse("hub.test/app:v1").unwrap();
            node.puller(config)
                .pull(&name, None, &amd64(), &Silent)
                .await
                .map(|image| (node, image))
        };
        let authority = format!("ca = \"{}\"\n", path("ca.pem"));
        let client = format!(
            "client = [[\"{}\", \"{}\"]]\n",
            path("client.pem"),
            path("client.key")
        );
        // Nobody knows this authority.
        let error = pull("").await.unwrap_err();
        assert!(
            matches!(error, PullError::Unreachable { .. }),
            "{}",
            chain(&error)
        );
        assert!(error.to_string().contains("certificate"), "{error}");
        // It is put there through our own push, which needs the same certificates.
        let source = Registry::start(false).unwrap();
        source.put("app", "v1", &made).await;
        let node = Node::new();
        let from = source.reference("app:v1");
        let image = node
            .puller(quick())
            .pull(&from, None, &amd64(), &Silent)
            .await
            .unwrap();
        write(
            &certs,
            "hub.test/hosts.toml",
            &format!("server = \"https://{}\"\n{authority}{client}", registry.host),
        );
        let config = RegistryConfig {
            certs_dir: Some(certs.clone()),
            ..quick()
        };
        let to = slipway_image::Reference::parse("hub.test/app:v1").unwrap();
        let pushed = node.pusher(config).push(&image, &to, None, &Silent).await;
        assert_eq!(pushed.unwrap_or_else(|e| panic!("{}", chain(&e))), made.digest);

        let known = pull(&authority).await;
        let unchecked = pull("skip_verify = true\n").await;
        if wants_client {
            assert!(matches!(
                known.unwrap_err(),
                PullError::Unreachable { .. } | PullError::Registry { .. }
            ));
            assert!(unchecked.is_err());
        } else {
            known.unwrap_or_else(|e| panic!("{}", chain(&e)));
            unchecked.unwrap_or_else(|e| panic!("{}", chain(&e)));
        }
        let (_, image) = pull(&format!("{authority}{client}"))
            .await
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_eq!(image.manifest, Some(made.digest));
    }
}
