//! Leases and owners: what live ones hold stays, what dead ones held goes.

use crate::store::{OwnerKind, Store};
use crate::testing::{Bed, Blob, Role, is_root, pull};
use crate::{CachePrune, Digest, StoreError};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

const CHILD: &str = "store::tests::owners::root_a_child_that_holds_things";

/// Plays the child in the tests below; alone it does nothing.
#[test]
fn root_a_child_that_holds_things() {
    let Some((role, root)) = Role::mine() else { return };
    let store = Store::open(&root, OwnerKind::Build).unwrap();
    if role == "with-estate" {
        store.set_estate(Some("a shim in /run/x")).unwrap();
    }
    let lease = store.lease("held by a child").unwrap();
    let _active = store.prepare("child", None, &lease).unwrap();
    let mut ingest = store.ingest(&lease).unwrap();
    ingest.write_all(b"half of a blo").unwrap();
    let mut whole = store.ingest(&lease).unwrap();
    whole.write_all(b"whole").unwrap();
    whole.finish(None, None).unwrap();
    Role::ready_and_wait();
}

#[test]
fn root_what_a_live_owner_holds_is_not_touched_and_what_a_dead_one_held_is_undone() {
    if !is_root("what_a_live_owner_holds") {
        return;
    }
    let bed = Bed::new();
    let mut child = Role::start(CHILD, "plain", &bed.root(), None);
    child.wait_ready();
    // Opening, collecting: the child's things stay.
    let other = bed.again(OwnerKind::Cli);
    other.gc().unwrap();
    assert_eq!(other.actives().unwrap().len(), 1);
    assert_eq!(bed.snapshots().len(), 1);
    assert_eq!(bed.list("content/ingest").len(), 1);
    assert_eq!(bed.list("content/sha256").len(), 1);
    let owner = bed
        .list("owners")
        .into_iter()
        .find(|id| id.starts_with("build-"))
        .unwrap();
    assert!(other.owner_alive(&owner).unwrap());
    child.kill();
    assert!(!other.owner_alive(&owner).unwrap());
    // Dead: the next opener undoes it; the blob that nothing holds any more goes with the next collection.
    let next = bed.again(OwnerKind::Cli);
    assert!(next.actives().unwrap().is_empty());
    assert!(bed.snapshots().is_empty());
    assert!(bed.list("content/ingest").is_empty());
    assert!(!bed.list("owners").contains(&owner));
    assert_eq!(next.gc().unwrap().blobs, 1);
    assert!(bed.list("content/sha256").is_empty());
}

#[test]
fn root_a_dead_owners_estate_is_handed_out_once_and_kept_until_it_is_buried() {
    if !is_root("a_dead_owners_estate") {
        return;
    }
    let bed = Bed::new();
    let mut child = Role::start(CHILD, "with-estate", &bed.root(), None);
    child.wait_ready();
    assert!(bed.store.dead_owners().unwrap().is_empty());
    child.kill();
    let other = bed.again(OwnerKind::Build);
    other.gc().unwrap();
    assert_eq!(other.actives().unwrap().len(), 1, "what an estate needs stays");
    let mut dead = other.dead_owners().unwrap();
    assert_eq!(dead.len(), 1);
    assert_eq!(
        (dead[0].estate.as_str(), dead[0].kind),
        ("a shim in /run/x", OwnerKind::Build)
    );
    assert!(bed.store.dead_owners().unwrap().is_empty(), "somebody is at it");
    drop(dead);
    dead = bed.store.dead_owners().unwrap();
    dead.pop().unwrap().bury().unwrap();
    assert!(other.actives().unwrap().is_empty());
    assert!(bed.snapshots().is_empty() && bed.list("content/ingest").is_empty());
    assert!(other.dead_owners().unwrap().is_empty());
}

#[test]
fn leaving_the_store_leaves_nothing_behind() {
    let bed = Bed::new();
    let owner = {
        let other = bed.again(OwnerKind::Cli);
        let lease = other.lease("forgotten").unwrap();
        std::mem::forget(lease);
        other.owner_id().to_owned()
    };
    // The forgotten lease keeps a clone, so it is still there.
    assert!(bed.list("owners").contains(&owner));
    let owner = bed.again(OwnerKind::Cli).owner_id().to_owned();
    assert!(!bed.list("owners").contains(&owner));
    let mode = std::fs::metadata(bed.root()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_lease_protects_until_it_is_dropped_and_a_persistent_one_until_it_is_released() {
    let bed = Bed::new();
    let put = |lease| {
        let mut ingest = bed.store.ingest(lease).unwrap();
        ingest.write_all(b"data").unwrap();
        ingest.finish(None, None).unwrap()
    };
    let lease = bed.store.lease("short").unwrap();
    let blob = put(&lease);
    bed.store.gc().unwrap();
    assert_eq!(bed.store.blob(&blob.digest).unwrap(), Some(blob.clone()));
    let kept = bed.again(OwnerKind::Cli).persistent_lease("container").unwrap();
    assert_eq!(kept.blob(&blob.digest).unwrap(), Some(blob.clone()));
    drop(lease);
    drop(kept);
    bed.again(OwnerKind::Cli).gc().unwrap();
    assert!(bed.store.blob(&blob.digest).unwrap().is_some());
    bed.store.release_lease("container").unwrap();
    bed.store.release_lease("container").unwrap();
    assert_eq!(bed.store.gc().unwrap().blobs, 1);
    assert_eq!(bed.store.blob(&blob.digest).unwrap(), None);
}

#[test]
fn a_lease_that_is_gone_can_hold_nothing() {
    let bed = Bed::new();
    let lease = bed.store.lease("x").unwrap();
    bed.store.release_lease(lease.name()).unwrap();
    let error = bed.store.prepare("key", None, &lease).unwrap_err();
    assert!(matches!(error, StoreError::LeaseGone { .. }), "{error}");
    assert!(bed.snapshots().is_empty());
    let mut ingest = bed.store.ingest(&lease).unwrap();
    ingest.write_all(b"x").unwrap();
    assert!(matches!(
        ingest.finish(None, None),
        Err(StoreError::LeaseGone { .. })
    ));
    assert!(bed.list("content/ingest").is_empty() && bed.list("content/sha256").is_empty());
}

#[test]
fn a_blob_is_checked_followed_and_stored_once() {
    let bed = Bed::new();
    let lease = bed.store.lease("x").unwrap();
    let mut ingest = bed.store.ingest(&lease).unwrap();
    let mut follower = ingest.follow().unwrap();
    let reader = std::thread::spawn(move || {
        assert_eq!(follower.digest(), None, "not before it is complete");
        let mut text = String::new();
        let read = follower.read_to_string(&mut text);
        read.map(|_| (text, follower.digest()))
    });
    for part in ["one ", "two ", "three"] {
        ingest.write_all(part.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(ingest.written(), 13);
    ingest
        .finish(Some(&Digest::of(b"one two three")), Some(13))
        .unwrap();
    let (text, digest) = reader.join().unwrap().unwrap();
    assert_eq!(text, "one two three");
    assert_eq!(digest, Some(Digest::of(b"one two three")));
    // Wrong contents: an error, a failed follower, and nothing left.
    let mut ingest = bed.store.ingest(&lease).unwrap();
    ingest.write_all(b"evil").unwrap();
    let mut follower = ingest.follow().unwrap();
    let error = ingest.finish(Some(&Digest::of(b"good")), Some(4)).unwrap_err();
    assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error}");
    assert!(
        follower.read_to_end(&mut Vec::new()).is_err(),
        "no end without checked contents"
    );
    let mut ingest = bed.store.ingest(&lease).unwrap();
    ingest.write_all(b"short").unwrap();
    assert!(matches!(
        ingest.finish(None, Some(6)),
        Err(StoreError::SizeMismatch { .. })
    ));
    // The same again, from another opening.
    let other = bed.again(OwnerKind::Cli);
    let lease2 = other.lease("y").unwrap();
    let mut ingest = other.ingest(&lease2).unwrap();
    ingest.write_all(b"one two three").unwrap();
    ingest.finish(None, None).unwrap();
    assert_eq!(bed.list("content/sha256").len(), 1);
    assert!(bed.list("content/ingest").is_empty());
}

#[test]
fn a_blob_in_no_hurry_is_followed_to_its_end_before_it_is_durable() {
    let bed = Bed::new();
    let lease = bed.store.lease("x").unwrap();
    let unpacking = bed.store.inner.syncer.unpacking();
    let mut ingest = bed.store.ingest(&lease).unwrap();
    ingest.write_all(b"data").unwrap();
    let mut follower = ingest.follow().unwrap();
    let finish = std::thread::spawn(move || ingest.finish_behind(Some(&Digest::of(b"data")), Some(4)));
    let mut text = String::new();
    follower.read_to_string(&mut text).unwrap();
    assert_eq!(text, "data");
    assert!(bed.store.blob(&Digest::of(b"data")).unwrap().is_none() && !finish.is_finished());
    drop(unpacking);
    let blob = finish.join().unwrap().unwrap();
    assert_eq!(bed.store.blob(&blob.digest).unwrap(), Some(blob));
    let mut ingest = bed.store.ingest(&lease).unwrap();
    ingest.write_all(b"evil").unwrap();
    let mut follower = ingest.follow().unwrap();
    assert!(matches!(
        ingest.finish_behind(Some(&Digest::of(b"good")), None),
        Err(StoreError::DigestMismatch { .. })
    ));
    assert!(follower.read_to_end(&mut Vec::new()).is_err());
    assert!(bed.list("content/ingest").is_empty());
}

#[test]
fn a_waiting_follower_gives_up_when_it_is_told_to() {
    let bed = Bed::new();
    let lease = bed.store.lease("x").unwrap();
    let ingest = bed.store.ingest(&lease).unwrap();
    let flag = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut follower = ingest.follow().unwrap().cancel_when(std::sync::Arc::clone(&flag));
    let reader = std::thread::spawn(move || follower.read(&mut [0; 8]));
    flag.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(reader.join().unwrap().is_err());
}

#[test]
fn a_blob_whose_file_is_damaged_counts_as_absent_and_can_come_again() {
    let bed = Bed::new();
    let lease = bed.store.lease("x").unwrap();
    let put = || {
        let mut ingest = bed.store.ingest(&lease).unwrap();
        ingest.write_all(b"data").unwrap();
        ingest.finish(None, None).unwrap()
    };
    let blob = put();
    for damage in [&b"da"[..], b""] {
        std::fs::write(&blob.path, damage).unwrap();
        assert_eq!(bed.store.blob(&blob.digest).unwrap(), None);
        put();
        assert_eq!(std::fs::read(&blob.path).unwrap(), b"data");
    }
}

#[test]
fn records_have_unique_names_within_their_kind() {
    let bed = Bed::new();
    let records = bed.store.records();
    records.put("pod", "1", Some("web"), "{}").unwrap();
    records.put("container", "1", Some("web"), "{}").unwrap();
    records.put("pod", "1", Some("web"), r#"{"a":1}"#).unwrap();
    let error = records.put("pod", "2", Some("web"), "{}").unwrap_err();
    assert!(
        matches!(&error, StoreError::NameTaken { by, .. } if by == "1"),
        "{error}"
    );
    records.put("pod", "2", None, "{}").unwrap();
    records.put("pod", "3", None, "{}").unwrap();
    let ids: Vec<String> = records.list("pod").unwrap().into_iter().map(|r| r.id).collect();
    assert_eq!(ids, ["1", "2", "3"]);
    assert_eq!(records.by_name("pod", "web").unwrap().unwrap().json, r#"{"a":1}"#);
    let other = bed.again(OwnerKind::Cli);
    other.records().delete("pod", "1").unwrap();
    other.records().delete("pod", "1").unwrap();
    assert_eq!(records.get("pod", "1").unwrap(), None);
    records.put("pod", "2", Some("web"), "{}").unwrap();
}

#[test]
fn a_catalog_of_a_newer_program_or_of_something_else_is_refused_clearly() {
    let bed = Bed::new();
    let root = bed.root();
    drop(bed.store);
    let db = rusqlite::Connection::open(root.join("catalog.db")).unwrap();
    db.execute("UPDATE meta SET value = 7 WHERE key = 'schema'", [])
        .unwrap();
    drop(Store::open(&root, OwnerKind::Cli).expect("a newer schema that admits us is fine"));
    db.execute("UPDATE meta SET value = 5 WHERE key = 'writers_from'", [])
        .unwrap();
    let error = Store::open(&root, OwnerKind::Cli).unwrap_err();
    assert!(
        matches!(
            &error,
            StoreError::SchemaTooNew {
                found: 7,
                needs: 5,
                ..
            }
        ),
        "{error}"
    );
    drop(db);
    let other = tempfile::tempdir().unwrap();
    let db = rusqlite::Connection::open(other.path().join("catalog.db")).unwrap();
    db.execute("CREATE TABLE x (y)", []).unwrap();
    drop(db);
    let error = Store::open(other.path(), OwnerKind::Cli).unwrap_err();
    assert!(matches!(error, StoreError::NotACatalog { .. }), "{error}");
}

#[test]
fn the_build_cache_is_found_pruned_and_locked_across_openings() {
    let bed = Bed::new();
    let other = bed.again(OwnerKind::Build);
    let lease = bed.store.lease("x").unwrap();
    let key = |n: u8| Digest::of(&[n]);
    assert_eq!(bed.store.cache_get(&key(1), &lease).unwrap(), None);
    other.cache_put(&key(1), None, "env").unwrap();
    let entry = bed.store.cache_get(&key(1), &lease).unwrap().unwrap();
    assert_eq!((entry.value.as_str(), entry.chain), ("env", None));
    let lock = bed.store.cache_lock(&key(1), Duration::ZERO).unwrap();
    let error = other.cache_lock(&key(1), Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, StoreError::Timeout { .. }), "{error}");
    let waiting = std::thread::spawn(move || other.cache_lock(&key(1), Duration::from_secs(10)).map(|_| ()));
    std::thread::sleep(Duration::from_millis(30));
    drop(lock);
    waiting.join().unwrap().unwrap();
    assert!(bed.list("locks").is_empty());
    assert_eq!(
        bed.store
            .cache_prune(CachePrune {
                all: true,
                ..CachePrune::default()
            })
            .unwrap(),
        1
    );
    assert_eq!(bed.store.cache_get(&key(1), &lease).unwrap(), None);
}

#[test]
fn root_a_cached_layer_stays_until_its_entry_goes_and_the_oldest_goes_first() {
    if !is_root("a_cached_layer_stays") {
        return;
    }
    let bed = Bed::new();
    let image = pull(&bed.store, &[Blob::gzip(&[("a", &[1; 50_000])])], &["x"], "").unwrap();
    let chain = image.chain.unwrap();
    let key = Digest::of(b"k");
    bed.store.cache_put(&key, Some(&chain), "").unwrap();
    bed.store.remove_image(&image.id).unwrap();
    assert!(bed.store.layer(&chain).unwrap().is_some(), "the cache holds it");
    let lease = bed.store.lease("x").unwrap();
    assert!(bed.store.cache_get(&key, &lease).unwrap().is_some());
    drop(lease);
    let keep = |bytes| CachePrune {
        keep_bytes: Some(bytes),
        ..CachePrune::default()
    };
    assert_eq!(bed.store.cache_prune(keep(1 << 30)).unwrap(), 0);
    assert_eq!(bed.store.cache_prune(keep(1000)).unwrap(), 1);
    let report = bed.store.gc().unwrap();
    assert_eq!(report.snapshots, 1);
    assert!(report.bytes > 50_000 && bed.snapshots().is_empty());
}

#[test]
fn root_the_cache_shrinks_by_its_oldest_entries_and_keeps_those_that_would_give_nothing_back() {
    if !is_root("the_cache_shrinks") {
        return;
    }
    let bed = Bed::new();
    let layers: Vec<Blob> = (0..4u8)
        .map(|n| Blob::gzip(&[(&format!("f{n}"), &[n; 50_000])]))
        .collect();
    let all = pull(&bed.store, &layers, &["all"], "").unwrap();
    let chains = crate::ChainId::all(&all.layers);
    // The lowest two are an image's; of the others only the cache knows.
    let image = pull(&bed.store, &layers[..2], &["base"], "base").unwrap();
    let put = |n: u8, chain: usize| {
        let key = Digest::of(&[n]);
        bed.store.cache_put(&key, Some(&chains[chain]), "").unwrap();
        // The times of use are told apart.
        std::thread::sleep(Duration::from_millis(3));
        key
    };
    let keys = [put(0, 1), put(1, 2), put(2, 3), put(3, 2), put(4, 3)];
    bed.store.remove_image(&all.id).unwrap();
    let there = || -> Vec<usize> {
        let lease = bed.store.lease("look").unwrap();
        let found = |key| bed.store.cache_get(key, &lease).unwrap().is_some();
        (0..5).filter(|n| found(&keys[*n])).collect()
    };
    let prune = |bytes| {
        bed.store
            .cache_prune(CachePrune {
                keep_bytes: Some(bytes),
                ..CachePrune::default()
            })
            .unwrap()
    };
    assert_eq!(prune(1 << 20), 0);
    // Each layer has several entries: it goes with the last of them, and the one below it with those on it.
    assert_eq!(prune(80_000), 4);
    assert_eq!(there(), [0]);
    bed.store.gc().unwrap();
    assert_eq!(bed.snapshots().len(), 2);
    assert_eq!(prune(0), 0, "what is an image's takes nothing");
    bed.store.remove_image(&image.id).unwrap();
    assert_eq!(prune(0), 1);
}

#[test]
fn root_a_snapshot_that_cannot_be_removed_keeps_nothing_else() {
    if !is_root("a_snapshot_that_cannot_be_removed") {
        return;
    }
    let bed = Bed::new();
    let lease = bed.store.lease("two snapshots").unwrap();
    let stuck = bed.store.prepare("stuck", None, &lease).unwrap();
    let other = bed.store.prepare("other", None, &lease).unwrap();
    // The kernel refuses to remove what something is mounted on, as it does in a damaged directory.
    let below = stuck.upper.join("below");
    std::fs::create_dir(&below).unwrap();
    let run = |program: &str, args: &[&str], path: &Path| {
        let status = std::process::Command::new(program).args(args).arg(path).status();
        assert!(status.unwrap().success(), "{program}");
    };
    run("mount", &["-t", "tmpfs", "tmpfs"], &below);
    bed.store.release_lease(lease.name()).unwrap();
    assert!(!other.upper.exists(), "the other one went");
    let again = bed.again(OwnerKind::Cli);
    again.gc().unwrap_err();
    let new = again.lease("new").unwrap();
    again.prepare("new", None, &new).unwrap();
    // It has been put aside, and what is mounted with it.
    let aside = bed.root().join(format!("snapshots/.gone-{}", stuck.snapshot));
    run("umount", &[], &aside.join("fs/below"));
    again.gc().unwrap();
    assert!(!aside.exists());
    assert!(again.actives().unwrap().iter().all(|active| active.key == "new"));
}
