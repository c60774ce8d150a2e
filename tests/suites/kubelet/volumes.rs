//! Volumes as kubelet hands them over: files of the API, of the host, and scratch space.

use anyhow::{Context, Result, ensure};
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

/// A block device of the host's: nobody opens it.
fn block_device() -> Result<std::path::PathBuf> {
    use std::os::unix::fs::FileTypeExt as _;
    let names = std::fs::read_dir("/sys/block")?.flatten().map(|e| e.file_name());
    names
        .map(|name| std::path::Path::new("/dev").join(name))
        .find(|node| std::fs::metadata(node).is_ok_and(|m| m.file_type().is_block_device()))
        .context("this machine has no block device")
}

pub async fn host_paths_and_empty_directories_are_mounted(k: Kube) -> Result<()> {
    let dir = k.cluster.node_dir(1).join("paths");
    std::fs::create_dir_all(dir.join("there"))?;
    std::fs::write(dir.join("file"), "of the host\n")?;
    let path = |p: &str, kind: &str| json!({ "path": dir.join(p), "type": kind });
    k.pod(
        "paths",
        "cat /file; echo back > /dir/back; touch /made/x; touch /made-file; df -k /memory | tail -1; mount | grep ' /memory '; touch /disk/x && echo disk; ls -l /sock; test -c /null && test -b /block && echo devices; touch /ro/x 2>&1; mkdir /disk/sub; exec sleep 1000",
        json!({ "volumes": [
            { "name": "file", "hostPath": path("file", "File") },
            { "name": "dir", "hostPath": path("there", "Directory") },
            { "name": "made", "hostPath": path("made", "DirectoryOrCreate") },
            { "name": "made-file", "hostPath": path("made-file", "FileOrCreate") },
            { "name": "sock", "hostPath": { "path": k.cluster.socket(1), "type": "Socket" } },
            { "name": "null", "hostPath": { "path": "/dev/null", "type": "CharDevice" } },
            { "name": "block", "hostPath": { "path": block_device()?, "type": "BlockDevice" } },
            { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "8Mi" } },
            { "name": "disk", "emptyDir": {} } ] }),
        json!({ "volumeMounts": [
            { "name": "file", "mountPath": "/file" }, { "name": "dir", "mountPath": "/dir" },
            { "name": "dir", "mountPath": "/ro", "readOnly": true },
            { "name": "made", "mountPath": "/made" }, { "name": "made-file", "mountPath": "/made-file" },
            { "name": "sock", "mountPath": "/sock" }, { "name": "null", "mountPath": "/null" },
            { "name": "block", "mountPath": "/block", "readOnly": true },
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
        "devices\n",
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

pub async fn an_empty_directory_takes_no_more_than_its_limit(k: Kube) -> Result<()> {
    let script =
        "dd if=/dev/zero of=/scratch/x bs=1M count=12; wc -c < /scratch/x; echo written; exec sleep 1000";
    let with = |volume: serde_json::Value| {
        (
            json!({ "volumes": [{ "name": "scratch", "emptyDir": volume }] }),
            json!({ "volumeMounts": [{ "name": "scratch", "mountPath": "/scratch" }] }),
        )
    };
    let pods = [
        ("memory", json!({ "medium": "Memory", "sizeLimit": "8Mi" })),
        ("within", json!({ "sizeLimit": "16Mi" })),
        ("over", json!({ "sizeLimit": "8Mi" })),
    ];
    for (name, volume) in pods {
        let (spec, container) = with(volume);
        k.pod(name, script, spec, container)?;
    }
    // On a disk it is kubelet that looks and ends the pod.
    k.phase("over", "Failed").await?;
    ensure!(k.field("pod/over", ".status.reason")? == "Evicted");
    let message = k.field("pod/over", ".status.message")?;
    ensure!(
        message.contains("Usage of EmptyDir volume \"scratch\" exceeds the limit"),
        "{message}"
    );
    // In memory it is a file system of that size.
    let log = k.logs("memory")?;
    let eight = format!("{}\nwritten", 8 << 20);
    ensure!(
        log.contains("No space left on device") && log.contains(&eight),
        "{log}"
    );
    for pod in ["memory", "within"] {
        ensure!(
            k.field(&format!("pod/{pod}"), ".status.phase")? == "Running",
            "{pod}"
        );
        ensure!(k.logs(pod)?.ends_with("written\n"), "{pod}");
    }
    Ok(())
}
