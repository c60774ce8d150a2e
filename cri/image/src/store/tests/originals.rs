//! Which blobs a layer may be pushed as, and how long they stay.

use crate::catalog::Durability;
use crate::testing::{Bed, Blob, build, gzip, is_root, pull, tar};
use crate::{Compression, Digest, StoreError};
use oci_spec::image::MediaType;

/// The same tar as another blob.
fn recompressed(of: &[(&str, &[u8])]) -> Blob {
    Blob::new(&tar(of), MediaType::ImageLayerZstd)
}

const FILES: &[(&str, &[u8])] = &[("etc/", b""), ("etc/a", &[1; 30_000])];

#[test]
fn root_an_image_cannot_put_another_blob_under_a_layer_that_is_here() {
    if !is_root("another_blob_under_a_layer") {
        return;
    }
    let bed = Bed::new();
    let good = Blob::gzip(FILES);
    let base = pull(&bed.store, std::slice::from_ref(&good), &["base"], "").unwrap();
    for bytes in [
        gzip(b"nothing of the kind"),
        gzip(&tar(&[("etc/a", &[2; 60_000])])),
    ] {
        let mut liar = good.clone();
        liar.descriptor.set_digest(Digest::of(&bytes).into());
        liar.descriptor.set_size(bytes.len() as u64);
        liar.bytes = bytes;
        let error = pull(&bed.store, &[liar], &["liar"], "liar").unwrap_err();
        assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error:?}");
        assert!(bed.store.resolve("liar").unwrap().is_none());
    }
    // One that is here already, as another layer's.
    let other = Blob::gzip(&[("b", b"2")]);
    pull(&bed.store, std::slice::from_ref(&other), &["other"], "other").unwrap();
    let mut liar = other;
    liar.diff_id = good.diff_id;
    let error = pull(&bed.store, &[liar], &["liar"], "liar").unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::DigestMismatch { .. } | StoreError::SizeMismatch { .. }
        ),
        "{error:?}"
    );
    let built = build(&bed.store, Some(&base), "data", b"3", "app").unwrap();
    let lease = bed.store.lease("push").unwrap();
    let manifest = bed
        .store
        .manifest(&built.id, Compression::default(), &lease)
        .unwrap();
    assert_eq!(manifest.layers[0].digest(), good.descriptor.digest());
}

#[test]
fn root_a_layers_other_blob_is_checked_and_goes_with_the_image_that_names_it() {
    if !is_root("a_layers_other_blob") {
        return;
    }
    let bed = Bed::new();
    let (first, second) = (Blob::gzip(FILES), recompressed(FILES));
    let base = pull(&bed.store, std::slice::from_ref(&first), &["base"], "").unwrap();
    let other = pull(&bed.store, std::slice::from_ref(&second), &["other"], "other").unwrap();
    assert_eq!(bed.snapshots().len(), 1, "its files are there once");
    bed.store.gc().unwrap();
    let here = |blob: &Blob| bed.store.blob(&blob.digest()).unwrap().is_some();
    assert!(here(&first) && here(&second), "each image has its own");
    let built = build(&bed.store, Some(&base), "data", b"3", "app").unwrap();
    bed.store.remove_image(&other.id).unwrap();
    assert!(here(&first) && !here(&second), "nobody names it any more");
    // The last one stays as long as the layer: what is built on it has to be pushed.
    bed.store.remove_image(&base.id).unwrap();
    assert!(here(&first));
    let lease = bed.store.lease("push").unwrap();
    let manifest = bed
        .store
        .manifest(&built.id, Compression::default(), &lease)
        .unwrap();
    assert_eq!(manifest.layers[0].digest(), first.descriptor.digest());
    drop(lease);
    bed.store.remove_image(&built.id).unwrap();
    assert!(!here(&first));
}

#[test]
fn root_what_a_layer_is_pushed_as_is_told_by_its_bytes() {
    if !is_root("told_by_its_bytes") {
        return;
    }
    let bed = Bed::new();
    let mut foreign = Blob::gzip(FILES);
    foreign
        .descriptor
        .set_media_type(MediaType::ImageLayerNonDistributable);
    let base = pull(&bed.store, &[foreign], &["base"], "").unwrap();
    let lease = bed.store.lease("push").unwrap();
    let blob = bed
        .store
        .layer_blob(&base.chain.unwrap(), Compression::default(), &lease)
        .unwrap();
    assert_eq!(blob.media_type(), &MediaType::ImageLayerGzip);
}

#[test]
fn root_the_only_blob_of_a_pulled_image_stays_where_it_cannot_be_made_again() {
    if !is_root("the_only_blob_of_a_pulled_image") {
        return;
    }
    let bed = Bed::new();
    let built = build(&bed.store, None, "f", &[7; 100_000], "built").unwrap();
    let lease = bed.store.lease("push").unwrap();
    let descriptor = bed
        .store
        .layer_blob(&built.chain.unwrap(), Compression::default(), &lease)
        .unwrap();
    let digest = Digest::try_from(descriptor.digest()).unwrap();
    let pushed = Blob {
        bytes: std::fs::read(bed.store.blob(&digest).unwrap().unwrap().path).unwrap(),
        diff_id: built.layers[0],
        descriptor,
    };
    drop(lease);
    let here = || bed.store.blob(&digest).unwrap().is_some();
    let pulled = || pull(&bed.store, std::slice::from_ref(&pushed), &["pulled"], "pulled").unwrap();
    let change = |sql: &str| {
        let changed = |c: &rusqlite::Transaction<'_>| Ok(c.execute(sql, []).unwrap());
        let rows = bed.store.inner.catalog.write(Durability::Normal, changed);
        assert_eq!(rows.unwrap(), 1, "{sql}");
    };

    pulled();
    bed.store.prune_blobs().unwrap();
    assert!(!here(), "it can be made again");

    // It comes again, after what made it has gone with another version.
    change("UPDATE variants SET encoder = 'gzip-of-old/6'");
    pulled();
    bed.store.prune_blobs().unwrap();
    assert!(here(), "nothing here makes it again");
    change("UPDATE variants SET encoder = 'tar'");
    change("UPDATE layers SET options = NULL");
    bed.store.prune_blobs().unwrap();
    assert!(here(), "nobody knows how the layer was made");

    bed.store.remove_image(&pulled().id).unwrap();
    bed.store.prune_blobs().unwrap();
    assert!(!here(), "no image names it");
}
