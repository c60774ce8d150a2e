//! Death at every place between two steps: whoever opens the store next finds it whole.

use crate::store::{LayerOptions, OwnerKind, Store};
use crate::testing::{Bed, Blob, Role, build, is_root, pull};
use crate::{Compression, Result};

const CHILD: &str = "store::tests::crash::root_a_child_that_dies";

fn blobs() -> Vec<Blob> {
    vec![
        Blob::gzip(&[("a", &[1; 20_000])]),
        Blob::gzip(&[("d/", b""), ("d/b", b"2")]),
        Blob::gzip(&[("d/c", b"3")]),
    ]
}

/// A bit of everything.
fn life(store: &Store) -> Result<()> {
    let image = pull(store, &blobs(), &["x"], "")?;
    let lease = store.persistent_lease("c1")?;
    store.prepare("c1", image.chain.as_ref(), &lease)?;
    let built = build(store, Some(&image), "new", &[5; 10_000], "built")?;
    let push = store.lease("push")?;
    store.manifest(&built.id, Compression::Gzip(1), &push)?;
    drop(push);
    store.remove_active("c1")?;
    store.release_lease("c1")?;
    store.remove_image(&built.id)?;
    store.remove_image(&image.id)?;
    store.gc()?;
    Ok(())
}

/// Plays the child in the test below; alone it does nothing.
#[test]
fn root_a_child_that_dies() {
    let Some((_, root)) = Role::mine() else { return };
    life(&Store::open(&root, OwnerKind::Cli).unwrap()).unwrap();
}

#[test]
fn root_death_at_any_step_leaves_a_store_that_works_and_nothing_else() {
    if !is_root("death_at_any_step") {
        return;
    }
    // The child below comes along everywhere.
    for point in crate::failpoint::ALL {
        let bed = Bed::new();
        let (_, signal) = Role::start(CHILD, "die", &bed.root(), Some(point)).wait();
        assert_eq!(signal, Some(9), "the child did not come along {point}");
        let store = bed.again(OwnerKind::Cli);
        // What is listed is whole.
        for image in store.images().unwrap() {
            assert!(image.intact, "{point}");
            let lease = store.lease("x").unwrap();
            let active = store.prepare("check", image.chain.as_ref(), &lease).unwrap();
            store.hash_layer(&active, &LayerOptions::default()).unwrap();
            store.remove_active("check").unwrap();
        }
        // A container's snapshot is slipwayd's to undo; everything else has undone itself.
        let held: Vec<String> = store.actives().unwrap().into_iter().map(|a| a.key).collect();
        assert!(held.iter().all(|key| key == "c1"), "{point}: {held:?}");
        store.release_lease("c1").unwrap();
        for image in store.images().unwrap() {
            store.remove_image(&image.id).unwrap();
        }
        store.gc().unwrap();
        assert!(bed.snapshots().is_empty(), "{point}: {:?}", bed.snapshots());
        assert!(bed.list("content/sha256").is_empty(), "{point}");
        assert!(
            bed.list("content/ingest").is_empty(),
            "{point}: {:?}",
            bed.list("content/ingest")
        );
        // And it all works.
        life(&store).unwrap();
        assert!(
            bed.snapshots().is_empty() && bed.list("content/sha256").is_empty(),
            "{point}"
        );
        let others: Vec<String> = bed
            .list("owners")
            .into_iter()
            .filter(|id| !id.starts_with('.') && id != bed.store.owner_id() && id != store.owner_id())
            .collect();
        assert!(others.is_empty(), "{point}: {others:?}");
    }
}

#[test]
fn root_two_processes_pull_build_and_collect_at_once() {
    if !is_root("two_processes") {
        return;
    }
    let bed = Bed::new();
    let child = Role::start(
        "store::tests::crash::root_a_child_that_works",
        "work",
        &bed.root(),
        None,
    );
    for round in 0..6 {
        let image = pull(&bed.store, &blobs(), &["x"], "").unwrap();
        let lease = bed.store.lease("run").unwrap();
        // The other may have removed it; then that is what we are told.
        if bed.store.use_image("x", &lease).unwrap().is_some() {
            let key = format!("here{round}");
            let active = bed.store.prepare(&key, image.chain.as_ref(), &lease).unwrap();
            bed.store.gc().unwrap();
            assert!(active.mount.lower().iter().all(|dir| dir.is_dir()));
            bed.store.remove_active(&key).unwrap();
        }
    }
    let (ended_well, signal) = child.wait();
    assert!(ended_well, "{signal:?}");
    for image in bed.store.images().unwrap() {
        assert!(image.intact);
        bed.store.remove_image(&image.id).unwrap();
    }
    // The other may have removed the last image while our lease held its layers.
    bed.store.gc().unwrap();
    assert!(bed.snapshots().is_empty() && bed.list("content/sha256").is_empty());
}

/// Plays the other process in the test above; alone it does nothing.
#[test]
fn root_a_child_that_works() {
    let Some((_, root)) = Role::mine() else { return };
    let store = Store::open(&root, OwnerKind::Cli).unwrap();
    for _ in 0..6 {
        let image = pull(&store, &blobs(), &["x", "y"], "").unwrap();
        store.gc().unwrap();
        store.remove_image(&image.id).unwrap();
    }
}
