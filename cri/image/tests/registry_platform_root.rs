//! Images of several platforms under one tag and one digest. Unpacking needs root.
#![allow(clippy::unwrap_used)]

mod registry_support;

use registry_support::fake::{Fake, Reply, well};
use registry_support::image::{self, three_layers};
use registry_support::{Node, chain, quick, root};
use slipway_image::{Digest, ImageId, Platform, Silent};

/// Another platform than this machine's, which it cannot run.
fn foreign() -> (&'static str, &'static str) {
    match std::env::consts::ARCH {
        "aarch64" => ("arm64", "amd64"),
        _ => ("amd64", "arm64"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_platforms_image_does_not_take_the_name_and_a_digest_means_this_machines() {
    if !root() {
        return;
    }
    let (own, other) = foreign();
    let (ours, theirs) = (
        image::oci(&three_layers("ours"), own),
        image::oci(&three_layers("theirs"), other),
    );
    let (index, digest) = image::index(&[(&theirs, Some(other)), (&ours, Some(own))], image::OCI_INDEX);
    let good = well(&[("app:ours", &ours), ("app:theirs", &theirs)]);
    let target = digest.to_string();
    let fake = Fake::start(move |seen, _| {
        let wanted = seen.path.strip_prefix("/v2/app/manifests/");
        match wanted.is_some_and(|wanted| wanted == "v1" || wanted == target) {
            true => Reply::new(200)
                .header("content-type", image::OCI_INDEX)
                .header("docker-content-digest", &*target)
                .body(index.clone()),
            false => good(seen),
        }
    })
    .await;
    let name = fake.reference("app:v1");
    let by_digest = name.with_digest(digest).to_string();
    let (here, there) = (
        Platform::new("linux", own, None),
        Platform::new("linux", other, None),
    );
    let id = |made: &image::Made| ImageId::from(Digest::of(&made.config));
    for ours_first in [true, false] {
        let node = Node::new();
        let puller = node.puller(quick());
        let mut order = [(&here, id(&ours)), (&there, id(&theirs))];
        if !ours_first {
            order.reverse();
        }
        // Twice: the second time it is all here.
        for (platform, id) in order.iter().chain(&order) {
            let pulled = puller.pull(&name, None, platform, &Silent).await;
            assert_eq!(pulled.unwrap_or_else(|e| panic!("{}", chain(&e))).id, *id);
        }
        let resolve = |name: &str| node.store.resolve(name).unwrap().map(|image| image.id);
        assert_eq!(
            resolve(&name.to_string()),
            Some(id(&ours)),
            "ours first: {ours_first}"
        );
        assert_eq!(resolve(&by_digest), Some(id(&ours)), "ours first: {ours_first}");
        let other = node.store.resolve_for(&by_digest, &there).unwrap().unwrap();
        assert_eq!((other.id, other.names.len()), (id(&theirs), 0));
        let blobs = fake.count(|seen| seen.is_blob(&theirs.layers[0].digest));
        puller
            .pull(&fake.reference(&format!("app@{digest}")), None, &there, &Silent)
            .await
            .unwrap();
        assert_eq!(
            fake.count(|seen| seen.is_blob(&theirs.layers[0].digest)),
            blobs,
            "it is here"
        );
    }
}

/// Serves documents: the first under a tag, all under their digests; and what these images need besides.
async fn documents(served: Vec<(&'static str, Vec<u8>)>, images: &[image::Made]) -> Fake {
    let names: Vec<String> = (0..images.len()).map(|n| format!("app:t{n}")).collect();
    let named: Vec<(&str, &image::Made)> = names.iter().map(String::as_str).zip(images).collect();
    let good = well(&named);
    let by_name: std::collections::HashMap<String, usize> = served
        .iter()
        .enumerate()
        .map(|(at, (_, bytes))| (Digest::of(bytes).to_string(), at))
        .collect();
    Fake::start(move |seen, _| {
        let wanted = seen.path.strip_prefix("/v2/app/manifests/").unwrap_or_default();
        let at = match wanted {
            "v1" => Some(0),
            digest => by_name.get(digest).copied(),
        };
        let Some(at) = at else { return good(seen) };
        let (media_type, bytes) = &served[at];
        Reply::new(200)
            .header("content-type", *media_type)
            .header("docker-content-digest", Digest::of(bytes).to_string())
            .body(bytes.clone())
    })
    .await
}

fn index_of(entries: &[(&str, &[u8], bool)]) -> Vec<u8> {
    let (own, _) = foreign();
    let entries: Vec<_> = entries
        .iter()
        .map(|(media_type, bytes, says)| {
            let mut entry = serde_json::json!({
                "mediaType": media_type, "digest": Digest::of(bytes).to_string(), "size": bytes.len(),
            });
            if *says {
                entry["platform"] = serde_json::json!({ "os": "linux", "architecture": own });
            }
            entry
        })
        .collect();
    let index =
        serde_json::json!({ "schemaVersion": 2, "mediaType": image::OCI_INDEX, "manifests": entries });
    serde_json::to_vec(&index).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_are_followed_so_deep_and_no_deeper() {
    if !root() {
        return;
    }
    let (own, _) = foreign();
    let made = image::oci(&three_layers("deep"), own);
    for (depth, says) in [(3, true), (3, false), (4, true), (4, false), (40, true)] {
        let mut served = vec![(image::OCI_MANIFEST, made.manifest.clone())];
        for _ in 0..depth {
            let (media_type, below) = &served[0];
            let index = index_of(&[(media_type, below, says)]);
            served.insert(0, (image::OCI_INDEX, index));
        }
        let fake = documents(served, std::slice::from_ref(&made)).await;
        let node = Node::new();
        let here = Platform::new("linux", own, None);
        let name = fake.reference("app:v1");
        let pulled = node.puller(quick()).pull(&name, None, &here, &Silent).await;
        let asked = fake.count(|seen| seen.method == "GET" && seen.path.contains("/manifests/"));
        match depth {
            3 => assert_eq!(
                (pulled.unwrap().id.digest(), asked),
                (&Digest::of(&made.config), 4)
            ),
            _ => {
                let said = chain(&pulled.unwrap_err());
                assert!(said.contains("more than 3 deep"), "{said}");
                assert!(asked <= 5, "{asked} documents were asked for");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_thousand_entries_that_do_not_say_their_platform_a_few_are_looked_into() {
    if !root() {
        return;
    }
    let (own, other) = foreign();
    let made = image::oci(&three_layers("one of them"), own);
    for ours in [3, 4] {
        // Others' images, each with a configuration of its own, and ours among them.
        let images: Vec<image::Made> = (0..1000)
            .map(|n| match n == ours {
                true => made.clone(),
                false => image::oci(&[image::layer(&[(&format!("f{n}"), b"")])], other),
            })
            .collect();
        let entries: Vec<(&str, &[u8], bool)> = images
            .iter()
            .map(|image| (image::OCI_MANIFEST, image.manifest.as_slice(), false))
            .collect();
        let mut served = vec![(image::OCI_INDEX, index_of(&entries))];
        served.extend(
            images
                .iter()
                .map(|image| (image::OCI_MANIFEST, image.manifest.clone())),
        );
        let fake = documents(served, &images).await;
        let node = Node::new();
        let here = Platform::new("linux", own, None);
        let pulled = node
            .puller(quick())
            .pull(&fake.reference("app:v1"), None, &here, &Silent)
            .await;
        match (ours, pulled) {
            (3, pulled) => assert_eq!(pulled.unwrap().id.digest(), &Digest::of(&made.config)),
            (_, pulled) => {
                let said = chain(&pulled.unwrap_err());
                assert!(said.contains("does not exist for"), "{said}");
            }
        }
        let asked = |what: &str| fake.count(|seen| seen.method == "GET" && seen.path.contains(what));
        assert_eq!(asked("/manifests/"), 1 + 4);
        let layers = if ours == 3 { made.layers.len() } else { 0 };
        assert!(asked("/blobs/") - layers <= 5, "configurations");
    }
}
