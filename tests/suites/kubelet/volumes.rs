//! Volumes as kubelet hands them over: files of the API, of the host, and scratch space.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::kube::Kube;

pub async fn config_maps_secrets_projections_and_the_downward_api_are_mounted(k: Kube) -> Result<()> {
    k.ok(&[
        "create",
        "configmap",
        "settings",
        "--from-literal=a=1",
        "--from-literal=b=2",
    ])?;
    k.ok(&[
        "create",
        "secret",
        "generic",
        "key",
        "--from-literal=token=s3cret",
    ])?;
    k.pod(
        "reader",
        "cat /settings/a /settings-b /secret/token /all/a /all/token /all/labels; ls /var/run/secrets/kubernetes.io/serviceaccount; echo env $A $NAME; stat -Lc %a /secret/token; exec sleep 1000",
        json!({ "volumes": [
            { "name": "settings", "configMap": { "name": "settings" } },
            { "name": "key", "secret": { "secretName": "key", "defaultMode": 0o400 } },
            { "name": "all", "projected": { "sources": [
                { "configMap": { "name": "settings" } }, { "secret": { "name": "key" } },
                { "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] } } ] } } ] }),
        json!({ "volumeMounts": [
            { "name": "settings", "mountPath": "/settings" },
            { "name": "settings", "mountPath": "/settings-b", "subPath": "b" },
            { "name": "key", "mountPath": "/secret", "readOnly": true },
            { "name": "all", "mountPath": "/all" } ],
            "env": [{ "name": "A", "valueFrom": { "configMapKeyRef": { "name": "settings", "key": "a" } } },
                    { "name": "NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }] }),
    )?;
    k.ready("reader").await?;
    // The script goes on after its container is Ready.
    k.until_true("the script's last words", |k| {
        Ok(k.logs("reader")?.ends_with("400\n"))
    })
    .await?;
    let log = k.logs("reader")?;
    for want in [
        "12s3cret1s3cretapp=\"reader\"",
        "ca.crt\nnamespace\ntoken",
        "env 1 reader",
        "400",
    ] {
        ensure!(log.contains(want), "{want:?} is not in\n{log}");
    }
    // A change of the ConfigMap arrives in the running container, but not through a subPath.
    k.ok(&[
        "patch",
        "configmap",
        "settings",
        "-p",
        r#"{"data":{"a":"changed"}}"#,
    ])?;
    k.until_true("the change to arrive", |k| {
        Ok(k.exec("reader", "cat /settings/a /all/a")? == "changedchanged")
    })
    .await
}

pub async fn host_paths_and_empty_directories_are_mounted(k: Kube) -> Result<()> {
    let dir = k.cluster.node_dir(1).join("paths");
    std::fs::create_dir_all(dir.join("there"))?;
    std::fs::write(dir.join("file"), "of the host\n")?;
    let path = |p: &str, kind: &str| json!({ "path": dir.join(p), "type": kind });
    k.pod(
        "paths",
        "cat /file; echo back > /dir/back; touch /made/x; touch /made-file; df -k /memory | tail -1; mount | grep ' /memory '; touch /disk/x && echo disk; ls -l /sock; test -b /dev/null || test -c /null && echo device; touch /ro/x 2>&1; mkdir /disk/sub; exec sleep 1000",
        json!({ "volumes": [
            { "name": "file", "hostPath": path("file", "File") },
            { "name": "dir", "hostPath": path("there", "Directory") },
            { "name": "made", "hostPath": path("made", "DirectoryOrCreate") },
            { "name": "made-file", "hostPath": path("made-file", "FileOrCreate") },
            { "name": "sock", "hostPath": { "path": k.cluster.socket(1), "type": "Socket" } },
            { "name": "null", "hostPath": { "path": "/dev/null", "type": "CharDevice" } },
            { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "8Mi" } },
            { "name": "disk", "emptyDir": {} } ] }),
        json!({ "volumeMounts": [
            { "name": "file", "mountPath": "/file" }, { "name": "dir", "mountPath": "/dir" },
            { "name": "dir", "mountPath": "/ro", "readOnly": true },
            { "name": "made", "mountPath": "/made" }, { "name": "made-file", "mountPath": "/made-file" },
            { "name": "sock", "mountPath": "/sock" }, { "name": "null", "mountPath": "/null" },
            { "name": "memory", "mountPath": "/memory" }, { "name": "disk", "mountPath": "/disk" },
            { "name": "disk", "mountPath": "/below", "subPath": "one/two" } ] }),
    )?;
    k.ready("paths").await?;
    k.until_true("the script to have run", |k| {
        Ok(k.exec("paths", "ls /disk")?.contains("sub"))
    })
    .await?;
    let log = k.logs("paths")?;
    for want in [
        "of the host",
        " 8192 ",
        "type tmpfs",
        "disk\n",
        "srw-",
        "device\n",
        "Read-only file system",
    ] {
        ensure!(log.contains(want), "{want:?} is not in\n{log}");
    }
    ensure!(std::fs::read_to_string(dir.join("there/back"))? == "back\n");
    ensure!(dir.join("made/x").exists() && dir.join("made-file").is_file());
    ensure!(
        k.exec("paths", "touch /below/x; ls /disk/one/two")? == "x\n",
        "a subPath is made below its volume"
    );
    // A path that has to be there and is not holds the pod up, with a reason.
    k.pod(
        "absent",
        "true",
        json!({ "volumes": [{ "name": "none", "hostPath": path("none", "Directory") }] }),
        json!({ "volumeMounts": [{ "name": "none", "mountPath": "/none" }] }),
    )?;
    k.until_true("an event about the missing path", |k| {
        Ok(k.ok(&["get", "events"])?.contains("hostPath type check failed"))
    })
    .await
}
