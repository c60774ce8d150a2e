//! What mounts are made on and the rootfs lacks. libcontainer would make it too, but makes sure of /proc anew for each, in
//! 75 calls: a service account's token, DNS and names, each a mount on something that no image has.
//!
//! Nothing here is an error: what cannot be made, libcontainer cannot make either, and says so.

use libcontainer::oci_spec::runtime::{Mount, Spec};
use slipway_sys::root::Root;
use std::fs;
use std::path::Path;

/// Makes them, where nothing is there and nothing is mounted above. Not in a user namespace: there they are its root's.
pub fn make(root: &Root, spec: &Spec) {
    if crate::stage::has_user_namespace(spec) {
        return;
    }
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    for (n, mount) in mounts.iter().enumerate() {
        let path = mount.destination();
        let covered = |above: &Mount| path.starts_with(above.destination());
        let missing = matches!(root.symlink_metadata(path), Ok(None));
        if !missing || mounts[..n].iter().any(covered) {
            continue;
        }
        if is_file(mount) {
            let parent = path.parent().unwrap_or(Path::new("/"));
            let _ = root
                .mkdir_all(parent, 0o755, None)
                .and_then(|_| root.create_file(path, 0o644));
        } else {
            let _ = root.mkdir_all(path, 0o755, None);
        }
    }
}

fn is_file(mount: &Mount) -> bool {
    let source = mount.source().as_deref().filter(|_| crate::stage::is_bind(mount));
    source
        .and_then(|path| fs::metadata(path).ok())
        .is_some_and(|m| !m.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn spec(mounts: serde_json::Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "mounts": mounts,
            "linux": {"namespaces": [{"type": "mount"}]},
        }))
        .expect("a specification")
    }

    #[test]
    fn what_is_missing_is_made_of_the_kind_of_its_source() {
        let dir = tempfile::tempdir().expect("a directory");
        let rootfs = dir.path().join("rootfs");
        fs::create_dir_all(rootfs.join("there")).expect("made");
        fs::write(dir.path().join("file"), "x").expect("written");
        fs::write(rootfs.join("kept"), "kept").expect("written");
        symlink("/nowhere", rootfs.join("link")).expect("linked");
        let root = Root::open(&rootfs).expect("opened");
        let bind = |source: &Path, destination: &str| json!({"destination": destination, "type": "bind", "source": source});
        let file = dir.path().join("file");
        make(
            &root,
            &spec(json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/proc/covered", "type": "tmpfs", "source": "tmpfs"},
                bind(&file, "/etc/deep/name"),
                bind(&file, "/kept"),
                bind(&file, "/link"),
                bind(dir.path(), "/var/run/token"),
            ])),
        );
        assert!(rootfs.join("proc").is_dir());
        assert!(!rootfs.join("proc/covered").exists());
        let made = rootfs.join("etc/deep/name").metadata().expect("made");
        assert!(made.is_file() && made.permissions().mode() & 0o777 == 0o644);
        assert_eq!(fs::read(rootfs.join("kept")).expect("read"), b"kept");
        assert!(
            rootfs
                .join("link")
                .symlink_metadata()
                .expect("there")
                .is_symlink()
        );
        assert!(rootfs.join("var/run/token").is_dir());
    }

    #[test]
    fn a_link_in_the_image_leads_nowhere_but_into_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let rootfs = dir.path().join("rootfs");
        fs::create_dir(&rootfs).expect("made");
        symlink(dir.path(), rootfs.join("out")).expect("linked");
        let root = Root::open(&rootfs).expect("opened");
        let mount = json!([{"destination": "/out/point", "type": "tmpfs", "source": "tmpfs"}]);
        make(&root, &spec(mount));
        assert!(!dir.path().join("point").exists());
    }
}
