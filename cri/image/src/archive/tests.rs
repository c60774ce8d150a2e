//! Archives there and back, old ones, and hostile ones. These need root: layers have owners.

use super::*;
use crate::testing::{Bed, Blob, build, config, gzip, is_root, pull, tar};
use crate::{Compression, Digest, StoreError};
use oci_spec::image::MediaType;
use slipway_snapshot::tar::{Header, Kind, Writer as TarWriter};

fn load(bed: &Bed, archive: &[u8]) -> Result<Vec<Image>> {
    bed.store.import(&mut &archive[..], &UnpackOptions::default())
}

fn save(bed: &Bed, names: &[&str], format: ArchiveFormat) -> Vec<u8> {
    let mut out = Vec::new();
    bed.store.export(names, format, &mut out).unwrap();
    out
}

fn names(image: &Image) -> Vec<String> {
    image.names.iter().map(ToString::to_string).collect()
}

/// A store with a pulled image and one built on it.
fn source() -> (Bed, Image, Image) {
    let bed = Bed::new();
    let layers = [
        Blob::gzip(&[("etc/", b""), ("etc/a", &[1; 30_000])]),
        Blob::gzip(&[("etc/.wh.a", b""), ("b", b"2")]),
    ];
    let pulled = pull(&bed.store, &layers, &["base:1", "base:2"], "").unwrap();
    let built = build(&bed.store, Some(&pulled), "data", &[3; 50_000], "app").unwrap();
    (bed, pulled, built)
}

#[test]
fn root_images_travel_in_either_format_and_keep_their_identity() {
    if !is_root("images_travel") {
        return;
    }
    let (bed, pulled, built) = source();
    let lease = bed.store.lease("x").unwrap();
    let pushed = bed
        .store
        .manifest(&built.id, Compression::default(), &lease)
        .unwrap();
    for format in [ArchiveFormat::Oci, ArchiveFormat::Docker] {
        let archive = save(&bed, &["base:1", "base:2", "app"], format);
        assert_eq!(
            archive,
            save(&bed, &["base:1", "base:2", "app"], format),
            "the same bytes each time"
        );
        for bytes in [archive.clone(), gzip(&archive)] {
            let other = Bed::new();
            let mut loaded = load(&other, &bytes).unwrap();
            loaded.sort_by_key(|image| image.layers.len());
            assert_eq!((loaded[0].id, loaded[1].id), (pulled.id, built.id));
            assert_eq!(
                names(&loaded[0]),
                ["docker.io/library/base:1", "docker.io/library/base:2"]
            );
            assert_eq!(names(&loaded[1]), ["docker.io/library/app:latest"]);
            assert!(
                loaded
                    .iter()
                    .all(|image| image.intact && image.repo_digests.is_empty() && !image.pinned)
            );
            // Again: nothing changes.
            assert_eq!(load(&other, &bytes).unwrap().len(), 2);
            assert_eq!(
                (other.snapshots().len(), other.store.images().unwrap().len()),
                (3, 2)
            );
            // What was loaded can be pushed and saved on, also after a collection.
            other.store.gc().unwrap();
            let lease = other.store.lease("push").unwrap();
            let manifest = other
                .store
                .manifest(&built.id, Compression::default(), &lease)
                .unwrap();
            assert_eq!(manifest.layers.len(), 3);
            if format == ArchiveFormat::Oci {
                assert_eq!(
                    manifest.digest, pushed.digest,
                    "as it would have been pushed where it was made"
                );
            }
            for layer in &manifest.layers {
                assert!(
                    lease
                        .blob(&Digest::try_from(layer.digest()).unwrap())
                        .unwrap()
                        .is_some()
                );
            }
            save(&other, &["app"], ArchiveFormat::Oci);
        }
    }
}

#[test]
fn root_saving_a_build_for_docker_leaves_no_copy_of_its_layers() {
    if !is_root("saving_a_build_for_docker") {
        return;
    }
    let bed = Bed::new();
    let built = build(&bed.store, None, "data", &[3; 50_000], "app").unwrap();
    let before = (
        bed.store.fs_info().unwrap().used_bytes,
        bed.list("content/sha256"),
    );
    let archive = save(&bed, &["app"], ArchiveFormat::Docker);
    assert_eq!(
        (
            bed.store.fs_info().unwrap().used_bytes,
            bed.list("content/sha256")
        ),
        before
    );
    let other = Bed::new();
    assert_eq!(load(&other, &archive).unwrap()[0].id, built.id);
    // What is no longer as it was is not passed off as it.
    let chain = built.chain.unwrap();
    let snapshot = bed.store.layer(&chain).unwrap().unwrap().snapshot;
    let file = bed
        .root()
        .join("snapshots")
        .join(snapshot.as_str())
        .join("fs/data");
    for contents in [vec![4; 50_000], vec![3; 49_000], vec![3; 60_000]] {
        std::fs::write(&file, contents).unwrap();
        bed.store
            .export(&["app"], ArchiveFormat::Docker, &mut Vec::new())
            .unwrap_err();
    }
}

#[test]
fn root_an_archive_cannot_put_another_blob_under_a_layer_that_is_here() {
    if !is_root("another_blob_by_archive") {
        return;
    }
    let bed = Bed::new();
    let good = Blob::gzip(&[("a", &[1; 30_000])]);
    let base = pull(&bed.store, std::slice::from_ref(&good), &["base"], "").unwrap();
    let lie = gzip(b"nothing of the kind");
    let docker = json(serde_json::json!([{ "Config": "c.json", "RepoTags": ["liar"], "Layers": ["l"] }]));
    let cfg = config(&[good.diff_id], "liar");
    let archived = archive(&[
        ("manifest.json", docker),
        ("c.json", cfg.clone()),
        ("l", lie.clone()),
    ]);
    let error = load(&bed, &archived).unwrap_err();
    assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error:?}");
    let manifest = json(serde_json::json!({ "schemaVersion": 2,
        "config": { "mediaType": MediaType::ImageConfig, "digest": Digest::of(&cfg).to_string(), "size": cfg.len() },
        "layers": [{ "mediaType": MediaType::ImageLayerGzip, "digest": Digest::of(&lie).to_string(), "size": lie.len() }],
    }));
    let index = json(serde_json::json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": MediaType::ImageManifest, "digest": Digest::of(&manifest).to_string(), "size": manifest.len(),
    }]}));
    let path = |bytes: &[u8]| format!("blobs/sha256/{}", Digest::of(bytes).hex());
    let (c, l, m) = (path(&cfg), path(&lie), path(&manifest));
    let archived = archive(&[
        ("index.json", index),
        (c.as_str(), cfg),
        (l.as_str(), lie),
        (m.as_str(), manifest),
    ]);
    let error = load(&bed, &archived).unwrap_err();
    assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error:?}");
    let built = build(&bed.store, Some(&base), "data", b"3", "app").unwrap();
    let lease = bed.store.lease("push").unwrap();
    let manifest = bed
        .store
        .manifest(&built.id, Compression::default(), &lease)
        .unwrap();
    assert_eq!(manifest.layers[0].digest(), good.descriptor.digest());
}

#[test]
fn root_an_archive_lists_so_many_images_and_each_once() {
    if !is_root("lists_so_many_images") {
        return;
    }
    let bed = Bed::new();
    let layer = tar(&[("a", b"1")]);
    let cfg = config(&[Digest::of(&layer).into()], "");
    let of = |names: &[String]| {
        let entry = |name| serde_json::json!({ "Config": "c.json", "RepoTags": [name], "Layers": ["l"] });
        let list = json(names.iter().map(entry).collect());
        archive(&[
            ("manifest.json", list),
            ("c.json", cfg.clone()),
            ("l", layer.clone()),
        ])
    };
    let numbered = |count: usize| (0..count).map(|n| format!("x:{n}")).collect::<Vec<_>>();
    let loaded = load(&bed, &of(&numbered(100))).unwrap();
    assert_eq!((loaded.len(), loaded[0].names.len()), (1, 100));
    let error = load(&bed, &of(&numbered(1001))).unwrap_err().to_string();
    assert!(error.contains("more than 1000 images"), "{error}");
}

#[test]
fn root_an_archive_of_long_names_is_refused_before_they_fill_the_memory() {
    if !is_root("an_archive_of_long_names") {
        return;
    }
    let long = "x/".repeat(100_000);
    let mut writer = TarWriter::new(Vec::new());
    for n in 0..200 {
        let mut header = Header::new(format!("{n}"), Kind::Symlink);
        header.link = long.clone().into();
        writer.entry(&header).unwrap();
    }
    let archive = writer.finish().unwrap().0;
    let error = load(&Bed::new(), &archive).unwrap_err();
    assert!(error.to_string().contains("32 MiB"), "{error}");
}

#[test]
fn root_an_image_can_be_saved_by_its_id_without_a_name() {
    if !is_root("an_image_can_be_saved_by_its_id") {
        return;
    }
    let (bed, pulled, _) = source();
    let archive = save(&bed, &[&pulled.id.to_string()], ArchiveFormat::Oci);
    let other = Bed::new();
    let loaded = load(&other, &archive).unwrap();
    assert_eq!((loaded[0].id, loaded[0].names.len()), (pulled.id, 0));
    let error = bed
        .store
        .export(&["nobody"], ArchiveFormat::Oci, &mut Vec::new())
        .unwrap_err();
    assert!(matches!(error, StoreError::NoImage { .. }), "{error}");
}

/// An archive of files and links (`path`, contents or `->target`).
fn archive(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut writer = TarWriter::new(Vec::new());
    for (path, contents) in files {
        match contents.strip_prefix(b"->") {
            Some(target) => {
                writer
                    .entry(&Header {
                        link: target.to_vec(),
                        ..Header::new(*path, Kind::Symlink)
                    })
                    .unwrap();
            }
            None => {
                let header = Header {
                    mode: 0o644,
                    size: contents.len() as u64,
                    ..Header::new(*path, Kind::File)
                };
                writer.file(&header, &mut &contents[..]).unwrap();
            }
        }
    }
    writer.finish().unwrap().0
}

fn json(value: serde_json::Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

#[test]
fn root_an_old_docker_archive_with_linked_layers_loads() {
    if !is_root("an_old_docker_archive") {
        return;
    }
    let bed = Bed::new();
    let layer = tar(&[("a", b"1")]);
    let diff = crate::DiffId::from(Digest::of(&layer));
    let list = serde_json::json!([{
        "Config": "c.json", "RepoTags": ["old:1"], "Layers": ["one/layer.tar", "./two/layer.tar"],
    }]);
    let bytes = archive(&[
        ("one/layer.tar", layer),
        ("two/layer.tar", b"->../one/layer.tar".to_vec()),
        ("one/VERSION", b"1.0".to_vec()),
        ("c.json", config(&[diff, diff], "")),
        ("manifest.json", json(list)),
        ("repositories", b"{}".to_vec()),
    ]);
    let images = load(&bed, &bytes).unwrap();
    assert_eq!(
        (names(&images[0]), images[0].layers.len()),
        (vec!["docker.io/library/old:1".to_owned()], 2)
    );
    assert_eq!(
        bed.list("content/sha256").len(),
        1,
        "documents and strangers are collected"
    );
    let lease = bed.store.lease("push").unwrap();
    let manifest = bed
        .store
        .manifest(&images[0].id, Compression::default(), &lease)
        .unwrap();
    assert_eq!(manifest.layers[0].media_type(), &MediaType::ImageLayer);
}

#[test]
fn root_hostile_and_broken_archives_are_refused_and_leave_nothing() {
    if !is_root("hostile_and_broken_archives") {
        return;
    }
    let good_layer = tar(&[("a", b"1")]);
    let diff = crate::DiffId::from(Digest::of(&good_layer));
    let evil_layer = tar(&[("../../../../evil", b"x")]);
    let evil_diff = crate::DiffId::from(Digest::of(&evil_layer));
    let blob = |bytes: &[u8]| {
        (
            format!("blobs/sha256/{}", Digest::of(bytes).hex()),
            bytes.to_vec(),
        )
    };
    let index = |manifest: &[u8], media_type: &str| {
        json(serde_json::json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": media_type, "digest": Digest::of(manifest).to_string(), "size": manifest.len(),
        }]}))
    };
    let manifest = |config: &[u8], layer: &[u8]| {
        json(serde_json::json!({ "schemaVersion": 2,
            "config": { "mediaType": MediaType::ImageConfig, "digest": Digest::of(config).to_string(), "size": config.len() },
            "layers": [{ "mediaType": MediaType::ImageLayer, "digest": Digest::of(layer).to_string(), "size": layer.len() }],
        }))
    };
    let docker = |config: &str, layers: &[&str]| {
        json(serde_json::json!([{ "Config": config, "RepoTags": ["x"], "Layers": layers }]))
    };
    let cfg = config(&[diff], "");
    let two = config(&[diff, diff], "");
    let evil_cfg = config(&[evil_diff], "");
    let oci = MediaType::ImageManifest.to_string();
    let owned = |files: Vec<(String, Vec<u8>)>| {
        let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(path, b)| (path.as_str(), b.clone())).collect();
        archive(&files)
    };
    let whole = |cfg: &[u8], layer: &[u8]| {
        let manifest = manifest(cfg, layer);
        vec![
            blob(cfg),
            blob(layer),
            blob(&manifest),
            ("index.json".to_owned(), index(&manifest, &oci)),
        ]
    };
    let swapped = {
        let mut files = whole(&cfg, &good_layer);
        files[1].1 = evil_layer.clone();
        owned(files)
    };
    let without_layer = {
        let mut files = whole(&cfg, &good_layer);
        files.remove(1);
        owned(files)
    };
    let deep = {
        // An index that contains itself cannot be made; one nested ten times can.
        let mut bytes = manifest(&cfg, &good_layer);
        let mut media_type = oci.clone();
        let mut files = vec![blob(&cfg), blob(&good_layer), blob(&bytes)];
        for _ in 0..10 {
            bytes = index(&bytes, &media_type);
            media_type = MediaType::ImageIndex.to_string();
            files.push(blob(&bytes));
        }
        files.push(("index.json".to_owned(), index(&bytes, &media_type)));
        owned(files)
    };
    let mut cut = owned(whole(&cfg, &good_layer));
    cut.truncate(1500);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing at all", Vec::new()),
        ("no archive", b"hello".to_vec()),
        ("no index", archive(&[("x", b"y".to_vec())])),
        ("a blob that is not what its name says", swapped),
        ("a layer that is not there", without_layer),
        ("an index nested too deep", deep),
        ("cut off", cut),
        (
            "a blob with a bad name",
            archive(&[
                ("blobs/sha256/../../x", b"y".to_vec()),
                ("blobs/sha256/zz", b"".to_vec()),
            ]),
        ),
        (
            "a document of 5 MB",
            archive(&[("manifest.json", vec![b' '; 5 << 20])]),
        ),
        ("a hostile layer", owned(whole(&evil_cfg, &evil_layer))),
        (
            "fewer layers than its configuration",
            owned(whole(&two, &good_layer)),
        ),
        (
            "a link to itself",
            archive(&[
                ("l", b"->l".to_vec()),
                ("c.json", cfg.clone()),
                ("manifest.json", docker("c.json", &["l"])),
            ]),
        ),
        (
            "a path out of the archive",
            archive(&[
                ("c.json", cfg.clone()),
                (
                    "manifest.json",
                    docker("../../../etc/hostname", &["../../etc/passwd"]),
                ),
            ]),
        ),
        (
            "a name that is none",
            archive(&[
                ("c.json", config(&[], "")),
                (
                    "manifest.json",
                    json(
                        serde_json::json!([{ "Config": "c.json", "RepoTags": ["UPPER CASE"], "Layers": [] }]),
                    ),
                ),
            ]),
        ),
    ];
    for (what, bytes) in cases {
        let bed = Bed::new();
        assert!(load(&bed, &bytes).is_err(), "{what}");
        assert!(bed.store.images().unwrap().is_empty(), "{what}");
        assert!(bed.snapshots().is_empty(), "{what}");
        assert!(
            bed.list("content/sha256").is_empty() && bed.list("content/ingest").is_empty(),
            "{what}"
        );
        assert!(!bed.dir.path().join("evil").exists());
    }
    // The same parts, put together rightly.
    let bed = Bed::new();
    assert_eq!(load(&bed, &owned(whole(&cfg, &good_layer))).unwrap().len(), 1);
}
