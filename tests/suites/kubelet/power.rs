//! A node without power for a moment: nothing runs, nothing of the state directory is there, and every pod comes back.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::kube::{IMAGE, Kube};

const NODE: usize = crate::SECOND;

fn here(mut more: serde_json::Value) -> serde_json::Value {
    let place = json!({ "nodeSelector": { "kubernetes.io/hostname": "node2" }, "restartPolicy": "Always" });
    crate::kube::merge(&mut more, place);
    more
}

pub async fn a_node_that_lost_its_power_brings_every_pod_back(k: Kube) -> Result<()> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    k.pod(
        "web",
        "mkdir -p /www && echo hello from $(hostname) > /www/index.html && exec httpd -f -p 8080 -h /www",
        here(json!({})),
        json!({ "ports": [{ "containerPort": 8080, "hostPort": port }],
                "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 } }),
    )?;
    let both =
        json!([{ "name": "disk", "mountPath": "/disk" }, { "name": "memory", "mountPath": "/memory" }]);
    k.pod(
        "volumes",
        "echo boot >> /disk/boots; echo boot >> /memory/boots; wc -l < /disk/boots; wc -l < /memory/boots; exec sleep 1000",
        here(json!({ "volumes": [{ "name": "disk", "emptyDir": {} },
                                 { "name": "memory", "emptyDir": { "medium": "Memory" } }],
                     "initContainers": [{ "name": "first", "image": IMAGE, "command": ["sh", "-c", "echo init >> /disk/inits"],
                                          "volumeMounts": both }] })),
        json!({ "volumeMounts": both }),
    )?;
    k.pod(
        "shared",
        "exec sleep 1000",
        here(json!({ "shareProcessNamespace": true })),
        json!({}),
    )?;
    k.pod(
        "hostnet",
        "exec sleep 1000",
        here(json!({ "hostNetwork": true })),
        json!({}),
    )?;
    let never = |mut spec: serde_json::Value| {
        crate::kube::merge(&mut spec, json!({ "restartPolicy": "Never" }));
        spec
    };
    k.pod("done", "echo all done", never(here(json!({}))), json!({}))?;
    k.pod("once", "exec sleep 1000", never(here(json!({}))), json!({}))?;
    let file = k.cluster.node_dir(NODE).join("static/returns.yaml");
    std::fs::write(
        &file,
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: returns, namespace: {}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: main, image: {IMAGE}, imagePullPolicy: Never, command: [sleep, \"1000\"]}}\n",
            k.space
        ),
    )?;
    let verdict = all_return(&k, port).await;
    std::fs::remove_file(&file)?;
    verdict?;
    k.until_true("the static pod to go with its file", |k| {
        Ok(k.run(&["get", "pod", "returns-node2"], Duration::from_secs(20))?
            .code
            != 0)
    })
    .await
}

const LIVING: [&str; 5] = ["web", "volumes", "shared", "hostnet", "returns-node2"];

async fn all_return(k: &Kube, port: u16) -> Result<()> {
    for pod in LIVING {
        k.ready(pod).await?;
    }
    k.ready("once").await?;
    k.phase("done", "Succeeded").await?;
    let url = format!("http://{}:{port}/", k.cluster.net().node(NODE));
    let page = || harness::cmd::sh(&format!("curl -sf --max-time 3 {url}"));
    k.until_true("the page", |_| Ok(page()? == "hello from web\n"))
        .await?;
    let status = |pod: &str, path: &str| {
        k.field(
            &format!("pod/{pod}"),
            &format!(".status.containerStatuses[0]{path}"),
        )
    };

    k.cluster.cut_power(NODE)?;
    k.cluster.start_runtime(NODE)?;
    k.cluster.wait_runtime(NODE).await?;
    k.cluster.start_kubelet(NODE)?;

    for pod in LIVING {
        k.until_true(&format!("{pod} to be started again"), |_| {
            Ok(status(pod, ".restartCount")? == "1")
        })
        .await?;
        k.ready(pod).await?;
        let last = status(pod, ".lastState.terminated")?;
        ensure!(
            last.contains("\"exitCode\":255") && last.contains("rebooted"),
            "{pod} ended, as is told, so: {last}"
        );
    }
    k.until_true("the page once more", |_| Ok(page()? == "hello from web\n"))
        .await?;
    // The disk has what was written before, memory has not.
    k.until_true("the second boot's lines", |k| {
        Ok(k.logs("volumes")?.lines().count() == 2)
    })
    .await?;
    ensure!(k.logs("volumes")? == "2\n1\n", "{:?}", k.logs("volumes")?);
    ensure!(k.exec("volumes", "cat /disk/inits")? == "init\ninit\n");
    ensure!(k.exec("shared", "echo alive")? == "alive\n");
    // What had ended stays as it ended, and what is not to be started again is not.
    ensure!(k.field("pod/done", ".status.phase")? == "Succeeded");
    ensure!(status("done", ".restartCount")? == "0" && k.logs("done")? == "all done\n");
    k.phase("once", "Failed").await?;
    ensure!(status("once", ".state.terminated.exitCode")? == "255");

    // Each address is one of a living pod's: none is kept for what the power cut ended.
    let cri = k.cluster.cri(NODE).await?;
    let leases = k
        .cluster
        .node_dir(NODE)
        .join("ipam")
        .join(format!("{}-pods{NODE}", k.cluster.net().name));
    let began = std::time::Instant::now();
    loop {
        let mut living = BTreeSet::new();
        for pod in cri.pods().await?.iter().filter(|p| p.state == 0) {
            let network = cri
                .pod_status(&pod.id)
                .await?
                .status
                .unwrap_or_default()
                .network
                .unwrap_or_default();
            living.insert(network.ip);
        }
        living.remove("");
        living.remove(&k.cluster.net().node(NODE));
        let leased: BTreeSet<String> = std::fs::read_dir(&leases)
            .with_context(|| format!("reading {}", leases.display()))?
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|name| name.parse::<std::net::IpAddr>().is_ok())
            .collect();
        if living == leased && living.len() >= 3 {
            break;
        }
        ensure!(
            began.elapsed() < Duration::from_secs(60),
            "leased are {leased:?}, and pods have {living:?}"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}
