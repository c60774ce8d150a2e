//! Pull from registries that fail in every way: nothing half-visible, a clear error, and whole again where it can
//! be. Unpacking needs root.
#![allow(clippy::unwrap_used)]

mod registry_support;

use registry_support::fake::{Fake, Reply, Seen, ranged, well};
use registry_support::image::{self, Made, layer, noise, three_layers};
use registry_support::{Heard, Node, Small, amd64, chain, quick, root, write};
use slipway_image::{Digest, ProgressEvent, PullError, RegistryConfig, Silent};
use std::time::{Duration, Instant};

fn app() -> Made {
    image::oci(&three_layers("app"), "amd64")
}

/// One layer that does not compress.
fn long(length: usize) -> Made {
    image::oci(&[layer(&[("long", &noise(length, 3))])], "amd64")
}

async fn pull(fake: &Fake, node: &Node) -> Result<slipway_image::Image, PullError> {
    node.puller(quick())
        .pull(&fake.reference("app:v1"), None, &amd64(), &Silent)
        .await
}

/// Serves an image, its first layer's GETs as `fault` says (told the request and how many came before).
async fn faulty(made: &Made, fault: impl Fn(&Seen, usize, Reply) -> Reply + Send + Sync + 'static) -> Fake {
    let (good, digest) = (well(&[("app:v1", made)]), made.layers[0].digest);
    Fake::start(move |seen, before| match seen.is_blob(&digest) {
        true => fault(seen, before, good(seen)),
        false => good(seen),
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_transfer_goes_on_from_the_byte_it_reached() {
    if !root() {
        return;
    }
    let made = long(300_000);
    let fake = faulty(
        &made,
        |_, before, good| if before < 7 { good.cut(40_000) } else { good },
    )
    .await;
    let node = Node::new();
    let heard = Heard::default();
    let name = fake.reference("app:v1");
    let image = node
        .puller(quick())
        .pull(&name, None, &amd64(), &heard)
        .await
        .unwrap();
    assert_eq!(node.layer_file(&image, 0, "long").unwrap(), noise(300_000, 3));
    let starts: Vec<usize> = fake
        .seen()
        .iter()
        .filter(|seen| seen.is_blob(&made.layers[0].digest))
        .map(|seen| seen.range().map_or(0, |(from, _)| from))
        .collect();
    assert_eq!(
        starts,
        (0..8).map(|n| n * 40_000).collect::<Vec<_>>(),
        "more cuts than attempts, each with progress"
    );
    assert!(heard.any(|e| matches!(e, ProgressEvent::Retrying { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_may_be_restarted_in_the_middle() {
    if !root() {
        return;
    }
    let made = long(300_000);
    let stall = Some(Duration::from_secs(20));
    let fake = faulty(&made, move |_, _, good| Reply { stall, ..good }).await;
    let (host, name, blob) = (fake.host.clone(), fake.reference("app:v1"), made.layers[0].digest);
    let node = Node::new();
    let config = RegistryConfig {
        first_pause: Duration::from_millis(200),
        ..quick()
    };
    let puller = node.puller(config);
    let pull = tokio::spawn(async move { puller.pull(&name, None, &amd64(), &Silent).await });
    while fake.count(|seen| seen.is_blob(&blob)) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(fake);
    tokio::time::sleep(Duration::from_millis(900)).await;
    let good = well(&[("app:v1", &made)]);
    let fake = Fake::start_at(&host, move |seen, _| good(seen)).await;
    let image = pull.await.unwrap().unwrap();
    assert_eq!(node.layer_file(&image, 0, "long").unwrap(), noise(300_000, 3));
    assert!(
        fake.seen()
            .iter()
            .all(|seen| seen.range().is_some_and(|(from, _)| from > 0)),
        "it goes on"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_ranges_is_read_from_the_start_and_what_is_known_is_skipped() {
    if !root() {
        return;
    }
    let made = long(300_000);
    let body = made.layers[0].bytes.clone();
    let fake = faulty(&made, move |_, before, _| {
        let whole = Reply::new(200).body(body.clone());
        if before < 3 {
            whole.cut(50_000 * (before + 1))
        } else {
            whole
        }
    })
    .await;
    let node = Node::new();
    let image = pull(&fake, &node).await.unwrap();
    assert_eq!(node.layer_file(&image, 0, "long").unwrap(), noise(300_000, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_with_a_wrong_digest_are_refused_and_nothing_of_them_stays() {
    if !root() {
        return;
    }
    let made = app();
    let other = layer(&[("etc/", b""), ("etc/base", b"aqq")]);
    let mut bytes = made.layers[0].bytes.clone();
    // Another valid layer, filled up to the same length.
    bytes.clear();
    bytes.extend_from_slice(&other.bytes);
    bytes.resize(made.layers[0].bytes.len(), 0);
    let fake = faulty(&made, move |seen, _, _| ranged(seen, &bytes)).await;
    let node = Node::new();
    let error = pull(&fake, &node).await.unwrap_err();
    let PullError::Corrupt { host, what, .. } = &error else {
        panic!("{}", chain(&error))
    };
    assert_eq!(host, &fake.host);
    assert!(what.contains(&made.layers[0].digest.to_string()), "{error}");
    assert!(node.store.images().unwrap().is_empty());
    assert!(
        !node
            .blobs()
            .iter()
            .any(|path| path.ends_with(made.layers[0].digest.hex()))
    );
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_is_too_short_or_too_long_is_refused() {
    if !root() {
        return;
    }
    let made = app();
    let short = made.layers[0].bytes[..made.layers[0].bytes.len() - 5].to_vec();
    let fake = faulty(&made, move |_, _, _| Reply::new(200).body(short.clone())).await;
    let node = Node::new();
    let error = pull(&fake, &node).await.unwrap_err();
    assert!(matches!(error, PullError::Registry { .. }), "{}", chain(&error));
    assert!(error.to_string().contains("ended after"), "{error}");
    node.assert_nothing_half_there();

    let mut padded = made.layers[0].bytes.clone();
    padded.extend_from_slice(&[0; 10]);
    let fake = faulty(&made, move |_, _, _| Reply::new(200).body(padded.clone())).await;
    let error = pull(&fake, &node).await.unwrap_err();
    assert!(matches!(error, PullError::Corrupt { .. }), "{}", chain(&error));
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    if !root() {
        return;
    }
    let mut made = app();
    // The manifest is right about the blob, the configuration wrong about its contents.
    let lie = layer(&[("lie", b"lie")]);
    let text = String::from_utf8(made.config.clone()).unwrap();
    let text = text.replace(&made.layers[2].diff_id.to_string(), &lie.diff_id.to_string());
    made.config = text.into_bytes();
    let mut manifest: serde_json::Value = serde_json::from_slice(&made.manifest).unwrap();
    manifest["config"]["digest"] = Digest::of(&made.config).to_string().into();
    let made = image::with_manifest(made.config, &made.layers, manifest, &made.media_type);
    let good = well(&[("app:v1", &made)]);
    let fake = Fake::start(move |seen, _| good(seen)).await;
    let node = Node::new();
    let error = pull(&fake, &node).await.unwrap_err();
    assert!(matches!(error, PullError::Unusable { .. }), "{}", chain(&error));
    assert!(node.store.images().unwrap().is_empty());
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_registry_is_asked_again_after_the_time_it_wants_but_not_for_ever() {
    if !root() {
        return;
    }
    let made = app();
    let good = well(&[("app:v1", &made)]);
    let fake = Fake::start(move |seen, before| match before {
        0 if seen.path.contains("/manifests/") => Reply::new(429).header("retry-after", "1"),
        0 => Reply::new(503),
        _ => good(seen),
    })
    .await;
    let node = Node::new();
    let begun = Instant::now();
    pull(&fake, &node).await.unwrap();
    assert!(
        begun.elapsed() >= Duration::from_secs(1),
        "the registry asked for a second"
    );

    let fake = Fake::start(|_, _| Reply::new(502).body("<html>bad gateway</html>")).await;
    let error = pull(&fake, &Node::new()).await.unwrap_err();
    assert!(
        matches!(&error, PullError::Registry { detail, .. } if detail.contains("502")),
        "{error}"
    );
    assert_eq!(fake.seen().len(), 5);

    let fake = Fake::start(|_, _| Reply::new(429).header("retry-after", "86400")).await;
    let error = pull(&fake, &Node::new()).await.unwrap_err();
    assert!(matches!(error, PullError::TooManyRequests { .. }), "{error}");
    assert_eq!(fake.seen().len(), 1, "nobody waits a day");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_falls_silent_is_given_up_after_a_while() {
    if !root() {
        return;
    }
    let made = app();
    let stall = Some(Duration::from_secs(20));
    let fake = faulty(&made, move |_, _, good| Reply { stall, ..good }).await;
    let node = Node::new();
    let begun = Instant::now();
    let error = pull(&fake, &node).await.unwrap_err();
    assert!(error.to_string().contains("nothing came"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_without_measure_or_of_another_age_are_refused() {
    if !root() {
        return;
    }
    let node = Node::new();
    let fake = Fake::start(|_, _| Reply::new(200).body(vec![b' '; 5 << 20])).await;
    let error = pull(&fake, &node).await.unwrap_err();
    assert!(error.to_string().contains("longer than 4194304 bytes"), "{error}");

    let fake = Fake::start(|_, _| {
        Reply::new(200)
            .header(
                "content-type",
                "application/vnd.docker.distribution.manifest.v1+prettyjws",
            )
            .body(r#"{"schemaVersion":1,"fsLayers":[]}"#)
    })
    .await;
    assert!(matches!(
        pull(&fake, &node).await.unwrap_err(),
        PullError::Schema1 { .. }
    ));

    let fake = Fake::start(|_, _| {
        Reply::new(200)
            .header("docker-content-digest", Digest::of(b"x").to_string())
            .body("{}")
    })
    .await;
    assert!(matches!(
        pull(&fake, &node).await.unwrap_err(),
        PullError::Corrupt { .. }
    ));

    // An index that names itself as deep as anybody follows.
    let index = |digest: &str, size: usize| {
        format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{digest}","size":{size},"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#,
            image::OCI_INDEX
        )
    };
    let mut documents = vec![index(&Digest::of(b"x").to_string(), 1)];
    for _ in 0..6 {
        let last = documents.last().unwrap();
        documents.push(index(&Digest::of(last.as_bytes()).to_string(), last.len()));
    }
    let fake = Fake::start(move |seen, _| {
        let by_digest = documents
            .iter()
            .find(|d| seen.path.ends_with(&Digest::of(d.as_bytes()).to_string()));
        let document = by_digest.or(documents.last()).unwrap();
        Reply::new(200)
            .header("content-type", image::OCI_INDEX)
            .body(document.as_bytes())
    })
    .await;
    let error = pull(&fake, &node).await.unwrap_err();
    assert!(matches!(error, PullError::Unusable { .. }), "{error}");
    assert!(fake.seen().len() < 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_does_not_say_its_platforms_is_looked_into() {
    if !root() {
        return;
    }
    let (arm, amd) = (
        image::oci(&three_layers("r"), "arm64"),
        image::oci(&three_layers("d"), "amd64"),
    );
    let (bytes, digest) = image::index(&[(&arm, None), (&amd, None)], image::OCI_INDEX);
    let good = well(&[("app:arm", &arm), ("app:amd", &amd)]);
    let fake = Fake::start(move |seen, _| match seen.path.ends_with("/manifests/v1") {
        true => Reply::new(200)
            .header("content-type", image::OCI_INDEX)
            .body(bytes.clone()),
        false => good(seen),
    })
    .await;
    let node = Node::new();
    let image = pull(&fake, &node).await.unwrap();
    assert_eq!(image.id.digest(), &Digest::of(&amd.config));
    assert!(image.repo_digests[0].ends_with(&digest.to_string()));
}

/// CVE-2026-95839: however many entries an index has, a pull asks for a few of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_of_many_silent_entries_costs_a_few_requests() {
    if !root() {
        return;
    }
    let arm = image::oci(&three_layers("r"), "arm64");
    let (bytes, _) = image::index(&vec![(&arm, None); 900], image::OCI_INDEX);
    let good = well(&[("app:arm", &arm)]);
    let fake = Fake::start(move |seen, _| match seen.path.ends_with("/manifests/v1") {
        true => Reply::new(200)
            .header("content-type", image::OCI_INDEX)
            .body(bytes.clone()),
        false => good(seen),
    })
    .await;
    let node = Node::new();
    let error = pull(&fake, &node).await.unwrap_err();
    assert!(matches!(error, PullError::NoPlatform { .. }), "{error}");
    assert!(fake.seen().len() <= 12, "{} requests", fake.seen().len());
    // A digest that is none is refused by name, wherever it stands.
    for bad in ["sha256", "sha256:", "sha256:x", ":", "md5:00", ""] {
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{bad}","size":1,"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#,
            image::OCI_MANIFEST
        );
        let fake = Fake::start(move |_, _| {
            Reply::new(200)
                .header("content-type", image::OCI_INDEX)
                .body(text.clone())
        })
        .await;
        let error = pull(&fake, &node).await.unwrap_err();
        assert!(matches!(error, PullError::Unusable { .. }), "{bad:?}: {error}");
        assert_eq!(fake.seen().len(), 1, "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_blobs_come_in_ranges_at_a_time_and_broken_ranges_go_on() {
    if !root() {
        return;
    }
    let made = long(2 << 20);
    let fake = faulty(&made, |seen, _, good| match seen.range() {
        // One range in the middle breaks when it is asked for the first time.
        Some((from, _)) if from == 5 * (100 << 10) => good.cut(33_333),
        _ => good,
    })
    .await;
    let node = Node::new();
    let config = RegistryConfig {
        range_threshold: 1 << 20,
        range_chunk: 100 << 10,
        fast_enough: u64::MAX,
        ..quick()
    };
    let name = fake.reference("app:v1");
    let image = node
        .puller(config)
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap();
    assert_eq!(node.layer_file(&image, 0, "long").unwrap(), noise(2 << 20, 3));
    let blob = made.layers[0].digest;
    assert!(fake.count(|seen| seen.is_blob(&blob)) > 20);
    assert_eq!(
        fake.count(|seen| seen
            .range()
            .is_some_and(|(from, _)| from == 5 * (100 << 10) + 33_333)),
        1
    );

    // A fast connection gets the rest in one piece.
    let fake = faulty(&made, |_, _, good| good).await;
    let config = RegistryConfig {
        range_threshold: 1 << 20,
        range_chunk: 100 << 10,
        fast_enough: 1,
        ..quick()
    };
    let name = fake.reference("app:v1");
    Node::new()
        .puller(config)
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap();
    assert_eq!(fake.count(|seen| seen.is_blob(&blob)), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_gives_rubbish_is_passed_over() {
    if !root() {
        return;
    }
    let made = app();
    let rubbish = vec![7; made.layers[0].bytes.len()];
    let mirror = faulty(&made, move |_, _, _| Reply::new(200).body(rubbish.clone())).await;
    let upstream = faulty(&made, |_, _, good| good).await;
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
    let node = Node::new();
    let name = slipway_image::Reference::parse("hub.test/app:v1").unwrap();
    let image = node
        .puller(config)
        .pull(&name, None, &amd64(), &Silent)
        .await
        .unwrap();
    assert_eq!(node.layer_file(&image, 2, "hello").unwrap(), b"hello app");
    assert_eq!(mirror.count(|seen| seen.is_blob(&made.layers[0].digest)), 1);
    assert!(
        mirror.seen().iter().all(|seen| seen.query == "ns=hub.test"),
        "a mirror is told whose images are meant"
    );
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_said_and_the_space_given_back() {
    if !root() {
        return;
    }
    let Some(dir) = Small::mount("48m") else { return };
    let layers = [
        layer(&[("first", &noise(8 << 20, 1))]),
        layer(&[("second", &noise(60 << 20, 2))]),
    ];
    let made = image::oci(&layers, "amd64");
    let fake = faulty(&made, |_, _, good| good).await;
    let store =
        slipway_image::Store::open(&dir.0.path().join("root"), slipway_image::OwnerKind::Daemon).unwrap();
    let puller = slipway_image::Puller::new(store.clone(), quick());
    let error = puller
        .pull(&fake.reference("app:v1"), None, &amd64(), &Silent)
        .await
        .unwrap_err();
    assert!(error.is_disk_full(), "{}", chain(&error));
    let deadline = Instant::now() + Duration::from_secs(10);
    let blobs = || {
        std::fs::read_dir(dir.0.path().join("root/content/sha256"))
            .unwrap()
            .count()
    };
    while blobs() > 0 {
        assert!(
            Instant::now() < deadline,
            "the layer that did fit is given back too"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let small = app();
    let good = well(&[("app:v1", &small)]);
    let fake = Fake::start(move |seen, _| good(seen)).await;
    let mut result = puller
        .pull(&fake.reference("app:v1"), None, &amd64(), &Silent)
        .await;
    for _ in 0..20 {
        if result.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        result = puller
            .pull(&fake.reference("app:v1"), None, &amd64(), &Silent)
            .await;
    }
    assert!(result.is_ok(), "service goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_drips_is_given_up_and_a_slow_but_steady_one_is_not() {
    if !root() {
        return;
    }
    let config = || RegistryConfig {
        attempts: 3,
        slow_window: Duration::from_millis(300),
        slow_bytes: 3000,
        ..quick()
    };
    let made = long(60_000);
    for (piece, ends_well) in [(20, false), (2000, true)] {
        let drip = Some((piece, Duration::from_millis(20)));
        let fake = faulty(&made, move |_, _, good| Reply { drip, ..good }).await;
        let node = Node::new();
        let name = fake.reference("app:v1");
        let (puller, platform) = (node.puller(config()), amd64());
        let pull = puller.pull(&name, None, &platform, &Silent);
        let pulled = tokio::time::timeout(Duration::from_secs(30), pull).await.unwrap();
        match pulled {
            Ok(_) => assert!(ends_well),
            Err(error) => {
                assert!(!ends_well, "{}", chain(&error));
                assert!(chain(&error).contains("KiB came in"), "{}", chain(&error));
                let asked = fake.count(|seen| seen.is_blob(&made.layers[0].digest));
                assert_eq!(asked, 3, "a drip is no progress");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_byte_each_time_does_not_keep_a_pull_alive() {
    if !root() {
        return;
    }
    let made = long(300_000);
    let fake = faulty(&made, |_, _, good| good.cut(1)).await;
    let node = Node::new();
    let pulled = tokio::time::timeout(Duration::from_secs(60), pull(&fake, &node)).await;
    assert!(pulled.unwrap().is_err());
    let asked = fake.count(|seen| seen.is_blob(&made.layers[0].digest));
    assert!((5..=100).contains(&asked), "{asked}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_image_that_does_not_come_leaves_room_for_others() {
    if !root() {
        return;
    }
    let layers: Vec<_> = (0..12)
        .map(|n| layer(&[("file", &noise(2000, 100 + n))]))
        .collect();
    let slow = image::oci(&layers, "amd64");
    let good = well(&[("app:v1", &slow)]);
    let stuck = Fake::start(
        move |seen, _| match seen.path.contains("/blobs/") && seen.range().is_none() {
            true => Reply {
                stall: good(seen).body.len().gt(&1500).then_some(Duration::from_secs(60)),
                ..good(seen)
            },
            false => good(seen),
        },
    )
    .await;
    let node = Node::new();
    let config = RegistryConfig {
        read_timeout: Duration::from_secs(50),
        ..quick()
    };
    let puller = std::sync::Arc::new(node.puller(config));
    let (first, name) = (std::sync::Arc::clone(&puller), stuck.reference("app:v1"));
    let pull = tokio::spawn(async move { first.pull(&name, None, &amd64(), &Silent).await.map(drop) });
    let waiting = |seen: &Seen| layers.iter().any(|layer| seen.is_blob(&layer.digest));
    while stuck.count(waiting) < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let other = app();
    let good = well(&[("app:v1", &other)]);
    let fake = Fake::start(move |seen, _| good(seen)).await;
    let name = fake.reference("app:v1");
    let platform = amd64();
    let quick = puller.pull(&name, None, &platform, &Silent);
    tokio::time::timeout(Duration::from_secs(20), quick)
        .await
        .expect("the other image comes")
        .unwrap();
    assert_eq!(stuck.count(waiting), 4, "of six");
    pull.abort();
    let _ = pull.await;
}
