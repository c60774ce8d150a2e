//! Push to registries that fail: cut in the middle, no chunks, forgetful, slow to answer. Unpacking needs root.
#![allow(clippy::unwrap_used)]

mod registry_support;

use registry_support::fake::{Fake, Reply, Seen, well};
use registry_support::image::{self, Made, layer, noise};
use registry_support::{Heard, Node, amd64, chain, quick, root};
use slipway_image::{Digest, Image, ProgressEvent, PushError, Silent};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What a fake registry that is pushed to has got.
#[derive(Default)]
struct Got {
    uploads: HashMap<String, Vec<u8>>,
    blobs: HashMap<String, Vec<u8>>,
    manifests: HashMap<String, Vec<u8>>,
    opened: usize,
}

type Shared = Arc<Mutex<Got>>;

/// Takes uploads as the distribution specification has them.
fn taking(got: &Shared) -> impl Fn(&Seen) -> Reply + Send + Sync + use<> {
    let got = Arc::clone(got);
    move |seen| {
        let mut got = got.lock().unwrap();
        let rest = seen.path.strip_prefix("/v2/to/").unwrap_or_default().to_owned();
        let digest = url::form_urlencoded::parse(seen.query.as_bytes()).find(|(name, _)| name == "digest");
        if let Some(blob) = rest.strip_prefix("blobs/sha256:") {
            let there = got.blobs.contains_key(&format!("sha256:{blob}"));
            return Reply::new(if there { 200 } else { 404 });
        }
        if let Some(tag) = rest.strip_prefix("manifests/") {
            got.manifests.insert(tag.to_owned(), seen.body.clone());
            return Reply::new(201).header("docker-content-digest", Digest::of(&seen.body).to_string());
        }
        if rest == "blobs/uploads/" && seen.method == "POST" {
            got.opened += 1;
            let location = format!("/v2/to/blobs/uploads/u{}?state=x", got.opened);
            return Reply::new(202).header("location", location);
        }
        let location = format!("{}?state=y", seen.path);
        let upload = got.uploads.entry(rest).or_default();
        match seen.method.as_str() {
            "PATCH" => {
                let from = seen
                    .header("content-range")
                    .and_then(|range| range.split('-').next()?.parse().ok());
                if from.is_some_and(|from: usize| from != upload.len()) {
                    return Reply::new(416);
                }
                upload.extend_from_slice(&seen.body);
                let range = format!("0-{}", upload.len() - 1);
                Reply::new(202)
                    .header("location", location)
                    .header("range", range)
            }
            "GET" => {
                let range = format!("0-{}", upload.len().max(1) - 1);
                Reply::new(204)
                    .header("location", location)
                    .header("range", range)
            }
            "PUT" => {
                upload.extend_from_slice(&seen.body);
                let (bytes, found) = (upload.clone(), Digest::of(upload).to_string());
                match digest {
                    Some((_, digest)) if digest == found => {
                        got.blobs.insert(found, bytes);
                        Reply::new(201)
                    }
                    _ => Reply::new(400).body(r#"{"errors":[{"code":"DIGEST_INVALID","message":"no"}]}"#),
                }
            }
            _ => Reply::new(204),
        }
    }
}

/// An image of one long and one short layer, in a node's store.
async fn pulled(node: &Node, long: usize) -> (Made, Image) {
    let made = image::oci(
        &[layer(&[("long", &noise(long, 5))]), layer(&[("short", b"short")])],
        "amd64",
    );
    let good = well(&[("from:v1", &made)]);
    let fake = Fake::start(move |seen, _| good(seen)).await;
    let image = node
        .puller(quick())
        .pull(&fake.reference("from:v1"), None, &amd64(), &Silent)
        .await;
    (made, image.unwrap_or_else(|e| panic!("{}", chain(&e))))
}

fn assert_whole(got: &Shared, made: &Made) {
    let got = got.lock().unwrap();
    assert_eq!(got.manifests["v1"], made.manifest);
    for layer in &made.layers {
        assert_eq!(Digest::of(&got.blobs[&layer.digest.to_string()]), layer.digest);
    }
    assert!(got.blobs.contains_key(&Digest::of(&made.config).to_string()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_fails_goes_on_from_what_the_registry_has() {
    if !root() {
        return;
    }
    let node = Node::new();
    let (made, image) = pulled(&node, 20 << 20).await;
    let got = Shared::default();
    let (take, inner) = (taking(&got), Arc::clone(&got));
    let fake = Fake::start(move |seen, before| {
        if seen.method == "PATCH" && before == 0 {
            // It keeps a part and then breaks.
            let name = seen.path.strip_prefix("/v2/to/").unwrap().to_owned();
            inner
                .lock()
                .unwrap()
                .uploads
                .insert(name, seen.body[..5_000_000].to_vec());
            return Reply::new(503);
        }
        take(seen)
    })
    .await;
    let heard = Heard::default();
    let pushed = node
        .pusher(quick())
        .push(&image, &fake.reference("to:v1"), None, &heard)
        .await;
    assert_eq!(pushed.unwrap_or_else(|e| panic!("{}", chain(&e))), made.digest);
    assert_whole(&got, &made);
    let resumed = fake
        .seen()
        .iter()
        .filter_map(|s| s.header("content-range").map(str::to_owned))
        .next_back();
    assert!(resumed.unwrap().starts_with("5000000-"));
    assert!(heard.any(|e| matches!(e, ProgressEvent::Retrying { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_removed_while_it_is_pushed_is_pushed() {
    if !root() {
        return;
    }
    for at in ["/v2/to/blobs/uploads/", "/v2/to/manifests/v1"] {
        let node = Node::new();
        let (made, image) = pulled(&node, 100_000).await;
        let got = Shared::default();
        let (take, store, id) = (taking(&got), node.store.clone(), image.id);
        let fake = Fake::start(move |seen, _| {
            if seen.path == at {
                store.remove_image(&id).unwrap();
            }
            take(seen)
        })
        .await;
        let pushed = node
            .pusher(quick())
            .push(&image, &fake.reference("to:v1"), None, &Silent)
            .await;
        assert_eq!(
            pushed.unwrap_or_else(|e| panic!("{at}: {}", chain(&e))),
            made.digest
        );
        assert_whole(&got, &made);
        assert!(node.store.image(&image.id).unwrap().is_none());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_lies_about_a_layer_is_refused_and_changes_no_push() {
    if !root() {
        return;
    }
    let node = Node::new();
    let (made, base) = pulled(&node, 100_000).await;
    // The same layers by its configuration, and other blobs.
    let mut lies = made.layers.clone();
    lies[0].bytes = image::gzip(b"nothing of the kind");
    lies[0].digest = Digest::of(&lies[0].bytes);
    let again = image::oci(&[lies[0].clone(), lies[1].clone()], "amd64");
    // And the truth, compressed once more.
    let mut truths = made.layers.clone();
    truths[0].bytes = zstd(&made.layers[0].bytes);
    truths[0].digest = Digest::of(&truths[0].bytes);
    let other = image::oci(
        &[truths[0].clone(), truths[1].clone(), layer(&[("more", b"more")])],
        "amd64",
    );
    let good = well(&[("liar:v1", &again), ("other:v1", &other)]);
    let fake = Fake::start(move |seen, _| good(seen)).await;
    let puller = node.puller(quick());
    let pull = async |name| puller.pull(&fake.reference(name), None, &amd64(), &Silent).await;
    let error = pull("liar:v1").await.unwrap_err();
    assert!(
        chain(&error).contains("the uncompressed tar of layer"),
        "{}",
        chain(&error)
    );
    node.assert_nothing_half_there();
    let other_image = pull("other:v1").await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    let asked = fake.count(|seen| seen.is_blob(&truths[0].digest));
    assert_eq!(asked, 1);
    // A blob that is known is not asked for again, nor read.
    pull("other:v1").await.unwrap();
    node.store.remove_image(&other_image.id).unwrap();
    pull("other:v1").await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    let lease = node.store.lease("build").unwrap();
    let active = node.store.prepare("step", base.chain.as_ref(), &lease).unwrap();
    std::fs::write(active.upper.join("new"), "new").unwrap();
    let options = slipway_image::LayerOptions::default();
    let layers = node
        .store
        .seal_layers(base.chain.as_ref(), &[(&active, &options)], &lease);
    let mut diffs: Vec<String> = base.layers.iter().map(ToString::to_string).collect();
    diffs.push(layers.unwrap()[0].diff_id.to_string());
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diffs},
    });
    let built = node
        .store
        .commit_image(slipway_image::NewImage {
            config: &serde_json::to_vec(&config).unwrap(),
            manifest: None,
            names: Vec::new(),
            repo_digests: Vec::new(),
            writer: slipway_image::Writer::Build,
            lease: &lease,
        })
        .unwrap();
    let got = Shared::default();
    let take = taking(&got);
    let to = Fake::start(move |seen, _| take(seen)).await;
    let pushed = node
        .pusher(quick())
        .push(&built, &to.reference("to:v1"), None, &Silent)
        .await;
    pushed.unwrap_or_else(|e| panic!("{}", chain(&e)));
    let manifest: serde_json::Value = serde_json::from_slice(&got.lock().unwrap().manifests["v1"]).unwrap();
    let digest = |at: usize| manifest["layers"][at]["digest"].as_str().unwrap().to_owned();
    let known = [made.layers[0].digest.to_string(), truths[0].digest.to_string()];
    assert!(known.contains(&digest(0)), "{}", digest(0));
    assert_eq!(digest(1), made.layers[1].digest.to_string());
}

/// The tar of a gzip blob as zstd.
fn zstd(gzip: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(gzip), &mut tar).unwrap();
    ::zstd::bulk::compress(&tar, 1).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_without_chunks_gets_one_piece_and_a_forgetful_one_a_new_upload() {
    if !root() {
        return;
    }
    let node = Node::new();
    let (made, image) = pulled(&node, 20 << 20).await;
    for refusal in [405, 404, 416] {
        let got = Shared::default();
        let take = taking(&got);
        let fake = Fake::start(move |seen, _| match seen.method.as_str() {
            "PATCH" => Reply::new(refusal),
            _ => take(seen),
        })
        .await;
        let pushed = node
            .pusher(quick())
            .push(&image, &fake.reference("to:v1"), None, &Silent)
            .await;
        assert_eq!(
            pushed.unwrap_or_else(|e| panic!("{refusal}: {}", chain(&e))),
            made.digest
        );
        assert_whole(&got, &made);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_breaks_is_asked_again_and_one_that_refuses_is_quoted() {
    if !root() {
        return;
    }
    let node = Node::new();
    let (made, image) = pulled(&node, 1000).await;
    let got = Shared::default();
    let take = taking(&got);
    let faults = AtomicUsize::new(0);
    let fake = Fake::start(move |seen, _| match seen.method.as_str() {
        "POST" | "PUT" if faults.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) => Reply::new(500),
        _ => take(seen),
    })
    .await;
    let pushed = node
        .pusher(quick())
        .push(&image, &fake.reference("to:v1"), None, &Silent)
        .await;
    assert_eq!(pushed.unwrap_or_else(|e| panic!("{}", chain(&e))), made.digest);
    assert_whole(&got, &made);

    let got = Shared::default();
    let take = taking(&got);
    let fake = Fake::start(move |seen, _| match seen.path.contains("/manifests/") {
        true => {
            Reply::new(400).body(r#"{"errors":[{"code":"MANIFEST_INVALID","message":"quota exceeded"}]}"#)
        }
        false => take(seen),
    })
    .await;
    let to = fake.reference("to:v1");
    let error = node
        .pusher(quick())
        .push(&image, &to, None, &Silent)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, PushError::Registry { what, .. } if what == "the manifest"),
        "{error}"
    );
    assert!(error.to_string().contains("quota exceeded"), "{error}");
    let known = node
        .store
        .resolve(&image.id.to_string())
        .unwrap()
        .unwrap()
        .repo_digests;
    assert_eq!(
        known.len(),
        2,
        "where it came from and where it was pushed first, not where it was refused: {known:?}"
    );

    let by_digest = to.with_digest(made.digest);
    let error = node
        .pusher(quick())
        .push(&image, &by_digest, None, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, PushError::Digest { .. }), "{error}");
    let closed = slipway_image::Reference::parse("127.0.0.1:1/to:v1").unwrap();
    let error = node
        .pusher(quick())
        .push(&image, &closed, None, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, PushError::Unreachable { .. }), "{error}");
}

/// Wants the password for everything but what `free` names.
fn guarded(got: &Shared, free: fn(&Seen) -> bool) -> impl Fn(&Seen) -> Reply + Send + Sync + use<> {
    let take = taking(got);
    move |seen| match seen.header("authorization") {
        None if !free(seen) => Reply::new(401).header("www-authenticate", "Basic realm=\"r\""),
        _ => take(seen),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_location_elsewhere_gets_neither_the_password_nor_an_answer_to_its_challenge() {
    if !root() {
        return;
    }
    let node = Node::new();
    let (made, image) = pulled(&node, 20 << 20).await;
    for challenging in [false, true] {
        let got = Shared::default();
        let storage = taking(&got);
        let elsewhere = Fake::start(move |seen, _| match challenging {
            true => Reply::new(401).header(
                "www-authenticate",
                format!("Bearer realm=\"http://{}/token\"", seen.header("host").unwrap()),
            ),
            false => storage(seen),
        })
        .await;
        let (take, host) = (guarded(&got, |_| false), elsewhere.host.clone());
        let fake = Fake::start(move |seen, _| {
            let reply = take(seen);
            let location = reply
                .headers
                .iter()
                .find(|(name, _)| name == "location")
                .map(|(_, to)| to.clone());
            match location {
                Some(to) => Reply::new(202).header("location", format!("http://{host}{to}")),
                None => reply,
            }
        })
        .await;
        let credentials = Some(slipway_image::Credentials::basic("me", "secret"));
        let config = slipway_image::RegistryConfig {
            attempts: 2,
            ..quick()
        };
        let pushed = node
            .pusher(config)
            .push(&image, &fake.reference("to:v1"), credentials, &Silent)
            .await;
        assert!(fake.count(|seen| seen.header("authorization").is_some()) > 0);
        assert!(elsewhere.count(|_| true) > 0);
        assert_eq!(
            elsewhere.count(|seen| seen.header("authorization").is_some()),
            0,
            "{challenging}"
        );
        assert_eq!(
            elsewhere.count(|seen| seen.path == "/token"),
            0,
            "its challenge is not answered"
        );
        match pushed {
            Ok(digest) => assert_eq!((digest, challenging), (made.digest, false)),
            Err(error) => assert!(
                challenging && chain(&error).contains(&elsewhere.host),
                "{}",
                chain(&error)
            ),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_location_that_names_the_registry_itself_is_its_own() {
    if !root() {
        return;
    }
    let node = Node::new();
    let (made, image) = pulled(&node, 20 << 20).await;
    let got = Shared::default();
    let take = guarded(&got, |_| false);
    let fake = Fake::start(move |seen, _| {
        let mut reply = take(seen);
        let host = seen.header("host").unwrap().to_owned();
        for (name, value) in &mut reply.headers {
            if name == "location" {
                *value = format!("http://{host}{value}");
            }
        }
        reply
    })
    .await;
    let credentials = Some(slipway_image::Credentials::basic("me", "secret"));
    let pushed = node
        .pusher(quick())
        .push(&image, &fake.reference("to:v1"), credentials, &Silent)
        .await;
    assert_eq!(pushed.unwrap_or_else(|e| panic!("{}", chain(&e))), made.digest);
    assert_whole(&got, &made);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_whose_layers_came_as_other_blobs_before_can_be_pushed_and_saved() {
    if !root() {
        return;
    }
    let node = Node::new();
    let tar = image::tar(&[("file", &noise(5000, 9)), ("zeros", &[0; 50_000])]);
    let packed = |level: u32| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
        std::io::Write::write_all(&mut encoder, &tar).unwrap();
        let bytes = encoder.finish().unwrap();
        image::Blob {
            digest: Digest::of(&bytes),
            diff_id: Digest::of(&tar),
            bytes,
        }
    };
    let (one, two) = (
        image::oci(&[packed(1)], "amd64"),
        image::oci(&[packed(9), layer(&[("more", b"more")])], "amd64"),
    );
    assert_ne!(one.layers[0].digest, two.layers[0].digest);
    let good = well(&[("one:v1", &one), ("two:v1", &two)]);
    let from = Fake::start(move |seen, _| good(seen)).await;
    let puller = node.puller(quick());
    for name in ["one:v1", "two:v1"] {
        puller
            .pull(&from.reference(name), None, &amd64(), &Silent)
            .await
            .unwrap();
    }
    let image = node
        .store
        .resolve(&from.reference("two:v1").to_string())
        .unwrap()
        .unwrap();
    let got = Shared::default();
    let take = taking(&got);
    let fake = Fake::start(move |seen, _| take(seen)).await;
    let pushed = node
        .pusher(quick())
        .push(&image, &fake.reference("to:v1"), None, &Silent)
        .await;
    assert_eq!(pushed.unwrap_or_else(|e| panic!("{}", chain(&e))), two.digest);
    assert_whole(&got, &two);
    for format in [
        slipway_image::ArchiveFormat::Oci,
        slipway_image::ArchiveFormat::Docker,
    ] {
        let mut archive = Vec::new();
        let saved = node.store.export(&[&image.id.to_string()], format, &mut archive);
        saved.unwrap_or_else(|e| panic!("{}", chain(&e)));
    }
    // Both layers are here now, and the whole image comes again without a byte of a layer.
    node.store.remove_image(&image.id).unwrap();
    let before = from.count(|seen| seen.is_blob(&two.layers[0].digest));
    assert_eq!(before, 1);
}
