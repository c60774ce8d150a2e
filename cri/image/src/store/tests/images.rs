//! What an image's identity means. These need root: layers have owners.

use crate::store::OwnerKind;
use crate::testing::{Bed, Blob, build, config, is_root, name, pull};
use crate::{Compression, Image, NewImage, Removal, StoreError, Writer};
use std::time::Duration;

fn names(image: &Image) -> Vec<String> {
    image.names.iter().map(ToString::to_string).collect()
}

#[test]
fn root_an_image_is_found_by_every_name_it_has() {
    if !is_root("an_image_is_found") {
        return;
    }
    let bed = Bed::new();
    let image = pull(
        &bed.store,
        &[Blob::gzip(&[("a", b"1")])],
        &["python:3", "ghcr.io/x/y"],
        "",
    )
    .unwrap();
    let hex = image.id.digest().hex();
    let by = [
        "python:3".to_owned(),
        "docker.io/library/python:3".to_owned(),
        "ghcr.io/x/y".to_owned(),
        image.repo_digests[0].clone(),
        image.id.to_string(),
        hex.clone(),
        hex[..12].to_owned(),
        format!("sha256:{}", &hex[..20]),
    ];
    for text in by {
        assert_eq!(
            bed.store.resolve(&text).unwrap().map(|i| i.id),
            Some(image.id),
            "{text}"
        );
    }
    for text in [
        "python",
        "python:4",
        &hex[..11],
        "",
        "NOT A NAME",
        &format!("{}0", &hex[..12]),
    ] {
        assert!(
            bed.store.resolve(text).unwrap().is_none() || hex.starts_with(text),
            "{text}"
        );
    }
    assert_eq!(
        names(&image),
        ["docker.io/library/python:3", "ghcr.io/x/y:latest"]
    );
    assert!(image.size > 0 && image.intact && !image.pinned && !image.built_here);
    assert_eq!(bed.again(OwnerKind::Cli).images().unwrap().len(), 1);
}

#[test]
fn root_a_name_moves_to_the_image_that_took_it_last_and_remembers_who_did() {
    if !is_root("a_name_moves") {
        return;
    }
    let bed = Bed::new();
    let first = pull(&bed.store, &[Blob::gzip(&[("a", b"1")])], &["app"], "1").unwrap();
    let second = build(&bed.store, Some(&first), "b", b"2", "app").unwrap();
    assert_eq!(bed.store.resolve("app").unwrap().unwrap().id, second.id);
    assert_eq!(
        bed.store.name_writer(&name("app")).unwrap().unwrap().0,
        Writer::Build
    );
    let old = bed.store.find(&first.id.to_string()).unwrap().unwrap();
    assert!(old.names.is_empty() && !old.repo_digests.is_empty());
    bed.store.tag(&first.id, &name("app:old"), Writer::User).unwrap();
    assert!(bed.store.untag(&name("app")).unwrap());
    assert!(!bed.store.untag(&name("app")).unwrap());
    assert!(bed.store.resolve("app").unwrap().is_none());
    let by_digest = name("app").with_digest(*first.id.digest());
    assert!(matches!(
        bed.store.tag(&first.id, &by_digest, Writer::User),
        Err(StoreError::BadName { .. })
    ));
    let nobody = crate::ImageId::from(crate::Digest::of(b"nobody"));
    assert!(matches!(
        bed.store.tag(&nobody, &name("x"), Writer::User),
        Err(StoreError::NoImage { .. })
    ));
}

#[test]
fn root_a_build_that_exists_nowhere_else_is_pinned_until_it_was_pushed() {
    if !is_root("a_build_that_exists_nowhere") {
        return;
    }
    let bed = Bed::new();
    let image = build(&bed.store, None, "a", b"1", "app").unwrap();
    assert!(image.pinned && image.built_here && image.repo_digests.is_empty() && image.manifest.is_none());
    bed.store.pin_builds_for(Some(Duration::ZERO));
    assert!(!bed.store.resolve("app").unwrap().unwrap().pinned);
    bed.store.pin_builds_for(None);
    let lease = bed.store.lease("push").unwrap();
    let manifest = bed
        .store
        .manifest(&image.id, Compression::default(), &lease)
        .unwrap();
    let digest = name("app").with_digest(manifest.digest).to_string();
    bed.store.record_push(&image.id, &digest, &manifest).unwrap();
    let pushed = bed.store.resolve("app").unwrap().unwrap();
    assert!(!pushed.pinned && pushed.built_here);
    assert_eq!(
        (pushed.repo_digests, pushed.manifest),
        (vec![digest.clone()], Some(manifest.digest))
    );
    assert_eq!(
        bed.store.manifest_bytes(&manifest.digest).unwrap().unwrap().0,
        manifest.bytes
    );
    assert_eq!(bed.store.resolve(&digest).unwrap().unwrap().id, image.id);
    bed.store.set_pinned(&image.id, true).unwrap();
    assert!(bed.store.resolve("app").unwrap().unwrap().pinned);
}

#[test]
fn root_a_build_that_is_made_again_is_pinned_anew() {
    if !is_root("a_build_that_is_made_again") {
        return;
    }
    let bed = Bed::new();
    let image = build(&bed.store, None, "a", b"1", "app").unwrap();
    let limit = Duration::from_millis(1500);
    bed.store.pin_builds_for(Some(limit));
    while bed.store.resolve("app").unwrap().unwrap().pinned {
        std::thread::sleep(Duration::from_millis(20));
    }
    let lease = bed.store.lease("build").unwrap();
    assert!(lease.image(&image.id).unwrap());
    let again = NewImage {
        config: &bed.store.config(&image.id).unwrap(),
        manifest: None,
        names: vec![name("app")],
        repo_digests: Vec::new(),
        writer: Writer::Build,
        lease: &lease,
    };
    let again = bed.store.commit_image(again).unwrap();
    assert_eq!(again.id, image.id);
    assert!(
        again.created_at >= image.created_at + limit && bed.store.resolve("app").unwrap().unwrap().pinned
    );
}

#[test]
fn root_a_build_that_lost_its_name_is_no_longer_pinned() {
    if !is_root("a_build_that_lost_its_name") {
        return;
    }
    let bed = Bed::new();
    let old = build(&bed.store, None, "a", b"1", "app").unwrap();
    build(&bed.store, None, "a", b"2", "app").unwrap();
    assert!(!bed.store.find(&old.id.to_string()).unwrap().unwrap().pinned);
}

#[test]
fn root_removing_an_image_leaves_what_others_need() {
    if !is_root("removing_an_image") {
        return;
    }
    let bed = Bed::new();
    let (a, b, c) = (
        Blob::gzip(&[("a", &[1; 9000])]),
        Blob::gzip(&[("b", b"2")]),
        Blob::gzip(&[("c", b"3")]),
    );
    let one = pull(&bed.store, &[a.clone(), b.clone()], &["one", "also-one"], "").unwrap();
    let two = pull(&bed.store, &[a.clone(), c.clone()], &["two"], "").unwrap();
    assert_eq!(bed.snapshots().len(), 3, "the common layer is there once");
    let lease = bed.store.lease("running").unwrap();
    assert!(bed.store.use_image("two", &lease).unwrap().is_some());
    let removed = bed.store.remove_image(&one.id).unwrap();
    assert_eq!(
        removed.names,
        [
            "docker.io/library/also-one:latest",
            "docker.io/library/one:latest"
        ]
    );
    assert!(removed.freed > 0);
    assert_eq!(bed.snapshots().len(), 2);
    assert!(bed.store.blob(&b.digest()).unwrap().is_none() && bed.store.blob(&a.digest()).unwrap().is_some());
    assert_eq!(
        bed.store.remove_image(&one.id).unwrap().names,
        Vec::<String>::new()
    );
    // In use: the name goes, the files stay until it is not.
    bed.store.remove_image(&two.id).unwrap();
    assert!(bed.store.resolve("two").unwrap().is_none());
    assert_eq!(bed.snapshots().len(), 2);
    drop(lease);
    bed.store.gc().unwrap();
    assert!(bed.snapshots().is_empty() && bed.list("content/sha256").is_empty());
}

#[test]
fn root_an_image_is_committed_only_with_all_its_layers_and_a_usable_configuration() {
    if !is_root("an_image_is_committed_only") {
        return;
    }
    let bed = Bed::new();
    let lease = bed.store.lease("x").unwrap();
    let commit = |config: &[u8]| {
        bed.store.commit_image(NewImage {
            config,
            manifest: None,
            names: vec![name("x")],
            repo_digests: Vec::new(),
            writer: Writer::Build,
            lease: &lease,
        })
    };
    let missing = config(&[Blob::gzip(&[("a", b"1")]).diff_id], "");
    assert!(matches!(commit(&missing), Err(StoreError::NoLayer { .. })));
    for bad in [
        "{}",
        "not json",
        r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["x"]}}"#,
    ] {
        assert!(
            matches!(commit(bad.as_bytes()), Err(StoreError::BadConfig { .. })),
            "{bad}"
        );
    }
    assert!(bed.store.images().unwrap().is_empty());
    // No layer at all is fine: FROM scratch and nothing else.
    let empty = commit(&config(&[], "")).unwrap();
    assert!(empty.chain.is_none() && empty.size > 0);
    assert!(bed.store.prepare("c", empty.chain.as_ref(), &lease).is_ok());
}

#[test]
fn root_usage_of_the_filesystem_counts_layers_and_blobs() {
    if !is_root("usage_of_the_filesystem") {
        return;
    }
    let bed = Bed::new();
    let before = bed.store.fs_info().unwrap();
    assert_eq!((before.used_bytes, before.used_inodes), (0, 0));
    let blob = Blob::gzip(&[("a", &[1; 100_000]), ("b", b"")]);
    let image = pull(&bed.store, std::slice::from_ref(&blob), &["x"], "").unwrap();
    let after = bed.store.fs_info().unwrap();
    let layer = bed.store.layer(&image.chain.unwrap()).unwrap().unwrap();
    assert_eq!(after.used_bytes, layer.usage.bytes + blob.bytes.len() as u64);
    assert_eq!(after.used_inodes, layer.usage.inodes + 1);
    assert!(after.capacity_bytes > after.available_bytes && after.mountpoint == bed.store.root());
    assert!(image.size >= 100_000);
}

#[test]
fn root_what_got_a_name_meanwhile_is_not_removed() {
    if !is_root("what_got_a_name_meanwhile") {
        return;
    }
    let bed = Bed::new();
    let lease = bed.store.lease("builds").unwrap();
    let built = |note: &str, names: &[&str]| {
        bed.store
            .commit_image(NewImage {
                config: &config(&[], note),
                manifest: None,
                names: names.iter().map(|n| name(n)).collect(),
                repo_digests: Vec::new(),
                writer: Writer::Build,
                lease: &lease,
            })
            .unwrap()
    };
    let (bare, named) = (built("bare", &[]), built("named", &["named"]));
    let pinned = built("pinned", &[]);
    bed.store.set_pinned(&pinned.id, true).unwrap();
    assert!(
        bed.store.remove_unnamed_builds().unwrap().is_empty(),
        "the build holds them"
    );
    drop(lease);
    // Somebody lists it as unnamed, and then it gets a name.
    bed.store.tag(&bare.id, &name("late"), Writer::User).unwrap();
    assert!(bed.store.remove_unnamed_builds().unwrap().is_empty());
    bed.store.untag(&name("late")).unwrap();
    assert_eq!(bed.store.remove_unnamed_builds().unwrap(), [bare.id]);
    assert!(bed.store.image(&named.id).unwrap().is_some() && bed.store.image(&pinned.id).unwrap().is_some());

    // Whoever saw one name removes one name.
    bed.store.tag(&named.id, &name("second"), Writer::User).unwrap();
    assert_eq!(bed.store.remove_name(&name("named")).unwrap(), Removal::Untagged);
    assert!(bed.store.resolve("second").unwrap().is_some());
    assert_eq!(bed.store.remove_name(&name("named")).unwrap(), Removal::Absent);
    bed.store.tag(&named.id, &name("third"), Writer::User).unwrap();
    let refused = bed.store.remove_unless_named(&named.id, 1).unwrap();
    assert!(matches!(refused, Removal::Named(names) if names.len() == 2));
    bed.store.untag(&name("third")).unwrap();
    let removed = bed.store.remove_name(&name("second")).unwrap();
    let names = vec!["docker.io/library/second:latest".to_owned()];
    assert_eq!(removed, Removal::Removed { id: named.id, names });
    assert!(bed.store.image(&named.id).unwrap().is_none());
}
