//! Layers from blobs: checks, formats, hostile ones; nothing half-visible. These need root.

use crate::store::UnpackOptions;
use crate::testing::{Bed, Blob, is_root, pull, tar};
use crate::{Digest, StoreError};
use oci_spec::image::MediaType;
use slipway_snapshot::unmount;
use slipway_snapshot::unpack::{Limits, UnpackError};
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn unpack(bed: &Bed, sources: Vec<crate::LayerSource>, options: &UnpackOptions) -> crate::Result<usize> {
    let lease = bed.store.lease("test").unwrap();
    bed.store
        .unpack_layers(sources, options, &lease)
        .map(|layers| layers.len())
}

/// Whatever went wrong: nothing of it is to be seen.
fn nothing_left(bed: &Bed) {
    assert_eq!(bed.snapshots(), Vec::<String>::new());
    let report = bed.store.gc().unwrap();
    assert_eq!(report.snapshots, 0);
}

#[test]
fn root_every_compression_unpacks_and_progress_is_told() {
    if !is_root("every_compression_unpacks") {
        return;
    }
    let bed = Bed::new();
    let blobs: Vec<Blob> = [
        MediaType::ImageLayerGzip,
        MediaType::ImageLayerZstd,
        MediaType::ImageLayer,
    ]
    .into_iter()
    .enumerate()
    .map(|(n, media_type)| Blob::new(&tar(&[(&format!("f{n}"), &[7; 300_000])]), media_type))
    .collect();
    let told = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&told);
    let progress = move |_, bytes| {
        count.fetch_add(bytes, Ordering::Relaxed);
    };
    let options = UnpackOptions {
        progress: Some(Arc::new(progress)),
        ..UnpackOptions::default()
    };
    let made = unpack(&bed, blobs.iter().map(Blob::source).collect(), &options).unwrap();
    assert_eq!((made, told.load(Ordering::Relaxed)), (3, 900_000));
}

#[test]
fn root_a_layer_that_is_here_is_not_read_again() {
    if !is_root("a_layer_that_is_here") {
        return;
    }
    struct Never;
    impl Read for Never {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("a layer that is here was read");
        }
    }
    impl Seek for Never {
        fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
            panic!("a layer that is here was read");
        }
    }
    let bed = Bed::new();
    let (a, b) = (Blob::gzip(&[("a", b"1")]), Blob::gzip(&[("b", b"2")]));
    pull(&bed.store, std::slice::from_ref(&a), &["x"], "").unwrap();
    let made = unpack(
        &bed,
        vec![a.source_of(Never), b.source()],
        &UnpackOptions::default(),
    )
    .unwrap();
    assert_eq!(made, 2);
}

#[test]
fn root_a_wrong_cut_or_longer_blob_is_an_error_that_says_so() {
    if !is_root("a_wrong_cut_or_longer_blob") {
        return;
    }
    let good = Blob::gzip(&[("a", &[1; 200_000]), ("b", b"x")]);
    let other = Blob::gzip(&[("a", b"evil")]);
    let bed = Bed::new();
    let try_with = |bytes: Vec<u8>| {
        let sources = vec![
            Blob::gzip(&[("first", b"1")]).source(),
            good.source_of(Cursor::new(bytes)),
        ];
        let error = unpack(&bed, sources, &UnpackOptions::default()).unwrap_err();
        nothing_left(&bed);
        error
    };
    let mut flipped = good.bytes.clone();
    let at = flipped.len() / 2;
    flipped[at] ^= 4;
    assert!(matches!(try_with(flipped), StoreError::DigestMismatch { .. }));
    let mut padded = other.bytes.clone();
    padded.resize(good.bytes.len(), 0);
    assert!(matches!(try_with(padded), StoreError::DigestMismatch { .. }));
    for cut in [0, 1, good.bytes.len() - 1] {
        let error = try_with(good.bytes[..cut].to_vec());
        assert!(matches!(error, StoreError::SizeMismatch { .. }), "{cut}: {error}");
    }
    let longer = [good.bytes.clone(), vec![0; 10]].concat();
    assert!(matches!(try_with(longer), StoreError::SizeMismatch { .. }));
}

#[test]
fn root_a_tar_that_is_not_the_one_of_the_configuration_is_refused() {
    if !is_root("a_tar_that_is_not") {
        return;
    }
    let bed = Bed::new();
    let mut blob = Blob::gzip(&[("a", b"1")]);
    blob.diff_id = Digest::of(b"another").into();
    let error = unpack(&bed, vec![blob.source()], &UnpackOptions::default()).unwrap_err();
    assert!(
        matches!(&error, StoreError::DigestMismatch { what, .. } if what.contains("tar")),
        "{error}"
    );
    nothing_left(&bed);
}

#[test]
fn root_hostile_and_unknown_layers_are_refused_and_leave_nothing() {
    if !is_root("hostile_and_unknown_layers") {
        return;
    }
    let bed = Bed::new();
    let outside = bed.dir.path().join("outside");
    let evil = Blob::gzip(&[("ok", b"1"), ("../../../../outside", b"evil")]);
    let error = unpack(
        &bed,
        vec![Blob::gzip(&[("a", b"")]).source(), evil.source()],
        &UnpackOptions::default(),
    );
    let error = error.unwrap_err();
    assert!(
        matches!(
            &error,
            StoreError::Unpack {
                source: UnpackError::Escape { .. },
                ..
            }
        ),
        "{error}"
    );
    assert!(!outside.exists());
    nothing_left(&bed);
    // A bomb: a few kilobytes that unpack to 100 MB.
    let bomb = Blob::gzip(&[("zeros", &vec![0; 100 << 20])]);
    assert!(bomb.bytes.len() < 1 << 20);
    let limits = Limits {
        bytes: Some(50 << 20),
        ..Limits::default()
    };
    let options = UnpackOptions {
        limits,
        ..UnpackOptions::default()
    };
    let error = unpack(&bed, vec![bomb.source()], &options).unwrap_err();
    assert!(
        matches!(
            &error,
            StoreError::Unpack {
                source: UnpackError::TooLarge { .. },
                ..
            }
        ),
        "{error}"
    );
    nothing_left(&bed);
    // Names that have to be kept in memory: few in each layer, many in all of them.
    let limits = Limits {
        names: 100_000,
        ..Limits::default()
    };
    let options = UnpackOptions {
        limits,
        ..UnpackOptions::default()
    };
    let layers: Vec<Blob> = (0..10)
        .map(|layer| {
            let names: Vec<String> = (0..50).map(|i| format!("{layer}{i:0>150}/x")).collect();
            Blob::gzip(&names.iter().map(|n| (n.as_str(), &b""[..])).collect::<Vec<_>>())
        })
        .collect();
    let sources = layers.iter().map(Blob::source).collect();
    let error = unpack(&bed, sources, &options).unwrap_err();
    assert!(
        matches!(
            &error,
            StoreError::Unpack {
                source: UnpackError::TooLarge { limit: 100_000, .. },
                ..
            }
        ),
        "{error}"
    );
    nothing_left(&bed);
    unpack(&Bed::new(), vec![layers[0].source()], &options).unwrap();
    let mut encrypted = Blob::gzip(&[("a", b"")]);
    encrypted.descriptor = oci_spec::image::Descriptor::new(
        MediaType::Other("application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into()),
        encrypted.bytes.len() as u64,
        encrypted.digest(),
    );
    let error = unpack(&bed, vec![encrypted.source()], &UnpackOptions::default()).unwrap_err();
    assert!(matches!(error, StoreError::MediaType { .. }), "{error}");
    nothing_left(&bed);
    let garbage = Blob::new(b"this is no tar, and never was one", MediaType::ImageLayer);
    let error = unpack(&bed, vec![garbage.source()], &UnpackOptions::default()).unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::Unpack {
                source: UnpackError::Tar(_),
                ..
            }
        ),
        "{error}"
    );
    nothing_left(&bed);
}

#[test]
fn root_the_first_failure_stops_layers_that_still_wait_for_their_download() {
    if !is_root("the_first_failure_stops") {
        return;
    }
    let bed = Bed::new();
    let lease = bed.store.lease("pull").unwrap();
    let slow = Blob::gzip(&[("slow", &[3; 100_000])]);
    let mut ingest = bed.store.ingest(&lease).unwrap();
    ingest.write_all(&slow.bytes[..50]).unwrap();
    let flag = Arc::new(AtomicBool::new(false));
    let mut waiting = slow.source_of(ingest.follow().unwrap().cancel_when(Arc::clone(&flag)));
    waiting.verified = true;
    let evil = Blob::gzip(&[("..", b"")]);
    let options = UnpackOptions {
        cancelled: Some(flag),
        workers: 2,
        ..UnpackOptions::default()
    };
    let error = bed
        .store
        .unpack_layers(vec![waiting, evil.source()], &options, &lease)
        .unwrap_err();
    assert!(
        matches!(
            &error,
            StoreError::Unpack {
                source: UnpackError::Escape { .. },
                ..
            }
        ),
        "{error}"
    );
    drop(ingest);
    nothing_left(&bed);
}

#[test]
fn root_layers_arrive_while_they_are_downloaded() {
    if !is_root("layers_arrive_while") {
        return;
    }
    let bed = Bed::new();
    let lease = bed.store.lease("pull").unwrap();
    let noise: Vec<u8> = (0..400_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let blobs = [
        Blob::gzip(&[("a", &noise)]),
        Blob::gzip(&[("b", &noise)]),
        Blob::gzip(&[("c", b"small")]),
    ];
    let mut sources = Vec::new();
    let mut downloads = Vec::new();
    for blob in &blobs {
        let ingest = bed.store.ingest(&lease).unwrap();
        let mut source = blob.source_of(ingest.follow().unwrap());
        source.verified = true;
        sources.push(source);
        downloads.push((ingest, blob.clone()));
    }
    let download = std::thread::spawn(move || {
        // The last one first: none may wait for another.
        for (mut ingest, blob) in downloads.into_iter().rev() {
            blob.bytes
                .chunks(10_000)
                .for_each(|part| ingest.write_all(part).unwrap());
            ingest.finish(Some(&blob.digest()), None).unwrap();
        }
    });
    let options = UnpackOptions {
        workers: 1,
        ..UnpackOptions::default()
    };
    assert_eq!(
        bed.store.unpack_layers(sources, &options, &lease).unwrap().len(),
        3
    );
    download.join().unwrap();
}

#[test]
fn root_one_worker_and_four_make_the_same_trees() {
    if !is_root("one_worker_and_four") {
        return;
    }
    // Implied directories and marks across layers; what they become is compared entry by entry in slipway-snapshot.
    let blobs = [
        Blob::gzip(&[
            ("a/", b""),
            ("a/x", b"1"),
            ("b/", b""),
            ("b/y", b"2"),
            ("gone", b""),
        ]),
        Blob::gzip(&[("a/z", b"3"), (".wh.gone", b"")]),
        Blob::gzip(&[("b/.wh..wh..opq", b""), ("b/new", b"4")]),
        Blob::gzip(&[("a/.wh.x", b""), ("gone", b"back")]),
    ];
    let tree = |workers| {
        let bed = Bed::new();
        let lease = bed.store.lease("x").unwrap();
        let options = UnpackOptions {
            workers,
            ..UnpackOptions::default()
        };
        let layers = bed
            .store
            .unpack_layers(blobs.iter().map(Blob::source).collect(), &options, &lease)
            .unwrap();
        let view = bed.store.view("v", Some(&layers[3].chain), &lease).unwrap();
        let target = bed.target();
        view.mount.mount(&target).unwrap();
        let mut files = Vec::new();
        let mut dirs = vec![target.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let contents = std::fs::read_to_string(&path).unwrap_or_default();
                files.push((path.strip_prefix(&target).unwrap().to_path_buf(), contents));
                if path.is_dir() {
                    dirs.push(path);
                }
            }
        }
        unmount(&target).unwrap();
        files.sort();
        files
    };
    let one = tree(1);
    assert_eq!(one, tree(4));
    let names: Vec<String> = one
        .iter()
        .map(|(path, _)| path.to_string_lossy().into_owned())
        .collect();
    assert_eq!(names, ["a", "a/z", "b", "b/new", "gone"]);
}

#[test]
fn root_a_source_that_fails_at_any_byte_fails_the_layer() {
    if !is_root("a_source_that_fails") {
        return;
    }
    /// Breaks after so many bytes, as a connection does.
    struct Breaks(Cursor<Vec<u8>>, usize);
    impl Read for Breaks {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.1 == 0 {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let room = buffer.len().min(self.1);
            let n = self.0.read(&mut buffer[..room])?;
            self.1 -= n;
            Ok(n)
        }
    }
    impl Seek for Breaks {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }
    let bed = Bed::new();
    let blob = Blob::gzip(&[("a", &[1; 5000])]);
    // Also when everything was read but the end.
    for after in [0, 3, 20, blob.bytes.len() - 1, blob.bytes.len()] {
        let source = blob.source_of(Breaks(Cursor::new(blob.bytes.clone()), after));
        let error = unpack(&bed, vec![source], &UnpackOptions::default()).unwrap_err();
        assert!(
            matches!(
                &error,
                StoreError::Read { .. }
                    | StoreError::Unpack {
                        source: UnpackError::Tar(_),
                        ..
                    }
            ),
            "{after}: {error}"
        );
        nothing_left(&bed);
    }
}

/// A layer whose one frame of zstd has a window of 32 MiB.
fn with_large_window(name: &str, contents: &[u8]) -> Blob {
    let plain = Blob::new(&tar(&[(name, contents)]), MediaType::ImageLayer);
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.long_distance_matching(true).unwrap();
    encoder.window_log(25).unwrap();
    encoder.write_all(&plain.bytes).unwrap();
    let bytes = encoder.finish().unwrap();
    let size = bytes.len() as u64;
    Blob {
        descriptor: oci_spec::image::Descriptor::new(MediaType::ImageLayerZstd, size, Digest::of(&bytes)),
        bytes,
        ..plain
    }
}

#[test]
fn root_layers_with_large_windows_are_unpacked_in_turns_and_only_when_they_have_arrived() {
    if !is_root("layers_with_large_windows") {
        return;
    }
    let bed = Bed::new();
    let noise: Vec<u8> = (0..2_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let (slow, quick) = (
        with_large_window("slow", &noise),
        with_large_window("quick", &noise),
    );
    let lease = bed.store.lease("pull").unwrap();
    let mut ingest = bed.store.ingest(&lease).unwrap();
    ingest.write_all(&slow.bytes[..slow.bytes.len() / 2]).unwrap();
    let mut source = slow.source_of(ingest.follow().unwrap());
    source.verified = true;
    let store = bed.store.clone();
    let waiting = std::thread::spawn(move || {
        let lease = store.lease("slow").unwrap();
        store.unpack_layers(vec![source], &UnpackOptions::default(), &lease)
    });
    // Another pull's is not held up by one that does not come.
    assert_eq!(
        unpack(&bed, vec![quick.source()], &UnpackOptions::default()).unwrap(),
        1
    );
    assert!(!waiting.is_finished());
    ingest.write_all(&slow.bytes[slow.bytes.len() / 2..]).unwrap();
    ingest.finish(None, None).unwrap();
    let layers = waiting.join().unwrap().unwrap();
    let file = bed
        .root()
        .join("snapshots")
        .join(layers[0].snapshot.as_str())
        .join("fs/slow");
    assert_eq!(std::fs::read(file).unwrap(), noise);
    // What is wrong is still said to be wrong.
    let mut wrong = with_large_window("wrong", &noise);
    let at = wrong.bytes.len() - 10;
    wrong.bytes[at] ^= 1;
    let error = unpack(&bed, vec![wrong.source()], &UnpackOptions::default()).unwrap_err();
    assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error}");
}
