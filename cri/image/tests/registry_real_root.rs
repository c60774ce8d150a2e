//! Pull and push against Debian's docker-registry. Unpacking needs root.
#![allow(clippy::unwrap_used)]

mod registry_support;

use registry_support::image::{self, DOCKER_LIST, OCI_INDEX, index, noise, three_layers};
use registry_support::real::Registry;
use registry_support::{Heard, Node, amd64, chain, quick, root, write};
use slipway_image::{
    Credentials, Digest, Image, LayerOptions, LocalBuilds, NewImage, ProgressEvent, PullError, PushError,
    Reference, RegistryConfig, Silent, Writer,
};

fn reference(text: &str) -> Reference {
    Reference::parse(text).unwrap()
}

/// An image of two layers made on the node: one of files of its own, one that is long and does not compress.
fn build(node: &Node, name: &Reference, salt: &str, long: usize) -> Image {
    let lease = node.store.lease("test build").unwrap();
    let mut chains = Vec::new();
    let mut diffs = Vec::new();
    let layers: [(&str, Vec<u8>); 2] = [
        ("first", salt.as_bytes().to_vec()),
        ("second", noise(long, salt.len() as u64 + 7)),
    ];
    for (file, contents) in layers {
        let key = format!("build-{salt}-{file}");
        let active = node.store.prepare(&key, chains.last(), &lease).unwrap();
        std::fs::write(active.upper.join(file), contents).unwrap();
        let layers = [(&active, &LayerOptions::default())];
        let layer = node
            .store
            .seal_layers(chains.last(), &layers, &lease)
            .unwrap()
            .remove(0);
        chains.push(layer.chain);
        diffs.push(layer.diff_id.to_string());
    }
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diffs}, "history": [],
    });
    node.store
        .commit_image(NewImage {
            config: &serde_json::to_vec(&config).unwrap(),
            manifest: None,
            names: vec![name.clone()],
            repo_digests: Vec::new(),
            writer: Writer::Build,
            lease: &lease,
        })
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pulled_image_is_unpacked_and_known_by_name_and_digest() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(false) else {
        return;
    };
    let made = image::oci(&three_layers("one"), "amd64");
    registry.put("team/app", "v1", &made).await;
    let node = Node::new();
    let puller = node.puller(quick());
    let name = registry.reference("team/app:v1");
    let heard = Heard::default();
    let image = puller.pull(&name, None, &amd64(), &heard).await.unwrap();
    assert_eq!(image.id.digest(), &Digest::of(&made.config));
    assert_eq!(image.names, std::slice::from_ref(&name));
    assert_eq!(image.repo_digests, [format!("{}@{}", name.name(), made.digest)]);
    assert_eq!(image.manifest, Some(made.digest));
    assert_eq!(node.layer_file(&image, 2, "hello").unwrap(), b"hello one");
    assert_eq!(node.layer_file(&image, 1, "etc/middle").unwrap(), b"middle");
    assert_eq!(node.blobs().len(), 3);
    let total = made.layers[2].bytes.len() as u64;
    let layer = made.layers[2].digest;
    assert!(
        heard.any(|e| *e
            == ProgressEvent::Downloaded {
                layer,
                done: total,
                total
            }),
        "{:?}",
        heard.events()
    );
    assert!(heard.any(|e| matches!(e, ProgressEvent::Layers { layers } if layers.len() == 3)));
    let committing = heard
        .events()
        .iter()
        .filter(|e| **e == ProgressEvent::Committing)
        .count();
    assert_eq!(committing, 1);

    let heard = Heard::default();
    let again = puller.pull(&name, None, &amd64(), &heard).await.unwrap();
    assert_eq!(again.id, image.id);
    assert!(
        !heard.any(|e| matches!(e, ProgressEvent::Downloaded { .. })),
        "nothing is fetched twice"
    );
    let by_digest = reference(&image.repo_digests[0]);
    assert_eq!(
        puller.pull(&by_digest, None, &amd64(), &Silent).await.unwrap().id,
        image.id
    );
    assert_eq!(puller.resolve(&name, None).await.unwrap(), made.digest);
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_gives_the_image_for_the_platform_or_says_which_there_are() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(false) else {
        return;
    };
    for (tag, kind) in [("oci", OCI_INDEX), ("docker", DOCKER_LIST)] {
        let make = if tag == "oci" { image::oci } else { image::docker };
        let arm = make(&three_layers("arm"), "arm64");
        let amd = make(&three_layers("amd"), "amd64");
        registry.put("multi", "arm", &arm).await;
        registry.put("multi", "amd", &amd).await;
        let (bytes, digest) = index(&[(&arm, Some("arm64")), (&amd, Some("amd64"))], kind);
        registry.put_manifest("multi", tag, &bytes, kind).await;
        let node = Node::new();
        let puller = node.puller(quick());
        let name = registry.reference(&format!("multi:{tag}"));
        let image = puller.pull(&name, None, &amd64(), &Silent).await.unwrap();
        assert_eq!(image.id.digest(), &Digest::of(&amd.config));
        assert_eq!(
            image.repo_digests,
            [format!("{}@{digest}", name.name())],
            "the index is what was asked for"
        );
        let s390 = slipway_image::Platform::parse("linux/s390x").unwrap();
        let error = puller.pull(&name, None, &s390, &Silent).await.unwrap_err();
        let PullError::NoPlatform { available, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(
            available.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["linux/amd64", "linux/arm64"]
        );
        assert!(error.to_string().contains("linux/s390x"), "{error}");
        // One image that is for somebody else is no image for us.
        let error = puller
            .pull(&registry.reference("multi:arm"), None, &amd64(), &Silent)
            .await
            .unwrap_err();
        assert!(matches!(error, PullError::NoPlatform { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_built_image_is_pushed_and_pushed_again_with_the_same_digests() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(false) else {
        return;
    };
    let node = Node::new();
    let to = registry.reference("team/built:v1");
    let image = build(&node, &to, "salt", 1000);
    assert!(image.pinned && image.repo_digests.is_empty());
    let pusher = node.pusher(quick());
    let heard = Heard::default();
    let digest = pusher
        .push(&image, &to, None, &heard)
        .await
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    let (status, manifest) = registry.get("team/built/manifests/v1").await;
    assert_eq!((status, Digest::of(&manifest)), (200, digest));
    assert!(heard.any(|e| *e == ProgressEvent::Pushed { digest }));
    let after = node.store.resolve(&to.to_string()).unwrap().unwrap();
    assert_eq!(after.repo_digests, [format!("{}@{digest}", to.name())]);
    assert!(!after.pinned, "it exists elsewhere now");

    let heard = Heard::default();
    assert_eq!(pusher.push(&after, &to, None, &heard).await.unwrap(), digest);
    let exist = heard
        .events()
        .iter()
        .filter(|e| matches!(e, ProgressEvent::Exists { .. }))
        .count();
    assert_eq!(exist, 2, "nothing is sent twice: {:?}", heard.events());

    // The blobs are pruned; another repository of another registry has to get the same ones.
    for blob in node.blobs() {
        std::fs::remove_file(blob).unwrap();
    }
    let Some(other) = Registry::start(false) else {
        return;
    };
    let elsewhere = other.reference("moved:v1");
    assert_eq!(
        pusher.push(&after, &elsewhere, None, &Silent).await.unwrap(),
        digest
    );

    let fresh = Node::new();
    let pulled = fresh
        .puller(quick())
        .pull(&to, None, &amd64(), &Silent)
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id);
    assert_eq!(fresh.layer_file(&pulled, 0, "first").unwrap(), b"salt");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_layers_are_sent_while_they_are_made_and_in_chunks_afterwards() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(false) else {
        return;
    };
    let node = Node::new();
    let to = registry.reference("long:v1");
    let image = build(&node, &to, "long", 70 << 20);
    let pusher = node.pusher(quick());
    let heard = Heard::default();
    let digest = pusher
        .push(&image, &to, None, &heard)
        .await
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert!(
        heard.any(|e| matches!(e, ProgressEvent::Uploaded { total: None, .. })),
        "it was sent while made"
    );

    // The blob is in the store now: the next registry gets it from the file, in two chunks.
    let Some(other) = Registry::start(false) else {
        return;
    };
    let heard = Heard::default();
    let again = pusher
        .push(&image, &other.reference("long:v2"), None, &heard)
        .await;
    assert_eq!(again.unwrap_or_else(|e| panic!("{}", chain(&e))), digest);
    assert!(heard.any(
        |e| matches!(e, ProgressEvent::Uploaded { done, total: Some(t), .. } if done == t && *t > 64 << 20)
    ));

    let fresh = Node::new();
    let config = RegistryConfig {
        range_threshold: 1 << 20,
        range_chunk: 3 << 20,
        fast_enough: u64::MAX,
        ..quick()
    };
    let pulled = fresh
        .puller(config)
        .pull(&other.reference("long:v2"), None, &amd64(), &Silent)
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id);
    assert_eq!(
        fresh.layer_file(&pulled, 1, "second").unwrap(),
        noise(70 << 20, 4 + 7)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pulled_image_is_pushed_with_its_own_manifest_and_mounted_within_a_registry() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(false) else {
        return;
    };
    let made = image::docker(&three_layers("docker"), "amd64");
    registry.put("from", "v1", &made).await;
    let node = Node::new();
    let image = node
        .puller(quick())
        .pull(&registry.reference("from:v1"), None, &amd64(), &Silent)
        .await
        .unwrap();
    // Not even the blobs are needed: the registry has them.
    for blob in node.blobs() {
        std::fs::remove_file(blob).unwrap();
    }
    let heard = Heard::default();
    let to = registry.reference("to/there:v2");
    let digest = node.pusher(quick()).push(&image, &to, None, &heard).await;
    assert_eq!(digest.unwrap_or_else(|e| panic!("{}", chain(&e))), made.digest);
    let mounted = heard
        .events()
        .into_iter()
        .filter(|e| matches!(e, ProgressEvent::Mounted { from, .. } if from == "from"));
    assert_eq!(mounted.count(), 3, "{:?}", heard.events());
    let (status, manifest) = registry.get("to/there/manifests/v2").await;
    assert_eq!((status, manifest), (200, made.manifest));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_is_wanted_and_given_in_any_of_the_ways_it_can_be() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(true) else {
        return;
    };
    let made = image::oci(&three_layers("private"), "amd64");
    registry.put("private", "v1", &made).await;
    let name = registry.reference("private:v1");
    let node = Node::new();
    let refused = |error: &PullError| matches!(error, PullError::Unauthorized { .. });
    let error = node
        .puller(quick())
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap_err();
    assert!(refused(&error), "{error}");
    let wrong = Some(Credentials::basic("me", "wrong"));
    let error = node
        .puller(quick())
        .pull(&name, wrong, &amd64(), &Silent)
        .await
        .unwrap_err();
    assert!(refused(&error) && !error.to_string().contains("wrong"), "{error}");

    let given = Some(Credentials::basic("me", "secret"));
    let image = node
        .puller(quick())
        .pull(&name, given.clone(), &amd64(), &Silent)
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "config.json",
        &format!(r#"{{"auths":{{"{}":{{"auth":"bWU6c2VjcmV0"}}}}}}"#, registry.host),
    );
    let config = RegistryConfig {
        docker_config: Some(dir.path().join("config.json")),
        ..quick()
    };
    let second = Node::new();
    second
        .puller(config.clone())
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap();

    let to = registry.reference("mine:v1");
    let error = node
        .pusher(quick())
        .push(&image, &to, None, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, PushError::Unauthorized { .. }), "{error}");
    assert_eq!(
        node.pusher(quick())
            .push(&image, &to, given, &Silent)
            .await
            .unwrap(),
        made.digest
    );
    assert_eq!(
        second
            .pusher(config)
            .push(&image, &to, None, &Silent)
            .await
            .unwrap(),
        made.digest
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_of_hosts_toml_is_asked_and_the_next_one_where_it_fails() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(false) else {
        return;
    };
    let made = image::oci(&three_layers("hub"), "amd64");
    registry.put("library/app", "v1", &made).await;
    let certs = tempfile::tempdir().unwrap();
    // Nobody listens on the first; the second has it; the real one is never needed.
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let hosts = format!(
        "server = \"http://{closed}\"\n[host.\"http://{closed}\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
         [host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        registry.host
    );
    write(certs.path(), "docker.io/hosts.toml", &hosts);
    let config = RegistryConfig {
        certs_dir: Some(certs.path().to_owned()),
        ..quick()
    };
    let node = Node::new();
    let image = node
        .puller(config)
        .pull(&reference("app:v1"), None, &amd64(), &Silent)
        .await
        .unwrap();
    assert_eq!(image.names, [reference("docker.io/library/app:v1")]);
    assert_eq!(
        image.repo_digests,
        [format!("docker.io/library/app@{}", made.digest)]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tag_that_only_a_build_here_has_is_answered_with_that_build() {
    if !root() {
        return;
    }
    let Some(registry) = Registry::start(false) else {
        return;
    };
    let node = Node::new();
    let name = registry.reference("nowhere/else:latest");
    let puller = node.puller(quick());
    let error = puller.pull(&name, None, &amd64(), &Silent).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
    let built = build(&node, &name, "local", 100);
    let heard = Heard::default();
    let image = puller.pull(&name, None, &amd64(), &heard).await.unwrap();
    assert_eq!(image.id, built.id);
    assert!(heard.any(|e| matches!(e, ProgressEvent::AnsweredByBuild { .. })));
    let error = puller
        .pull_as(&name, None, &amd64(), LocalBuilds::Refuse, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");

    // What the registry has goes before what was built here.
    let made = image::oci(&three_layers("newer"), "amd64");
    registry.put("nowhere/else", "latest", &made).await;
    let image = puller.pull(&name, None, &amd64(), &Silent).await.unwrap();
    assert_eq!(image.id.digest(), &Digest::of(&made.config));

    // Nobody answers at all.
    let gone = Reference::parse("127.0.0.1:1/gone:latest").unwrap();
    let built = build(&node, &gone, "gone", 100);
    assert_eq!(
        puller.pull(&gone, None, &amd64(), &Silent).await.unwrap().id,
        built.id
    );
    // A name that a person gave is no build's.
    let tagged = Reference::parse("127.0.0.1:1/tagged:latest").unwrap();
    node.store.tag(&built.id, &tagged, Writer::User).unwrap();
    let error = puller.pull(&tagged, None, &amd64(), &Silent).await.unwrap_err();
    assert!(matches!(error, PullError::Unreachable { .. }), "{error}");
}
