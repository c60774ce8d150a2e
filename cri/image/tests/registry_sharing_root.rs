//! Pulls at the same time, and pulls that nobody waits for any more. Unpacking needs root.
#![allow(clippy::unwrap_used)]

mod registry_support;

use registry_support::fake::{Fake, Reply, Seen, well};
use registry_support::image::{self, Made, layer, noise, three_layers};
use registry_support::{Heard, Node, amd64, quick, root};
use slipway_image::{Credentials, Digest, ProgressEvent, RegistryConfig, Silent};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

fn app() -> Made {
    image::oci(&three_layers("app"), "amd64")
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
async fn the_same_image_at_the_same_time_is_pulled_once() {
    if !root() {
        return;
    }
    let made = app();
    let stall = Some(Duration::from_millis(300));
    let fake = faulty(&made, move |_, _, good| Reply { stall, ..good }).await;
    let node = Node::new();
    let puller = node.puller(quick());
    let name = fake.reference("app:v1");
    let pulls = (0..5).map(|_| {
        let (puller, name) = (puller.clone(), name.clone());
        tokio::spawn(async move {
            let heard = Heard::default();
            let image = puller.pull(&name, None, &amd64(), &heard).await.unwrap();
            (image.id, heard)
        })
    });
    for pull in pulls.collect::<Vec<_>>() {
        let (id, heard) = pull.await.unwrap();
        assert_eq!(id.digest(), &Digest::of(&made.config));
        assert!(
            heard.any(|e| matches!(e, ProgressEvent::Layers { .. })),
            "everybody hears of it"
        );
    }
    for seen in [&made.layers[0].digest, &made.layers[2].digest] {
        assert_eq!(fake.count(|s| s.is_blob(seen)), 1);
    }
    assert_eq!(fake.count(|seen| seen.path.contains("/manifests/")), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_that_share_a_layer_fetch_it_once_also_when_the_first_pull_is_dropped() {
    if !root() {
        return;
    }
    let shared = layer(&[("shared", &noise(200_000, 9))]);
    let one = image::oci(&[shared.clone(), layer(&[("one", b"1")])], "amd64");
    let two = image::oci(&[shared.clone(), layer(&[("two", b"2")])], "amd64");
    let good = well(&[("one:v1", &one), ("two:v1", &two)]);
    let digest = shared.digest;
    let stall = Some(Duration::from_millis(400));
    let fake = Fake::start(move |seen, _| match seen.is_blob(&digest) {
        true => Reply { stall, ..good(seen) },
        false => good(seen),
    })
    .await;
    let node = Node::new();
    let puller = node.puller(quick());
    let (first, second) = (fake.reference("one:v1"), fake.reference("two:v1"));
    let begun = tokio::spawn({
        let (puller, first) = (puller.clone(), first.clone());
        async move { puller.pull(&first, None, &amd64(), &Silent).await }
    });
    while fake.count(|seen| seen.is_blob(&digest)) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let other = tokio::spawn({
        let (puller, second) = (puller.clone(), second.clone());
        async move { puller.pull(&second, None, &amd64(), &Silent).await }
    });
    while fake.count(|seen| seen.path.contains("/two/blobs/")) < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.abort();
    let image = other.await.unwrap().unwrap();
    assert_eq!(node.layer_file(&image, 0, "shared").unwrap(), noise(200_000, 9));
    assert_eq!(fake.count(|seen| seen.is_blob(&digest)), 1);
    assert!(node.store.resolve(&first.to_string()).unwrap().is_none());
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_pull_leaves_nothing_and_can_be_begun_anew() {
    if !root() {
        return;
    }
    let made = app();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let fake = faulty(&made, move |_, _, good| {
        let first = counted.fetch_add(1, Ordering::Relaxed) == 0;
        Reply {
            stall: first.then_some(Duration::from_secs(20)),
            ..good
        }
    })
    .await;
    let node = Node::new();
    let puller = node.puller(RegistryConfig {
        read_timeout: Duration::from_secs(30),
        ..quick()
    });
    let name = fake.reference("app:v1");
    let pull = tokio::spawn({
        let (puller, name) = (puller.clone(), name.clone());
        async move { puller.pull(&name, None, &amd64(), &Silent).await }
    });
    while calls.load(Ordering::Relaxed) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    pull.abort();
    assert!(pull.await.unwrap_err().is_cancelled());
    node.assert_nothing_half_there();
    let image = puller.pull(&name, None, &amd64(), &Silent).await.unwrap();
    assert_eq!(node.layer_file(&image, 2, "hello").unwrap(), b"hello app");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_gives_nothing_holds_up_no_pull_from_another_one() {
    if !root() {
        return;
    }
    let made = app();
    let stall = Some(Duration::from_secs(60));
    let slow = faulty(&made, move |_, _, good| Reply { stall, ..good }).await;
    let good = Fake::start({
        let good = well(&[("app:v1", &made)]);
        move |seen, _| good(seen)
    })
    .await;
    let node = Node::new();
    let puller = node.puller(RegistryConfig {
        read_timeout: Duration::from_secs(90),
        ..quick()
    });
    let begun = tokio::spawn({
        let (puller, name) = (puller.clone(), slow.reference("app:v1"));
        async move { puller.pull(&name, None, &amd64(), &Silent).await }
    });
    while slow.count(|seen| seen.is_blob(&made.layers[0].digest)) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let name = good.reference("app:v1");
    let platform = amd64();
    let pull = puller.pull(&name, None, &platform, &Silent);
    let image = tokio::time::timeout(Duration::from_secs(20), pull).await;
    assert_eq!(image.unwrap().unwrap().repo_digests.len(), 1);
    begun.abort();
    let _ = begun.await;
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_credentials_are_another_download() {
    if !root() {
        return;
    }
    let made = app();
    let stall = Some(Duration::from_millis(300));
    let fake = faulty(&made, move |_, _, good| Reply { stall, ..good }).await;
    let node = Node::new();
    let puller = node.puller(quick());
    let pulls = ["one", "two"].map(|user| {
        let (puller, name) = (puller.clone(), fake.reference("app:v1"));
        let auth = Some(Credentials::basic(user, "secret"));
        tokio::spawn(async move { puller.pull(&name, auth, &amd64(), &Silent).await.map(drop) })
    });
    for pull in pulls {
        pull.await.unwrap().unwrap();
    }
    assert_eq!(fake.count(|seen| seen.is_blob(&made.layers[0].digest)), 2);
    // Both have unpacked it, and one directory of each layer is of no use.
    node.store.gc().unwrap();
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_download_that_fails_for_whoever_began_it_fails_for_nobody_else() {
    if !root() {
        return;
    }
    let shared = layer(&[("shared", &noise(200_000, 9))]);
    let one = image::oci(&[shared.clone(), layer(&[("one", b"1")])], "amd64");
    let two = image::oci(&[shared.clone(), layer(&[("two", b"2")])], "amd64");
    let good = well(&[("one:v1", &one), ("two:v1", &two)]);
    let digest = shared.digest;
    let fake = Fake::start(move |seen, _| match seen.is_blob(&digest) {
        // It gives half of it, waits, and breaks off, as often as it is asked.
        true if seen.path.contains("/one/") => Reply {
            stall: Some(Duration::from_millis(300)),
            cut: Some(2),
            ..good(seen)
        },
        _ => good(seen),
    })
    .await;
    let node = Node::new();
    let puller = node.puller(quick());
    let begun = tokio::spawn({
        let (puller, first) = (puller.clone(), fake.reference("one:v1"));
        async move { puller.pull(&first, None, &amd64(), &Silent).await }
    });
    while fake.count(|seen| seen.is_blob(&digest)) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let second = fake.reference("two:v1");
    let image = puller.pull(&second, None, &amd64(), &Silent).await.unwrap();
    assert_eq!(node.layer_file(&image, 0, "shared").unwrap(), noise(200_000, 9));
    let asked = fake.count(|seen| seen.is_blob(&digest) && seen.path.contains("/one/"));
    assert!(asked > 1, "the second had waited for the first's download");
    begun.await.unwrap().unwrap_err();
    node.assert_nothing_half_there();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_between_the_layers_and_the_commit_leaves_the_blobs_alone() {
    if !root() {
        return;
    }
    let made = app();
    let fake = faulty(&made, |_, _, good| good).await;
    let node = Node::new();
    // The first thing a commit writes: what the pull itself does not hold at that moment may be gone.
    let catalog = rusqlite::Connection::open(node.dir.path().join("root/catalog.db")).unwrap();
    catalog
        .execute_batch(
            "CREATE TRIGGER collection AFTER INSERT ON blob_sources BEGIN
               UPDATE blobs SET doomed = 1 WHERE NOT EXISTS (
                 SELECT 1 FROM lease_items i JOIN leases l ON l.name = i.lease
                 WHERE i.kind = 'blob' AND i.item = blobs.digest AND l.what LIKE 'pull of %');
             END",
        )
        .unwrap();
    let puller = node.puller(quick());
    puller
        .pull(&fake.reference("app:v1"), None, &amd64(), &Silent)
        .await
        .unwrap();
    for layer in &made.layers {
        assert!(
            node.store.blob(&layer.digest).unwrap().is_some(),
            "{}",
            layer.digest
        );
    }
}
