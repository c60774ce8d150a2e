//! Mounts and namespaces, as root, on the real kernel.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use slipway_sys::mount;
use slipway_sys::ns::{self, IdMap, IdMaps, Kind, NewNamespaces, NsError};
use std::fs;
use std::path::{Path, PathBuf};

struct Mounted(PathBuf);
impl Drop for Mounted {
    fn drop(&mut self) {
        for m in mount::mounts_under(&self.0).unwrap() {
            mount::unmount(&m, true).unwrap();
        }
        assert!(mount::mounts_under(&self.0).unwrap().is_empty());
    }
}

fn layers(dir: &Path, n: usize) -> Vec<PathBuf> {
    (0..n)
        .map(|i| {
            let layer = dir.join(format!(
                "layer-{i:03}-with-a-long-name-so-that-a-page-of-options-cannot-hold-them"
            ));
            fs::create_dir(&layer).unwrap();
            fs::write(layer.join(format!("f{i}")), "x").unwrap();
            fs::write(layer.join("who"), i.to_string()).unwrap();
            layer
        })
        .collect()
}

#[test]
fn root_overlay_of_many_layers_has_the_nearest_on_top() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _m = Mounted(dir.path().to_path_buf());
    let lower = layers(dir.path(), 150);
    let [upper, work, target] = ["upper", "work", "target"].map(|d| dir.path().join(d));
    for d in [&upper, &work, &target] {
        fs::create_dir(d).unwrap();
    }
    mount::mount_overlay(&lower, Some((&upper, &work)), &target, &[]).unwrap();
    assert_eq!(fs::read_to_string(target.join("who")).unwrap(), "0");
    assert!(target.join("f149").exists());
    fs::write(target.join("new"), "y").unwrap();
    assert!(upper.join("new").exists());
    mount::unmount(&target, false).unwrap();
    mount::unmount(&target, false).unwrap();
    let e =
        mount::mount_overlay(&[dir.path().join("nowhere")], Some((&upper, &work)), &target, &[]).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::NotFound, "{e:?}");
}

#[test]
fn root_removing_a_tree_never_reaches_behind_a_mount() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _m = Mounted(dir.path().to_path_buf());
    let (data, tree) = (dir.path().join("data"), dir.path().join("tree"));
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::write(data.join("sub/precious"), "x").unwrap();
    fs::create_dir_all(tree.join("state/c.work/mounts/0")).unwrap();
    fs::write(tree.join("state/c.work/mounts/1"), "").unwrap();
    mount::bind(&data, &tree.join("state/c.work/mounts/0"), true, false).unwrap();
    mount::bind(
        &data.join("sub/precious"),
        &tree.join("state/c.work/mounts/1"),
        false,
        false,
    )
    .unwrap();
    mount::remove_tree(&tree).unwrap();
    assert!(!tree.exists());
    assert_eq!(fs::read_to_string(data.join("sub/precious")).unwrap(), "x");
    mount::remove_tree(&tree).unwrap();
    mount::remove_tree(&dir.path().join("not/there")).unwrap();
}

#[test]
fn root_overlay_takes_odd_and_long_paths_and_read_only_views() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _m = Mounted(dir.path().to_path_buf());
    let long = dir.path().join("a".repeat(200)).join("b".repeat(200));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("long"), "").unwrap();
    let odd = dir.path().join("with:colon,comma\\and backslash");
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("odd"), "").unwrap();
    let target = dir.path().join("t");
    fs::create_dir(&target).unwrap();
    mount::mount_overlay(&[long, odd.clone()], None, &target, &[]).unwrap();
    assert!(target.join("long").exists() && target.join("odd").exists());
    assert!(fs::write(target.join("no"), "").is_err(), "read-only");
    mount::unmount(&target, false).unwrap();
    mount::mount_overlay(&[odd], None, &target, &[]).unwrap();
    assert!(target.join("odd").exists());
    assert!(
        fs::write(target.join("no"), "").is_err(),
        "one layer: a read-only bind"
    );
}

#[test]
fn root_binds_are_recursive_and_read_only_as_asked() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _m = Mounted(dir.path().to_path_buf());
    let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
    fs::create_dir_all(src.join("sub")).unwrap();
    fs::create_dir(&dst).unwrap();
    mount::tmpfs(&src.join("sub"), 1 << 20, 0o755).unwrap();
    mount::bind(&src, &dst, true, true).unwrap();
    assert!(fs::write(dst.join("sub/x"), "").is_err());
    fs::write(src.join("sub/x"), "").unwrap();
    assert!(dst.join("sub/x").exists());
    assert_eq!(mount::mounts_under(&dst).unwrap(), [dst.join("sub"), dst.clone()]);
    mount::set_propagation(&dst, mount::Propagation::Shared, true).unwrap();
    mount::unmount(&dst, true).unwrap();
}

fn maps() -> IdMaps {
    let m = vec![IdMap {
        container_id: 0,
        host_id: 200_000,
        length: 65536,
    }];
    IdMaps {
        uids: m.clone(),
        gids: m,
    }
}

#[test]
fn root_pinned_namespaces_outlive_their_maker_and_belong_to_the_user_namespace() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let new = NewNamespaces {
        user: Some(maps()),
        net: true,
        ipc: true,
        uts: Some("pod-1".into()),
    };
    let sysctls = [
        (
            "net.ipv4.ip_unprivileged_port_start".to_string(),
            "80".to_string(),
        ),
        ("kernel.shmmax".to_string(), "12345".to_string()),
        ("net/ipv4/ping_group_range".to_string(), "0\t100".to_string()),
    ];
    let pinned = ns::pin(&new, dir.path(), &sysctls).unwrap();
    let kinds: Vec<Kind> = pinned.iter().map(|p| p.0).collect();
    assert_eq!(kinds, [Kind::User, Kind::Net, Kind::Ipc, Kind::Uts]);
    for (kind, path) in &pinned {
        assert!(ns::is_pinned(path));
        let own = ns::identity(Path::new(&format!("/proc/self/ns/{kind}"))).unwrap();
        assert_ne!(ns::identity(path).unwrap(), own);
    }
    let net = dir.path().join("net");
    let port = ns::in_netns(&net, || {
        let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        drop(addr);
        fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap()
    })
    .unwrap();
    assert_eq!(port.trim(), "80");
    for (_, path) in &pinned {
        ns::unpin(path).unwrap();
        ns::unpin(path).unwrap();
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn root_sysctls_that_would_hit_the_host_are_refused_before_anything_is_made() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let new = NewNamespaces {
        net: true,
        ..NewNamespaces::default()
    };
    let long = "net.ipv4.conf.eth0/1.forwarding".to_string(); // no such device: the kernel refuses
    for (name, value) in [
        ("kernel.core_pattern", "|/bin/x"),
        ("kernel.shmmax", "1"),
        ("net.ipv4.ip_forward", "1+kernel.core_pattern"),
        ("net.ipv4.ip_forward", "1\nx"),
        ("net/../kernel/core_pattern", "x"),
        ("net..ipv4", "1"),
        (long.as_str(), "1"),
    ] {
        let result = ns::pin(&new, dir.path(), &[(name.to_string(), value.to_string())]);
        match result {
            Err(NsError::Sysctl { .. } | NsError::SetSysctl { .. }) => {}
            other => panic!("{name}={value:?}: {other:?}"),
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{name}");
    }
}

#[test]
fn root_a_network_namespace_alone_has_its_loopback_up() {
    if !common::root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net");
    ns::pin_new_net(&path).unwrap();
    let connected = ns::in_netns(&path, || {
        let l = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        std::net::TcpStream::connect(l.local_addr().unwrap()).is_ok()
    });
    assert!(connected.unwrap());
    ns::unpin(&path).unwrap();
    assert!(!path.exists());
}

#[test]
fn root_an_id_mapped_copy_shows_shifted_owners() {
    if !common::root() {
        return;
    }
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let _m = Mounted(dir.path().to_path_buf());
    let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
    fs::create_dir(&src).unwrap();
    fs::create_dir(&dst).unwrap();
    fs::write(src.join("f"), "").unwrap();
    let userns = ns::user_namespace(&maps()).unwrap();
    let tree = mount::idmapped_clone(&src, userns.as_fd(), false).unwrap();
    mount::attach(tree.as_fd(), &dst).unwrap();
    assert_eq!(fs::metadata(dst.join("f")).unwrap().uid(), 200_000);
}
