//! Active snapshots, layers, and what is torn. These need root: overlay mounts and trusted attributes.

use crate::catalog::Durability;
use crate::catalog::variants::{self, BlobRow};
use crate::store::{LayerOptions, OwnerKind};
use crate::testing::{Bed, Blob, build, is_root, pull};
use crate::{ChainId, Compression, StoreError};
use slipway_snapshot::unmount;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

#[test]
fn root_a_container_runs_on_a_pulled_image_and_its_writes_are_its_own() {
    if !is_root("a_container_runs") {
        return;
    }
    let bed = Bed::new();
    let layers = [
        Blob::gzip(&[("etc/", b""), ("etc/a", b"1")]),
        Blob::gzip(&[("etc/b", b"2")]),
    ];
    let image = pull(&bed.store, &layers, &["x"], "").unwrap();
    let lease = bed.store.persistent_lease("c1").unwrap();
    let active = bed.store.prepare("c1", image.chain.as_ref(), &lease).unwrap();
    let target = bed.target();
    active.mount.mount(&target).unwrap();
    assert_eq!(std::fs::read_to_string(target.join("etc/a")).unwrap(), "1");
    std::fs::write(target.join("etc/a"), vec![b'x'; 100_000]).unwrap();
    unmount(&target).unwrap();
    assert!(bed.store.usage("c1").unwrap().bytes >= 100_000);
    assert!(matches!(
        bed.store.prepare("c1", None, &lease),
        Err(StoreError::SnapshotExists { key }) if key == "c1"
    ));
    // Another process sees it, also after everything was collected.
    let other = bed.again(OwnerKind::Cli);
    bed.store.remove_image(&image.id).unwrap();
    let seen = other.active("c1").unwrap().unwrap();
    assert_eq!(seen.mount, active.mount);
    assert_eq!(seen.parent, image.chain);
    seen.mount.mount(&target).unwrap();
    assert_eq!(std::fs::read_to_string(target.join("etc/b")).unwrap(), "2");
    unmount(&target).unwrap();
    other.remove_active("c1").unwrap();
    other.remove_active("c1").unwrap();
    other.release_lease("c1").unwrap();
    assert_eq!(other.gc().unwrap().snapshots, 2);
    assert!(bed.snapshots().is_empty());
    assert!(matches!(other.usage("c1"), Err(StoreError::NoSnapshot { .. })));
}

#[test]
fn root_a_view_is_read_only_and_takes_no_space() {
    if !is_root("a_view_is_read_only") {
        return;
    }
    let bed = Bed::new();
    let image = pull(&bed.store, &[Blob::gzip(&[("a", b"1")])], &["x"], "").unwrap();
    let lease = bed.store.lease("x").unwrap();
    let target = bed.target();
    for (key, chain) in [("v", image.chain.as_ref()), ("nothing", None)] {
        let view = bed.store.view(key, chain, &lease).unwrap();
        view.mount.mount(&target).unwrap();
        assert!(std::fs::write(target.join("x"), "").is_err());
        assert_eq!(target.join("a").exists(), chain.is_some());
        unmount(&target).unwrap();
        assert_eq!(bed.store.usage(key).unwrap(), slipway_snapshot::Usage::default());
        bed.store.remove_active(key).unwrap();
    }
    assert_eq!(bed.snapshots().len(), 1);
}

#[test]
fn root_a_step_goes_on_before_the_one_below_is_hashed() {
    if !is_root("a_step_goes_on") {
        return;
    }
    let bed = Bed::new();
    let target = bed.target();
    let lease = bed.store.lease("build").unwrap();
    let base = pull(&bed.store, &[Blob::gzip(&[("base", b"1")])], &["x"], "").unwrap();
    let write = |active: &crate::Active, name: &str| {
        active.mount.mount(&target).unwrap();
        std::fs::write(target.join(name), name).unwrap();
        let seen = std::fs::read_dir(&target).unwrap().count();
        unmount(&target).unwrap();
        seen
    };
    let one = bed.store.prepare("s1", base.chain.as_ref(), &lease).unwrap();
    assert_eq!(write(&one, "one"), 2);
    let two = bed.store.prepare_on("s2", &one, &lease).unwrap();
    assert_eq!(write(&two, "two"), 3);
    let three = bed.store.prepare_on("s3", &two, &lease).unwrap();
    bed.store.gc().unwrap();
    assert_eq!(write(&three, "three"), 4);
    let hash = |active| bed.store.hash_layer(active, &LayerOptions::default()).unwrap();
    let (h1, h2, h3) = (hash(&one), hash(&two), hash(&three));
    let first = bed
        .store
        .commit_layers(base.chain.as_ref(), vec![(one.clone(), h1)], &lease)
        .unwrap();
    // The one below is a layer now: it may still be built upon.
    let late = bed.store.prepare_on("s2b", &one, &lease).unwrap();
    assert_eq!(late.lower.len(), 2);
    let rest = bed
        .store
        .commit_layers(Some(&first[0].chain), vec![(two, h2), (three, h3)], &lease)
        .unwrap();
    assert_eq!(rest[1].parent, Some(rest[0].chain));
    assert_eq!(rest[0].parent, Some(first[0].chain));
    let top = bed.store.prepare("c", Some(&rest[1].chain), &lease).unwrap();
    assert_eq!(write(&top, "more"), 5);
    for key in ["c", "s2b"] {
        bed.store.remove_active(key).unwrap();
    }
    assert!(bed.store.actives().unwrap().is_empty());
    drop(lease);
    assert_eq!(bed.store.gc().unwrap().snapshots, 3);
}

#[test]
fn root_the_same_layer_made_twice_is_kept_once() {
    if !is_root("the_same_layer_made_twice") {
        return;
    }
    let bed = Bed::new();
    let other = bed.again(OwnerKind::Build);
    let (lease, lease2) = (bed.store.lease("a").unwrap(), other.lease("b").unwrap());
    let options = LayerOptions {
        clamp_mtime: Some(1),
        ..LayerOptions::default()
    };
    let make = |store: &crate::Store, key: &str, lease| {
        let active = store.prepare(key, None, lease).unwrap();
        std::fs::write(active.upper.join("f"), "same").unwrap();
        active
    };
    let (one, two) = (make(&bed.store, "a", &lease), make(&other, "b", &lease2));
    let on_two = other.prepare_on("on-b", &two, &lease2).unwrap();
    let first = bed.store.seal_layer(one, &options, None, &lease).unwrap();
    let second = other.seal_layer(two.clone(), &options, None, &lease2).unwrap();
    assert_eq!(first, second);
    // What was prepared on the second one's directory still needs it.
    other.gc().unwrap();
    assert_eq!(other.active("on-b").unwrap().unwrap().lower, [two.snapshot]);
    assert_eq!(bed.snapshots().len(), 3);
    let layer = other
        .seal_layer(on_two, &options, Some(&second.chain), &lease2)
        .unwrap();
    assert_eq!(layer.parent, Some(first.chain));
    assert_eq!(other.gc().unwrap().snapshots, 1);
    assert_eq!(bed.snapshots().len(), 2);
}

#[test]
fn root_a_new_layer_takes_the_roots_owner_and_mode_from_below() {
    if !is_root("a_new_layer_takes_the_roots") {
        return;
    }
    let bed = Bed::new();
    let lease = bed.store.lease("x").unwrap();
    let one = bed.store.prepare("a", None, &lease).unwrap();
    std::fs::set_permissions(&one.upper, PermissionsExt::from_mode(0o1700)).unwrap();
    let two = bed.store.prepare_on("b", &one, &lease).unwrap();
    let mode = std::fs::metadata(&two.upper).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o1700);
    std::fs::write(two.upper.join("f"), "").unwrap();
    let hashed = bed.store.hash_layer(&two, &LayerOptions::default()).unwrap();
    assert_eq!(hashed.stats.entries, 1, "the root did not change");
}

#[test]
fn root_a_torn_layer_counts_as_absent_and_is_repaired_by_a_pull() {
    if !is_root("a_torn_layer") {
        return;
    }
    let bed = Bed::new();
    let layers = [
        Blob::gzip(&[("a", b"1")]),
        Blob::gzip(&[("b", b"2")]),
        Blob::gzip(&[("c", b"3")]),
    ];
    let image = pull(&bed.store, &layers, &["x"], "").unwrap();
    let chains = ChainId::all(&image.layers);
    let dir = |chain| {
        bed.root()
            .join("snapshots")
            .join(bed.store.layer(chain).unwrap().unwrap().snapshot.as_str())
    };
    let (marker, whole) = (dir(&chains[1]).join("committed"), dir(&chains[0]));
    let tears: [Box<dyn Fn()>; 3] = [
        Box::new(|| std::fs::remove_file(&marker).unwrap()),
        Box::new(|| std::fs::write(dir(&chains[2]).join("committed"), "slipway la").unwrap()),
        Box::new(move || std::fs::remove_dir_all(&whole).unwrap()),
    ];
    for (n, tear) in tears.iter().enumerate() {
        tear();
        assert!(bed.store.resolve("x").unwrap().is_none(), "tear {n}");
        assert!(!bed.store.find("x").unwrap().unwrap().intact);
        let lease = bed.store.lease("x").unwrap();
        let error = bed.store.prepare("c", image.chain.as_ref(), &lease).unwrap_err();
        assert!(matches!(error, StoreError::NoLayer { .. }), "{error}");
        assert!(bed.store.actives().unwrap().is_empty());
        drop(lease);
        let again = pull(&bed.store, &layers, &["x"], "").unwrap();
        assert_eq!((again.id, again.intact), (image.id, true));
        bed.store.gc().unwrap();
        assert_eq!(bed.snapshots().len(), 3);
        let target = bed.target();
        let lease = bed.store.lease("x").unwrap();
        let view = bed.store.view("v", image.chain.as_ref(), &lease).unwrap();
        view.mount.mount(&target).unwrap();
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 3);
        unmount(&target).unwrap();
    }
}

#[test]
fn root_a_built_layers_blob_is_made_pruned_and_made_again_with_the_same_bytes() {
    if !is_root("a_built_layers_blob") {
        return;
    }
    let bed = Bed::new();
    let base = pull(
        &bed.store,
        &[Blob::gzip(&[("base", &[b'b'; 5000])])],
        &["base"],
        "",
    )
    .unwrap();
    let contents: Vec<u8> = (0..3_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    let image = build(&bed.store, Some(&base), "data", &contents, "built").unwrap();
    let lease = bed.store.lease("push").unwrap();
    let mut all = Vec::new();
    for compression in [Compression::Gzip(1), Compression::Zstd(1), Compression::None] {
        let manifest = bed.store.manifest(&image.id, compression, &lease).unwrap();
        assert_eq!(manifest.layers.len(), 2);
        assert_eq!(
            manifest.layers[0].digest(),
            &oci_spec::image::Digest::from(Blob::gzip(&[("base", &[b'b'; 5000])]).digest())
        );
        all.push((compression, manifest));
    }
    assert_eq!(
        all[2].1.layers[1].digest().to_string(),
        image.layers[1].to_string(),
        "the tar is the layer"
    );
    drop(lease);
    bed.store.gc().unwrap();
    assert_eq!(
        bed.list("content/sha256").len(),
        4,
        "variants stay with their layer"
    );
    assert_eq!(bed.store.prune_blobs().unwrap().blobs, 3);
    assert_eq!(
        bed.list("content/sha256").len(),
        1,
        "a pulled blob cannot be made again, so it stays"
    );
    let lease = bed.store.lease("push again").unwrap();
    for (compression, before) in &all {
        let known = bed
            .store
            .known_layer_blob(&image.layers[1], *compression)
            .unwrap()
            .unwrap();
        assert_eq!(known, before.layers[1]);
        let mut followed = None;
        let chain = image.chain.unwrap();
        let blob = bed
            .store
            .layer_blob_with(&chain, *compression, &lease, |f| followed = Some(f))
            .unwrap();
        assert_eq!(blob, known);
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut followed.unwrap(), &mut bytes).unwrap();
        assert_eq!(crate::Digest::of(&bytes).to_string(), blob.digest().to_string());
        let manifest = bed.store.manifest(&image.id, *compression, &lease).unwrap();
        assert_eq!(manifest.digest, before.digest);
    }
}

#[test]
fn root_a_layer_that_changed_cannot_be_encoded_again() {
    if !is_root("a_layer_that_changed") {
        return;
    }
    let bed = Bed::new();
    let image = build(&bed.store, None, "data", b"as it was", "built").unwrap();
    let chain = image.chain.unwrap();
    let layer = bed.store.layer(&chain).unwrap().unwrap();
    let file: PathBuf = bed
        .root()
        .join("snapshots")
        .join(layer.snapshot.as_str())
        .join("fs/data");
    std::fs::write(file, "changed!!").unwrap();
    let lease = bed.store.lease("push").unwrap();
    let error = bed
        .store
        .layer_blob(&chain, Compression::Gzip(1), &lease)
        .unwrap_err();
    assert!(matches!(error, StoreError::NotReproducible { .. }), "{error}");
    assert!(bed.list("content/sha256").is_empty() && bed.list("content/ingest").is_empty());
}

#[test]
fn root_a_pulled_layer_is_never_compressed_anew() {
    if !is_root("a_pulled_layer_is_never") {
        return;
    }
    let bed = Bed::new();
    let blob = Blob::gzip(&[("a", b"1")]);
    let image = pull(&bed.store, std::slice::from_ref(&blob), &["x"], "").unwrap();
    let lease = bed.store.lease("push").unwrap();
    let made = bed
        .store
        .layer_blob(&image.chain.unwrap(), Compression::Zstd(3), &lease)
        .unwrap();
    assert_eq!(made, blob.descriptor);
    drop(lease);
    std::fs::remove_file(bed.store.blob(&blob.digest()).unwrap().unwrap().path).unwrap();
    let lease = bed.store.lease("push").unwrap();
    let error = bed
        .store
        .layer_blob(&image.chain.unwrap(), Compression::Zstd(3), &lease)
        .unwrap_err();
    assert!(
        matches!(&error, StoreError::BlobPruned { digest, .. } if *digest == blob.digest()),
        "{error}"
    );
    let original = bed
        .store
        .manifest(&image.id, Compression::Zstd(3), &lease)
        .unwrap();
    assert_eq!(
        Some(original.digest),
        image.manifest,
        "a pulled image keeps its manifest"
    );
}

#[test]
fn root_a_built_layers_blob_that_came_back_from_a_registry_can_be_made_again() {
    if !is_root("a_blob_that_came_back") {
        return;
    }
    let bed = Bed::new();
    let image = build(&bed.store, None, "f", &[7; 100_000], "built").unwrap();
    let (chain, diff) = (image.chain.unwrap(), image.layers[0]);
    let lease = bed.store.lease("push").unwrap();
    let pushed = bed
        .store
        .layer_blob(&chain, Compression::default(), &lease)
        .unwrap();
    let digest = crate::Digest::try_from(pushed.digest()).unwrap();
    drop(lease);
    bed.store.prune_blobs().unwrap();
    assert!(bed.store.blob(&digest).unwrap().is_none());
    // A pull of what was pushed finds the layer here, and the manifest names the blob.
    let lease = bed.store.lease("pull").unwrap();
    assert!(bed.store.has_or_can_make(&chain, &diff, &digest, &lease).unwrap());
    let foreign = crate::Digest::of(b"another encoding");
    assert!(
        !bed.store
            .has_or_can_make(&chain, &diff, &foreign, &lease)
            .unwrap()
    );
    assert!(bed.store.is_blob_of(&diff, &digest).unwrap());
    assert!(!bed.store.is_blob_of(&diff, &foreign).unwrap());
    let came = BlobRow {
        digest,
        size: pushed.size(),
    };
    bed.store
        .inner
        .catalog
        .write(Durability::Normal, |c| {
            variants::add_original(c, &diff, &came, pushed.media_type().as_ref())
        })
        .unwrap();
    for compression in [Compression::default(), Compression::None] {
        let again = bed.store.layer_blob(&chain, compression, &lease).unwrap();
        assert_eq!(again.digest(), pushed.digest());
    }
    assert!(bed.store.blob(&digest).unwrap().is_some());
}
