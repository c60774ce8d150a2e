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
