//! A full disk: clear errors, space given back, deletion that still commits. On a small tmpfs; these need root.

use crate::store::{OwnerKind, Store};
use crate::testing::{Blob, is_root, list, pull};
use std::path::{Path, PathBuf};

/// A tmpfs of a few megabytes with a store on it.
pub(in crate::store) struct Small {
    dir: tempfile::TempDir,
}

impl Small {
    pub(in crate::store) fn new(megabytes: u64) -> Small {
        let dir = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={megabytes}m")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, Some(options.as_c_str())).unwrap();
        Small { dir }
    }

    pub(in crate::store) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub(in crate::store) fn free(&self) -> u64 {
        let fs = rustix::fs::statvfs(self.dir.path()).unwrap();
        fs.f_bavail * fs.f_frsize
    }

    /// Fills the disk so that the catalog's log cannot grow by a page.
    pub(in crate::store) fn fill_with_an_empty_log(&self) {
        let catalog = rusqlite::Connection::open(self.root().join("catalog.db")).unwrap();
        catalog
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .unwrap();
        self.fill();
        assert_eq!(self.free(), 0);
    }

    /// Fills the disk to the last block.
    fn fill(&self) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.dir.path().join("filler")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.dir.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

fn noise(megabytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    (0..megabytes << 17)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

fn snapshots(root: &Path) -> Vec<String> {
    list(&root.join("snapshots"))
        .into_iter()
        .filter(|name| name != ".empty")
        .collect()
}

#[test]
fn root_a_pull_that_does_not_fit_says_so_and_gives_the_space_back() {
    if !is_root("a_pull_that_does_not_fit") {
        return;
    }
    let small = Small::new(40);
    let store = Store::open(&small.root(), OwnerKind::Daemon).unwrap();
    let little = pull(&store, &[Blob::gzip(&[("a", b"1")])], &["little"], "").unwrap();
    let before = small.free();
    // The blob fits, the layer does not; then neither does.
    for megabytes in [20, 45] {
        let big = Blob::gzip(&[("big", &noise(megabytes, 1))]);
        let error = pull(&store, &[big], &["big"], "").unwrap_err();
        assert!(error.is_disk_full(), "{error}");
        assert_eq!(snapshots(&small.root()).len(), 1);
        let lost = before.saturating_sub(small.free());
        assert!(lost < 2 << 20, "{lost} bytes are missing");
    }
    assert_eq!(store.resolve("little").unwrap().unwrap().id, little.id);
    pull(&store, &[Blob::gzip(&[("b", &noise(5, 2))])], &["fits"], "").unwrap();
}

#[test]
fn root_images_can_be_removed_on_a_full_disk_by_a_process_that_opens_it_then() {
    if !is_root("images_can_be_removed_on_a_full_disk") {
        return;
    }
    let small = Small::new(40);
    {
        let store = Store::open(&small.root(), OwnerKind::Daemon).unwrap();
        pull(
            &store,
            &[Blob::gzip(&[("a", &noise(5, 1))]), Blob::gzip(&[("b", b"2")])],
            &["x"],
            "",
        )
        .unwrap();
        let lease = store.persistent_lease("c").unwrap();
        store.prepare("c", None, &lease).unwrap();
        store
            .records()
            .put("pod", "1", Some("web"), &"x".repeat(10_000))
            .unwrap();
    }
    small.fill();
    assert_eq!(small.free(), 0);
    let store = Store::open(&small.root(), OwnerKind::Cli).unwrap();
    store.records().delete("pod", "1").unwrap();
    store.remove_active("c").unwrap();
    store.release_lease("c").unwrap();
    let image = store.resolve("x").unwrap().unwrap();
    let removed = store.remove_image(&image.id).unwrap();
    assert!(removed.freed > 9 << 20, "{removed:?}");
    assert!(snapshots(&small.root()).is_empty());
    assert!(small.free() > 4 << 20);
    // The reserve is filled up again when there is room.
    std::fs::remove_file(small.dir.path().join("filler")).unwrap();
    store.gc().unwrap();
    assert_eq!(
        std::fs::metadata(small.root().join("reserve")).unwrap().len(),
        4 << 20
    );
}

#[test]
fn root_a_removed_build_gives_its_space_back_though_the_cache_has_its_layers() {
    if !is_root("a_removed_build_gives_its_space_back") {
        return;
    }
    let small = Small::new(64);
    let store = Store::open(&small.root(), OwnerKind::Daemon).unwrap();
    let contents: Vec<u8> = noise(12, 7);
    let image = crate::testing::build(&store, None, "big", &contents, "built").unwrap();
    let key = crate::Digest::of(b"the step");
    store.cache_put(&key, image.chain.as_ref(), "{}").unwrap();
    let removed = store.remove_image(&image.id).unwrap();
    assert_eq!(
        snapshots(&small.root()).len(),
        1,
        "the cache holds it: {removed:?}"
    );
    let limits = crate::Upkeep {
        cache_percent: 50,
        ..crate::Upkeep::default()
    };
    assert_eq!(store.tidy_cache(&limits).unwrap(), 0, "there is room");
    // The disk fills up: the kubelet removes images to get space.
    let filler = small.dir.path().join("filler");
    let fill = small.free() - (8 << 20);
    std::fs::write(&filler, vec![1u8; usize::try_from(fill).unwrap()]).unwrap();
    assert!(store.tidy_cache(&limits).unwrap() >= 12 << 20);
    assert!(snapshots(&small.root()).is_empty());
    assert!(small.free() >= 18 << 20);
}

#[test]
fn root_a_blob_that_cannot_be_recorded_goes_and_takes_what_the_work_had_made_along() {
    use std::io::Write;
    if !is_root("a_blob_that_cannot_be_recorded_goes") {
        return;
    }
    let small = Small::new(40);
    let store = Store::open(&small.root(), OwnerKind::Daemon).unwrap();
    for behind in [false, true] {
        let lease = store.lease("a pull").unwrap();
        let mut first = store.ingest(&lease).unwrap();
        first.write_all(&noise(1, 1)).unwrap();
        first.finish(None, None).unwrap();
        let mut ingest = store.ingest(&lease).unwrap();
        ingest.write_all(&noise(1, 2)).unwrap();
        small.fill_with_an_empty_log();
        let finished = match behind {
            true => ingest.finish_behind(None, None),
            false => ingest.finish(None, None),
        };
        assert!(finished.unwrap_err().is_disk_full());
        assert_eq!(list(&small.root().join("content/ingest")), [""; 0]);
        assert_eq!(list(&small.root().join("content/sha256")).len(), 1, "the first");
        drop(lease);
        assert_eq!(list(&small.root().join("content/sha256")), [""; 0]);
        std::fs::remove_file(small.dir.path().join("filler")).unwrap();
        store.gc().unwrap();
    }
}
