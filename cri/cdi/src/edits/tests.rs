//! Edits applied to a specification that has something in every place.

use super::*;
use serde_json::json;

fn spec() -> oci::Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 7, "gid": 8, "additionalGids": [8]}, "cwd": "/", "env": ["A=1", "B=2"]},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/usr/lib/x", "type": "bind", "source": "/old"}],
        "linux": {"devices": [{"path": "/dev/a", "type": "c", "major": 1, "minor": 1}],
                  "resources": {"devices": [{"allow": false, "access": "rwm"}]}}
    }))
    .unwrap()
}

fn apply(edits: serde_json::Value) -> oci::Spec {
    let edits: ContainerEdits = serde_json::from_value(edits).unwrap();
    let mut spec = spec();
    edits.apply(&mut spec).unwrap();
    spec
}

#[test]
fn variables_replace_those_of_the_same_name_in_place() {
    let spec = apply(json!({"env": ["B=3", "C=4"]}));
    assert_eq!(
        spec.process().as_ref().unwrap().env().as_ref().unwrap(),
        &["A=1", "B=3", "C=4"]
    );
}

#[test]
fn a_device_replaces_one_at_its_path_and_takes_the_processs_owner() {
    let node = json!({"path": "/dev/a", "type": "c", "major": 195, "minor": 2, "fileMode": 432, "gid": 44});
    let spec = apply(json!({"deviceNodes": [node]}));
    let linux = spec.linux().as_ref().unwrap();
    let devices = linux.devices().as_ref().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!(
        (devices[0].major(), devices[0].uid(), devices[0].gid()),
        (195, Some(7), Some(44))
    );
    let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
    assert_eq!((rules.len(), rules[1].access().as_deref()), (2, Some("rwm")));
}

#[test]
fn a_device_without_permissions_gets_a_node_and_no_rule() {
    let node = json!({"path": "/dev/b", "type": "c", "major": 1, "minor": 2, "permissions": "none"});
    let spec = apply(json!({"deviceNodes": [node]}));
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.devices().as_ref().unwrap().len(), 2);
    assert_eq!(
        linux
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .as_ref()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn mounts_replace_those_at_their_place_and_are_sorted_by_depth() {
    let spec = apply(json!({"mounts": [
        {"hostPath": "/h/deep", "containerPath": "/a/b/c/d", "options": ["rbind", "ro"]},
        {"hostPath": "/h/new", "containerPath": "/usr/lib/x"},
        {"hostPath": "tmpfs", "containerPath": "/scratch", "type": "tmpfs", "options": ["size=1m"]}]}));
    let mounts = spec.mounts().as_ref().unwrap();
    let places: Vec<_> = mounts.iter().map(|m| m.destination().to_str().unwrap()).collect();
    assert_eq!(places, ["/proc", "/scratch", "/usr/lib/x", "/a/b/c/d"]);
    assert_eq!(mounts[2].source().as_deref(), Some(Path::new("/h/new")));
    assert_eq!(mounts[2].options().as_ref().unwrap(), &["bind"]);
    assert_eq!(mounts[1].typ().as_deref(), Some("tmpfs"));
}

#[test]
fn bind_mounts_of_a_user_namespace_are_idmapped() {
    let mut spec = spec();
    let map = oci::LinuxIdMappingBuilder::default()
        .host_id(1000u32)
        .container_id(0u32)
        .size(10u32)
        .build()
        .unwrap();
    spec.linux_mut()
        .as_mut()
        .unwrap()
        .set_uid_mappings(Some(vec![map]))
        .set_gid_mappings(Some(vec![map]));
    let edits = ContainerEdits {
        mounts: vec![Mount {
            host_path: "/h".into(),
            container_path: "/c".into(),
            ..Mount::default()
        }],
        ..ContainerEdits::default()
    };
    edits.apply(&mut spec).unwrap();
    let mounts = spec.mounts().as_ref().unwrap();
    let at = |p: &str| mounts.iter().find(|m| m.destination() == Path::new(p)).unwrap();
    assert_eq!(at("/c").uid_mappings().as_ref().unwrap().len(), 1);
    assert!(at("/usr/lib/x").uid_mappings().is_none());
}

/// CVE-2025-23266: a hook never inherits an environment.
#[test]
fn hooks_have_the_environment_that_their_file_gives_and_no_other() {
    let hook = |env: serde_json::Value| json!({"hookName": "createContainer", "path": "/bin/h", "args": ["h"], "env": env, "timeout": 3});
    let spec = apply(json!({"hooks": [hook(json!([])), hook(json!(["X=1"]))]}));
    let hooks = spec
        .hooks()
        .as_ref()
        .unwrap()
        .create_container()
        .as_ref()
        .unwrap();
    assert_eq!(hooks[0].env(), &Some(vec![]));
    assert_eq!(hooks[1].env(), &Some(vec!["X=1".to_owned()]));
    assert_eq!(hooks[0].timeout(), Some(3));
}

#[test]
fn groups_are_added_once_and_zero_is_ignored() {
    let spec = apply(json!({"additionalGids": [0, 44, 8, 44]}));
    assert_eq!(
        spec.process()
            .as_ref()
            .unwrap()
            .user()
            .additional_gids()
            .as_ref()
            .unwrap(),
        &[8, 44]
    );
}

#[test]
fn what_a_file_leaves_out_is_completed_and_contradictions_are_refused() {
    let block = DeviceNode {
        kind: DeviceKind::Block,
        major: 8,
        minor: 1,
        mode: 0o660,
        uid: 0,
        gid: 6,
    };
    let with = |node: serde_json::Value, found: io::Result<DeviceNode>| {
        let mut edits: ContainerEdits = serde_json::from_value(json!({"deviceNodes": [node]})).unwrap();
        let found = found.map_err(|e| e.kind());
        edits
            .complete(&|_| found.map_err(io::Error::from))
            .map(|()| edits.device_nodes.remove(0))
    };
    let gone = || Err(io::ErrorKind::NotFound.into());
    let node = with(json!({"path": "/dev/x"}), Ok(block)).unwrap();
    assert_eq!((node.kind.as_str(), node.major, node.minor), ("b", 8, 1));
    // Fully described: the host need not have it, and does not change its numbers.
    let full = json!({"path": "/dev/x", "type": "c", "major": 5, "minor": 0});
    assert_eq!(with(full.clone(), gone()).unwrap().major, 5);
    let node = with(full, Ok(block)).unwrap();
    assert_eq!((node.major, node.file_mode), (5, Some(0o660)));
    assert!(matches!(
        with(json!({"path": "/dev/x", "type": "c"}), Ok(block)),
        Err(EditError::OtherKind { .. })
    ));
    assert!(matches!(
        with(json!({"path": "/dev/x"}), gone()),
        Err(EditError::Lookup { .. })
    ));
}
