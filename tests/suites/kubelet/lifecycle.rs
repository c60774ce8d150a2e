//! Probes, hooks, ends, static pods, log rotation.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::kube::{self, IMAGE, Kube};

pub async fn probes_and_hooks_are_run(k: Kube) -> Result<()> {
    let web = "mkdir -p /www && echo hello > /www/index.html && exec httpd -f -p 8080 -h /www";
    let handler = |h: serde_json::Value| {
        let mut p = json!({ "periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 30 });
        kube::merge(&mut p, h);
        p
    };
    let dir = k.cluster.node_dir(1).join("probed");
    k.pod(
        "probed",
        web,
        json!({ "volumes": [{ "name": "host", "hostPath": { "path": dir, "type": "DirectoryOrCreate" } }] }),
        json!({ "startupProbe": handler(json!({ "exec": { "command": ["test", "-f", "/www/index.html"] } })),
                "readinessProbe": handler(json!({ "httpGet": { "port": 8080, "path": "/" } })),
                "livenessProbe": handler(json!({ "tcpSocket": { "port": 8080 } })),
                "lifecycle": { "postStart": { "exec": { "command": ["sh", "-c", "echo post > /post"] } },
                               "preStop": { "exec": { "command": ["sh", "-c", "echo pre > /host/pre"] } } },
                "volumeMounts": [{ "name": "host", "mountPath": "/host" }] }),
    )?;
    k.ready("probed").await?;
    ensure!(
        k.exec("probed", "cat /post")? == "post\n",
        "the postStart hook has run"
    );
    // Once the file a liveness probe looks at is gone, the container is started again.
    k.pod(
        "doomed",
        "touch /alive; sleep 3; rm /alive; exec sleep 1000",
        json!({ "restartPolicy": "Always" }),
        json!({ "livenessProbe": { "exec": { "command": ["cat", "/alive"] }, "periodSeconds": 1, "timeoutSeconds": 10,
                                  "failureThreshold": 2 } }),
    )?;
    k.until_true("the container to be started again", |k| {
        Ok(
            k.field("pod/doomed", ".status.containerStatuses[0].restartCount")?
                .parse::<u32>()
                .unwrap_or(0)
                > 0,
        )
    })
    .await?;
    k.ok(&["delete", "pod", "probed", "--grace-period=5"])?;
    let pre = std::fs::read_to_string(dir.join("pre")).context("the preStop hook has run")?;
    ensure!(pre == "pre\n");
    Ok(())
}

pub async fn grpc_probes_are_asked(k: Kube) -> Result<()> {
    // etcd has the health service, for all of it and for no service by a name.
    let serve = "exec etcd --data-dir /data --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://127.0.0.1:2379";
    let etcd = harness::lab::tool("etcd");
    for (name, service) in [("healthy", ""), ("unknown", "no.such.Service")] {
        let probe = |service: &str| json!({ "grpc": { "port": 2379, "service": service }, "periodSeconds": 1, "failureThreshold": 60 });
        k.pod(
            name,
            serve,
            json!({ "volumes": [{ "name": "etcd", "hostPath": { "path": etcd, "type": "File" } }] }),
            json!({ "startupProbe": probe(""), "readinessProbe": probe(service),
                    "volumeMounts": [{ "name": "etcd", "mountPath": "/usr/bin/etcd", "readOnly": true }] }),
        )?;
    }
    k.ready("healthy").await?;
    let started = ".status.containerStatuses[0].started";
    k.until("pod/unknown", started, "true").await?;
    k.until_true("an event about the service", |k| {
        let events = k.ok(&["get", "events", "--field-selector", "involvedObject.name=unknown"])?;
        Ok(events.contains("Readiness probe failed"))
    })
    .await?;
    ensure!(k.field("pod/unknown", ".status.containerStatuses[0].ready")? == "false");
    Ok(())
}

pub async fn a_pod_ends_gracefully_and_is_killed_after_its_grace_period(k: Kube) -> Result<()> {
    let dir = k.cluster.node_dir(1).join("graceful");
    let volume = json!({ "volumes": [{ "name": "host", "hostPath": { "path": dir, "type": "DirectoryOrCreate" } }],
                         "terminationGracePeriodSeconds": 20 });
    let mount = json!({ "volumeMounts": [{ "name": "host", "mountPath": "/host" }] });
    k.pod(
        "polite",
        "trap 'sleep 1; echo done > /host/polite; exit 0' TERM; while true; do sleep 0.1; done",
        volume,
        mount,
    )?;
    k.pod(
        "deaf",
        "trap '' TERM; while true; do sleep 0.1; done",
        json!({ "terminationGracePeriodSeconds": 3 }),
        json!({}),
    )?;
    k.ready("polite").await?;
    k.ready("deaf").await?;
    let began = Instant::now();
    k.ok(&["delete", "pod", "polite"])?;
    ensure!(
        began.elapsed() < Duration::from_secs(15),
        "it was not waited for: {:?}",
        began.elapsed()
    );
    ensure!(
        std::fs::read_to_string(dir.join("polite"))? == "done\n",
        "SIGTERM came, and time to end"
    );
    let began = Instant::now();
    k.ok(&["delete", "pod", "deaf"])?;
    let took = began.elapsed();
    ensure!(
        took >= Duration::from_secs(2) && took < Duration::from_secs(20),
        "{took:?}"
    );
    Ok(())
}

pub async fn a_static_pod_runs(k: Kube) -> Result<()> {
    let path = k.cluster.node_dir(1).join("static/static.yaml");
    let pod = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: static, namespace: {}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: main, image: {IMAGE}, imagePullPolicy: Never, command: [sleep, \"1000\"]}}\n",
        k.space
    );
    std::fs::write(&path, pod)?;
    let up = k.ready("static-node1").await;
    std::fs::remove_file(&path)?;
    up?;
    k.until_true("the static pod to go with its file", |k| {
        Ok(k.run(&["get", "pod", "static-node1"], Duration::from_secs(20))?
            .code
            != 0)
    })
    .await
}

pub async fn kubelet_rotates_logs_and_no_line_is_lost(k: Kube) -> Result<()> {
    // About 2 MiB in 20 s; kubelet keeps three files of 64 KiB and looks every 3 s.
    let script = "i=0; while [ $i -lt 20000 ]; do echo line $i of a log that is rotated while it is written; i=$((i+1)); [ $((i % 1000)) = 0 ] && sleep 1; done; sleep 1000";
    k.pod("talker", script, json!({}), json!({}))?;
    k.ready("talker").await?;
    let logs = k.cluster.node_dir(1).join("podlogs");
    // What the files that are there hold, the newest last. kubectl shows the newest alone, which is empty once rotated.
    let held = || -> Result<(usize, Vec<u32>)> {
        // While kubelet compresses a file it is there twice.
        let script = format!(
            "set -e; cd {}; for f in $(find . -path '*{}_talker*' -type f ! -name '*.tmp' | sort); do case $f in *.gz) [ ! -e ${{f%.gz}} ] || continue; echo file; zcat $f;; *) echo file; cat $f;; esac; done",
            logs.display(),
            k.space
        );
        let text = harness::cmd::sh(&script)?;
        let numbers = text
            .lines()
            .filter_map(|l| l.split(' ').nth(4)?.parse().ok())
            .collect();
        Ok((text.lines().filter(|l| *l == "file").count(), numbers))
    };
    let began = Instant::now();
    let mut files = 0;
    loop {
        // A file that goes between find and cat is no mistake.
        if let Ok((n, numbers)) = held() {
            files = files.max(n);
            if numbers.last() == Some(&19_999) {
                break;
            }
        }
        ensure!(
            began.elapsed() < Duration::from_secs(90),
            "the last line is not there"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    ensure!(files > 1, "kubelet has not rotated the log");
    // A last rotation may come between the names and what is read by them: what is lost stays lost at the next look.
    let mut wrong = String::new();
    for _ in 0..5 {
        match held() {
            Ok((_, mut numbers)) => {
                numbers.sort_unstable();
                let first = numbers.first().copied().context("lines")?;
                let Some(gap) = numbers.windows(2).find(|w| w[1] != w[0] + 1) else {
                    ensure!(first > 0, "old files were removed");
                    return Ok(());
                };
                wrong = format!("of lines {first} to 19999 some are missing: {gap:?}");
            }
            Err(e) => wrong = format!("{e:#}"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    anyhow::bail!("{wrong}")
}
