//! Who we say we are, and to whom: tokens, redirects, mirrors, foreign layers. Unpacking needs root.
#![allow(clippy::unwrap_used)]

mod registry_support;

use base64::Engine as _;
use registry_support::fake::{Fake, Reply, Seen, well};
use registry_support::image::{self, Made, layer, three_layers};
use registry_support::{Node, amd64, chain, quick, root, write};
use slipway_image::{Credentials, PullError, RegistryConfig, Silent};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn app() -> Made {
    image::oci(&three_layers("app"), "amd64")
}

fn basic(user: &str, password: &str) -> String {
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
    )
}

fn query(seen: &Seen) -> HashMap<String, String> {
    url::form_urlencoded::parse(seen.query.as_bytes())
        .into_owned()
        .collect()
}

/// A registry with its token service on the same host: the token of the n-th request to it is `token-n`; those below
/// `valid_from` have expired.
async fn with_tokens(made: &Made, password: Option<&'static str>, valid_from: Arc<AtomicUsize>) -> Fake {
    let good = well(&[("app:v1", made)]);
    let issued = AtomicUsize::new(0);
    Fake::start(move |seen, _| {
        if seen.path == "/token" {
            let right =
                password.is_none_or(|password| seen.header("authorization") == Some(&*basic("me", password)));
            if !right {
                return Reply::new(401)
                    .body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}"#);
            }
            assert_eq!(query(seen)["service"], "the registry");
            assert_eq!(query(seen)["scope"], "repository:app:pull");
            let n = issued.fetch_add(1, Ordering::Relaxed);
            return Reply::new(200).body(format!(r#"{{"token":"token-{n}","expires_in":300}}"#));
        }
        let token = seen
            .header("authorization")
            .and_then(|a| a.strip_prefix("Bearer token-"));
        match token.and_then(|n| n.parse::<usize>().ok()) {
            Some(n) if n >= valid_from.load(Ordering::Relaxed) => good(seen),
            _ => {
                let realm = format!("http://{}/token", seen.header("host").unwrap());
                let challenge =
                    format!(r#"Bearer realm="{realm}",service="the registry",scope="repository:app:pull""#);
                Reply::new(401).header("www-authenticate", challenge)
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_fetched_once_and_again_when_it_has_expired() {
    if !root() {
        return;
    }
    let made = app();
    let valid_from = Arc::new(AtomicUsize::new(0));
    let fake = with_tokens(&made, None, Arc::clone(&valid_from)).await;
    let node = Node::new();
    let puller = node.puller(quick());
    let name = fake.reference("app:v1");
    puller
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(fake.count(|seen| seen.path == "/token"), 1);
    puller.resolve(&name, None).await.unwrap();
    assert_eq!(fake.count(|seen| seen.path == "/token"), 1, "it is kept");
    let unknown = fake.count(|seen| seen.path != "/token" && seen.header("authorization").is_none());
    assert_eq!(unknown, 1, "the challenge is remembered");
    valid_from.store(1, Ordering::Relaxed);
    puller.resolve(&name, None).await.unwrap();
    assert_eq!(fake.count(|seen| seen.path == "/token"), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_service_gets_the_password_and_a_wrong_one_is_said() {
    if !root() {
        return;
    }
    let made = app();
    let fake = with_tokens(&made, Some("secret"), Arc::default()).await;
    let node = Node::new();
    let name = fake.reference("app:v1");
    let right = Some(Credentials::basic("me", "secret"));
    node.puller(quick())
        .pull(&name, right, &amd64(), &Silent)
        .await
        .unwrap();
    let sent = |seen: &Seen| {
        seen.header("authorization")
            .is_some_and(|a| a.starts_with("Basic"))
    };
    assert!(
        fake.seen()
            .iter()
            .all(|seen| !sent(seen) || seen.path == "/token"),
        "and nobody else gets it"
    );
    for wrong in [None, Some(Credentials::basic("me", "hunter2"))] {
        let error = Node::new()
            .puller(quick())
            .pull(&name, wrong, &amd64(), &Silent)
            .await
            .unwrap_err();
        let PullError::Unauthorized { detail, .. } = &error else {
            panic!("{error}")
        };
        assert!(
            detail.contains("wrong password") && !error.to_string().contains("hunter2"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identity_and_registry_tokens_are_used_as_they_are_meant() {
    if !root() {
        return;
    }
    let made = app();
    let good = well(&[("app:v1", &made)]);
    let fake = Fake::start(move |seen, _| {
        if seen.path == "/token" {
            let form: HashMap<String, String> =
                url::form_urlencoded::parse(&seen.body).into_owned().collect();
            let right = seen.method == "POST"
                && form["grant_type"] == "refresh_token"
                && form["refresh_token"] == "identity"
                && form["scope"] == "repository:app:pull";
            return if right {
                Reply::new(200).body(r#"{"access_token":"bearer"}"#)
            } else {
                Reply::new(400)
            };
        }
        match seen.header("authorization") {
            Some("Bearer bearer") => good(seen),
            _ => {
                let realm = format!(r#"Bearer realm="http://{}/token""#, seen.header("host").unwrap());
                Reply::new(401).header("www-authenticate", realm)
            }
        }
    })
    .await;
    let name = fake.reference("app:v1");
    let identity = Credentials::Identity {
        token: "identity".into(),
    };
    Node::new()
        .puller(quick())
        .pull(&name, Some(identity), &amd64(), &Silent)
        .await
        .unwrap();
    let before = fake.count(|seen| seen.path == "/token");
    let bearer = Credentials::Bearer {
        token: "bearer".into(),
    };
    Node::new()
        .puller(quick())
        .pull(&name, Some(bearer), &amd64(), &Silent)
        .await
        .unwrap();
    assert_eq!(
        fake.count(|seen| seen.path == "/token"),
        before,
        "a registry token needs no service"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_to_another_host_takes_neither_password_nor_headers_along() {
    if !root() {
        return;
    }
    let made = app();
    let good = well(&[("app:v1", &made)]);
    let elsewhere = Fake::start(move |seen, _| good(seen)).await;
    let good = well(&[("app:v1", &made)]);
    let target = elsewhere.host.clone();
    let fake = Fake::start(move |seen, _| match seen.header("authorization") {
        None => Reply::new(401).header("www-authenticate", "Basic realm=\"x\""),
        Some(_) if seen.path.contains("/blobs/") && !seen.query.contains("again") => {
            // First to ourselves, then away.
            Reply::to(format!("{}?again=1", seen.path))
        }
        Some(_) if seen.path.contains("/blobs/") => {
            Reply::to(format!("http://{target}{}?signed=1", seen.path))
        }
        Some(_) => good(seen),
    })
    .await;
    let certs = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n[header]\nx-secret = \"s3cret\"\n",
        fake.host
    );
    write(certs.path(), "hub.test/hosts.toml", &hosts);
    let config = RegistryConfig {
        certs_dir: Some(certs.path().to_owned()),
        ..quick()
    };
    let name = slipway_image::Reference::parse("hub.test/app:v1").unwrap();
    let me = Some(Credentials::basic("me", "secret"));
    let node = Node::new();
    node.puller(config)
        .pull(&name, me, &amd64(), &Silent)
        .await
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    let away = elsewhere.seen();
    assert_eq!(away.len(), 4, "configuration and three layers");
    for seen in &away {
        assert_eq!(seen.header("authorization"), None);
        assert_eq!(seen.header("x-secret"), None);
    }
    assert!(
        fake.seen()
            .iter()
            .all(|seen| seen.header("x-secret") == Some("s3cret"))
    );
    let again = fake.count(|seen| seen.query.contains("again") && seen.header("authorization").is_some());
    assert_eq!(again, 4, "the same host keeps them");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_does_not_get_the_registrys_password() {
    if !root() {
        return;
    }
    let made = app();
    let mirror =
        Fake::start(|_, _| Reply::new(401).header("www-authenticate", "Basic realm=\"mirror\"")).await;
    let good = well(&[("app:v1", &made)]);
    let upstream = Fake::start(move |seen, _| match seen.header("authorization") {
        None => Reply::new(401).header("www-authenticate", "Basic realm=\"x\""),
        Some(_) => good(seen),
    })
    .await;
    let certs = tempfile::tempdir().unwrap();
    let hosts = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n",
        upstream.host, mirror.host
    );
    write(certs.path(), "hub.test/hosts.toml", &hosts);
    let config = RegistryConfig {
        certs_dir: Some(certs.path().to_owned()),
        ..quick()
    };
    let name = slipway_image::Reference::parse("hub.test/app:v1").unwrap();
    let me = Some(Credentials::basic("me", "secret"));
    Node::new()
        .puller(config)
        .pull(&name, me, &amd64(), &Silent)
        .await
        .unwrap();
    assert!(!mirror.seen().is_empty());
    assert!(
        mirror
            .seen()
            .iter()
            .all(|seen| seen.header("authorization").is_none())
    );
}

/// CVE-2020-15157.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_url_of_a_foreign_layer_gets_no_credentials() {
    if !root() {
        return;
    }
    let foreign = layer(&[("foreign", b"from far away")]);
    let own = layer(&[("own", b"own")]);
    let bytes = foreign.bytes.clone();
    // CVE-2020-15157: it asks for what the registry got.
    let greedy =
        Fake::start(|_, _| Reply::new(401).header("www-authenticate", "Basic realm=\"gimme\"")).await;
    let honest = Fake::start(move |_, _| Reply::new(200).body(bytes.clone())).await;
    let plain = image::oci(&[own.clone(), foreign.clone()], "amd64");
    let mut manifest: serde_json::Value = serde_json::from_slice(&plain.manifest).unwrap();
    manifest["layers"][1]["mediaType"] =
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".into();
    manifest["layers"][1]["urls"] = serde_json::json!([
        format!("http://{}/l", greedy.host),
        "file:///etc/passwd",
        format!("http://{}/l", honest.host)
    ]);
    let made = image::with_manifest(plain.config, &[own], manifest, &plain.media_type);
    let good = well(&[("app:v1", &made)]);
    let fake = Fake::start(move |seen, _| match seen.header("authorization") {
        None => Reply::new(401).header("www-authenticate", "Basic realm=\"x\""),
        Some(_) => good(seen),
    })
    .await;
    let node = Node::new();
    let me = Some(Credentials::basic("me", "secret"));
    let name = fake.reference("app:v1");
    let image = node.puller(quick()).pull(&name, me, &amd64(), &Silent).await;
    let image = image.unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(node.layer_file(&image, 1, "foreign").unwrap(), b"from far away");
    assert_eq!((greedy.seen().len(), honest.seen().len()), (1, 1));
    for seen in greedy.seen().iter().chain(&honest.seen()) {
        assert_eq!(seen.header("authorization"), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_the_nodes_own_files_is_said() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "certs/hub.test/hosts.toml", "server = [");
    write(dir.path(), "config.json", "{");
    let name = slipway_image::Reference::parse("hub.test/app:v1").unwrap();
    let config = RegistryConfig {
        certs_dir: Some(dir.path().join("certs")),
        ..quick()
    };
    let error = Node::new()
        .puller(config)
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, PullError::Config { detail, .. } if detail.contains("hosts.toml")),
        "{error}"
    );
    let config = RegistryConfig {
        docker_config: Some(dir.path().join("config.json")),
        ..quick()
    };
    let error = Node::new()
        .puller(config)
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, PullError::Config { detail, .. } if detail.contains("config.json")),
        "{error}"
    );
}
