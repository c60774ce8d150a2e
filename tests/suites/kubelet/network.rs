//! Namespaces shared with the host and in the pod, ports of the host, names.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use crate::kube::Kube;

pub async fn host_namespaces_and_a_shared_pid_namespace(k: Kube) -> Result<()> {
    k.pod(
        "hostnet",
        "hostname; ip -o -4 addr; exec sleep 1000",
        json!({ "hostNetwork": true }),
        json!({}),
    )?;
    k.pod(
        "hostpid",
        "cat /proc/1/comm; ps | grep -c kubelet; exec sleep 1000",
        json!({ "hostPID": true }),
        json!({}),
    )?;
    k.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: {name: shared}
spec:
  shareProcessNamespace: true
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: node1}
  containers:
  - {name: main, image: IMAGE, command: [sleep, "4321"]}
  - {name: other, image: IMAGE, command: [sleep, "1000"]}
"#,
    )?;
    for pod in ["hostnet", "hostpid", "shared"] {
        k.ready(pod).await?;
    }
    let node = k.cluster.net().node(1);
    k.until_true("the host's addresses", |k| Ok(k.logs("hostnet")?.contains(&node)))
        .await?;
    ensure!(k.field("pod/hostnet", ".status.podIP")? == node);
    let log = k.first_words("hostpid").await?;
    ensure!(!log.starts_with("sh\n"), "pid 1 is the host's: {log}");
    let seen = k.ok(&["exec", "shared", "-c", "other", "--", "ps"])?;
    ensure!(seen.contains("sleep 4321") && !seen.contains("kubelet"), "{seen}");
    Ok(())
}

pub async fn host_ports_aliases_and_dns_policies(k: Kube) -> Result<()> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    k.pod(
        "web",
        "mkdir -p /www && echo hello from $(hostname) > /www/index.html && exec httpd -f -p 8080 -h /www",
        json!({ "hostAliases": [{ "ip": "10.1.2.3", "hostnames": ["db.example", "db"] }] }),
        json!({ "ports": [{ "containerPort": 8080, "hostPort": port }],
                "readinessProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 } }),
    )?;
    k.pod(
        "default",
        "cat /etc/resolv.conf",
        json!({ "dnsPolicy": "Default" }),
        json!({}),
    )?;
    k.pod(
        "none",
        "cat /etc/resolv.conf",
        json!({ "dnsPolicy": "None", "dnsConfig": { "nameservers": ["192.0.2.53"], "searches": ["example.org"],
                "options": [{ "name": "ndots", "value": "2" }] } }),
        json!({}),
    )?;
    k.ready("web").await?;
    let url = format!("http://{}:{port}/", k.cluster.net().node(1));
    let began = Instant::now();
    let page = loop {
        match harness::cmd::sh(&format!("curl -sf --max-time 3 {url}")) {
            Ok(p) => break p,
            Err(e) if began.elapsed() > Duration::from_secs(20) => return Err(e),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    };
    ensure!(page == "hello from web\n", "{page:?}");
    let hosts = k.exec("web", "cat /etc/hosts /etc/resolv.conf")?;
    ensure!(hosts.contains("10.1.2.3\tdb.example\tdb"), "{hosts}");
    ensure!(
        hosts.contains(&format!("nameserver {}", k.cluster.net().node(1))),
        "{hosts}"
    );
    ensure!(
        hosts.contains(&format!(
            "search {}.svc.cluster.local svc.cluster.local cluster.local",
            k.space
        )),
        "{hosts}"
    );
    k.phase("default", "Succeeded").await?;
    k.phase("none", "Succeeded").await?;
    ensure!(!k.logs("default")?.contains("cluster.local"));
    let none = k.logs("none")?;
    ensure!(
        none.contains("nameserver 192.0.2.53\n")
            && none.contains("search example.org")
            && none.contains("ndots:2"),
        "{none}"
    );
    // Across nodes, by a headless Service's name.
    k.apply("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: None, selector: {app: web}, ports: [{port: 8080}]}\n")?;
    k.pod(
        "client",
        "for i in 1 2 3 4 5 6 7 8 9 10; do wget -qO- http://web:8080/ && exit 0; sleep 1; done; exit 1",
        json!({ "nodeSelector": { "kubernetes.io/hostname": "node2" } }),
        json!({}),
    )?;
    // The same from the host's network, for a pod that asks for the cluster's names there; one that does not has the host's.
    let look = "cat /etc/resolv.conf; for i in 1 2 3 4 5 6 7 8 9 10; do wget -qO- http://web:8080/ && exit 0; sleep 1; done; exit 1";
    let both = json!({ "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet" });
    k.pod("host-first", look, both, json!({}))?;
    let alone = json!({ "hostNetwork": true, "dnsPolicy": "ClusterFirst" });
    k.pod("host-default", "cat /etc/resolv.conf", alone, json!({}))?;
    for pod in ["client", "host-first", "host-default"] {
        k.phase(pod, "Succeeded").await?;
    }
    ensure!(k.logs("client")?.contains("hello from web"));
    let first = k.logs("host-first")?;
    for want in [
        format!("nameserver {}\n", k.cluster.net().node(1)),
        format!(
            "search {}.svc.cluster.local svc.cluster.local cluster.local",
            k.space
        ),
        "hello from web".to_owned(),
    ] {
        ensure!(first.contains(&want), "{want:?} is not in\n{first}");
    }
    ensure!(!k.logs("host-default")?.contains("cluster.local"));
    Ok(())
}
