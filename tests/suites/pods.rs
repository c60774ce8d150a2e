//! Pod sandboxes over the CRI: what RunPodSandbox honours, what listing filters, what stop and remove leave.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use anyhow::Result;
use harness::cri::{container_config, pod_config};
use harness::image::BUSYBOX;
use harness::{World, v1};

const SLEEP: &[&str] = &["sleep", "1000"];

#[tokio::test]
async fn a_pod_on_the_pod_network_has_an_address_and_loses_everything_when_removed() -> Result<()> {
    let w = World::new("pod-net").await?;
    let config = pod_config("web", &w.lab, false);
    let pod = w.cri.run_pod(config.clone()).await?;
    let s = w.cri.pod_status(&pod).await?;
    let status = s.status.expect("a status");
    assert_eq!(status.state, v1::PodSandboxState::SandboxReady as i32);
    let ip = status.network.expect("a network").ip;
    let subnet = w.lab.subnet();
    assert!(
        ip.starts_with(subnet.trim_end_matches("0/24")),
        "{ip} is not in {subnet}"
    );
    assert!(!s.info.is_empty(), "the verbose status has info");

    let id = w
        .cri
        .run(&pod, container_config("main", BUSYBOX, SLEEP), config)
        .await?;
    let (code, out, err) = w
        .cri
        .exec(&id, &["sh", "-c", "ip -o -4 addr; hostname; cat /etc/hosts"], 10)
        .await?;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains(&ip), "{out}");
    assert!(out.contains("127.0.0.1"), "loopback is up: {out}");
    assert!(
        out.lines().any(|l| l == "web"),
        "the hostname is the pod's: {out}"
    );
    w.finish().await
}

#[tokio::test]
async fn dns_sysctls_and_shm_are_what_the_pod_asks_for() -> Result<()> {
    let w = World::new("pod-config").await?;
    let mut config = pod_config("cfg", &w.lab, false);
    config.dns_config = Some(v1::DnsConfig {
        servers: vec!["10.96.0.10".into(), "1.1.1.1".into()],
        searches: vec!["ns.svc.cluster.local".into(), "cluster.local".into()],
        options: vec!["ndots:5".into()],
    });
    let linux = config.linux.as_mut().expect("linux");
    linux.sysctls = HashMap::from([
        ("net.ipv4.ip_unprivileged_port_start".into(), "80".into()),
        ("kernel.shm_rmid_forced".into(), "1".into()),
    ]);
    let pod = w.cri.run_pod(config.clone()).await?;
    let id = w
        .cri
        .run(&pod, container_config("main", BUSYBOX, SLEEP), config)
        .await?;
    let script = "cat /etc/resolv.conf /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; df -k /dev/shm | tail -1";
    let (_, out, _) = w.cri.exec(&id, &["sh", "-c", script], 10).await?;
    for want in [
        "nameserver 10.96.0.10",
        "nameserver 1.1.1.1",
        "search ns.svc.cluster.local cluster.local",
        "options ndots:5",
        "80\n1\n",
        " 65536 ",
    ] {
        assert!(out.contains(want), "{want:?} is not in\n{out}");
    }
    w.finish().await
}

#[tokio::test]
async fn a_name_is_taken_once_and_free_again_when_its_pod_is_gone() -> Result<()> {
    let w = World::new("pod-name").await?;
    let config = pod_config("same", &w.lab, true);
    let pod = w.cri.run_pod(config.clone()).await?;
    let e = w
        .cri
        .run_pod(config.clone())
        .await
        .expect_err("the name is taken");
    let text = format!("{e:#}");
    assert!(
        text.contains("same") && text.contains(&pod),
        "the error names the pod and who has it: {text}"
    );
    w.cri.remove_pod(&pod).await?;
    w.cri.remove_pod(&pod).await?;
    let again = w.cri.run_pod(config).await?;
    assert_ne!(pod, again);
    w.finish().await
}

#[tokio::test]
async fn lists_are_filtered_by_id_state_and_label() -> Result<()> {
    let w = World::new("pod-list").await?;
    let mut ids = Vec::new();
    for (name, tier) in [("a", "front"), ("b", "back")] {
        let mut config = pod_config(name, &w.lab, true);
        config.labels = HashMap::from([("tier".into(), tier.into())]);
        config.annotations = HashMap::from([("note".into(), format!("of {name}"))]);
        ids.push(w.cri.run_pod(config).await?);
    }
    w.cri
        .runtime
        .clone()
        .stop_pod_sandbox(v1::StopPodSandboxRequest {
            pod_sandbox_id: ids[1].clone(),
        })
        .await?;
    let list = async |filter: v1::PodSandboxFilter| -> Result<Vec<String>> {
        let r = v1::ListPodSandboxRequest { filter: Some(filter) };
        let items = w
            .cri
            .runtime
            .clone()
            .list_pod_sandbox(r)
            .await?
            .into_inner()
            .items;
        Ok(items.into_iter().map(|p| p.id).collect())
    };
    assert_eq!(
        list(v1::PodSandboxFilter {
            id: ids[0][..12].into(),
            ..Default::default()
        })
        .await?,
        [ids[0].clone()]
    );
    let ready = v1::PodSandboxStateValue {
        state: v1::PodSandboxState::SandboxReady as i32,
    };
    assert_eq!(
        list(v1::PodSandboxFilter {
            state: Some(ready),
            ..Default::default()
        })
        .await?,
        [ids[0].clone()]
    );
    let label = HashMap::from([("tier".to_owned(), "back".to_owned())]);
    assert_eq!(
        list(v1::PodSandboxFilter {
            label_selector: label,
            ..Default::default()
        })
        .await?,
        [ids[1].clone()]
    );
    let all = w.cri.pods().await?;
    assert_eq!(all.len(), 2);
    assert!(all.iter().all(|p| p.annotations.contains_key("note")));
    w.finish().await
}

#[tokio::test]
async fn a_shared_pid_namespace_has_our_init_as_pid_1_and_shows_every_container() -> Result<()> {
    let w = World::new("pod-pid").await?;
    let mut config = pod_config("pid", &w.lab, true);
    let options = config
        .linux
        .as_mut()
        .and_then(|l| l.security_context.as_mut())
        .and_then(|s| s.namespace_options.as_mut());
    options.expect("options").pid = v1::NamespaceMode::Pod as i32;
    // Higher than a sandbox's should be, for who may lower it; and for who may not, other than none asked for.
    std::fs::write(format!("/proc/{}/oom_score_adj", w.daemon.pid()), "500")?;
    let pod = w.cri.run_pod(config.clone()).await?;
    let in_pod = |name: &str, args: &[&str]| {
        let mut c = container_config(name, BUSYBOX, args);
        c.linux.as_mut().expect("linux").security_context = Some(v1::LinuxContainerSecurityContext {
            namespace_options: Some(v1::NamespaceOption {
                network: v1::NamespaceMode::Node as i32,
                pid: v1::NamespaceMode::Pod as i32,
                ..Default::default()
            }),
            capabilities: Some(v1::Capability {
                add_capabilities: vec!["SYS_PTRACE".into()],
                ..Default::default()
            }),
            ..Default::default()
        });
        c
    };
    let first = w
        .cri
        .run(&pod, in_pod("first", &["sleep", "4321"]), config.clone())
        .await?;
    let second = w.cri.run(&pod, in_pod("second", SLEEP), config).await?;
    let (_, out, _) = w.cri.exec(&second, &["ps"], 10).await?;
    assert!(
        out.contains("sleep 4321"),
        "the other container's processes are seen: {out}"
    );
    // A root container with SYS_PTRACE gets nothing out of pid 1.
    let script = "for f in exe root fd/0; do ls -l /proc/1/$f >/dev/null 2>&1 && readlink /proc/1/$f; done; cat /proc/1/environ | wc -c; ls /proc/1/root/ | wc -l; grep -E '^(CapEff|NoNewPrivs|Seccomp|Uid):' /proc/1/status";
    let (_, out, _) = w.cri.exec(&second, &["sh", "-c", script], 10).await?;
    assert!(out.contains("CapEff:\t0000000000000000"), "{out}");
    assert!(out.contains("NoNewPrivs:\t1"), "{out}");
    assert!(out.contains("Seccomp:\t2"), "{out}");
    assert!(!out.contains("Uid:\t0\t"), "{out}");
    let (_, out, _) = w.cri.exec(&second, &["cat", "/proc/1/oom_score_adj"], 10).await?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:\t"));
    let may_lower = u64::from_str_radix(effective.expect("capabilities"), 16)? & 1 << 24 != 0;
    assert_eq!(out.trim(), if may_lower { "-998" } else { "500" });
    w.cri.stop(&first, 1).await?;
    w.finish().await
}

#[tokio::test]
async fn a_port_mapping_reaches_the_container_from_the_host() -> Result<()> {
    let w = World::new("pod-port").await?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut config = pod_config("port", &w.lab, false);
    config.port_mappings = vec![v1::PortMapping {
        protocol: 0,
        container_port: 8080,
        host_port: i32::from(port),
        host_ip: String::new(),
    }];
    let pod = w.cri.run_pod(config.clone()).await?;
    let serve = "while true; do echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nhello' | nc -l -p 8080; done";
    w.cri
        .run(
            &pod,
            container_config("main", BUSYBOX, &["sh", "-c", serve]),
            config,
        )
        .await?;
    let answer = ask(port).await?;
    assert!(answer.contains("hello"), "{answer:?}");
    w.finish().await
}

/// What the server behind a port of this host says; asked again for a few seconds, until it is up.
async fn ask(port: u16) -> Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut last = anyhow::anyhow!("not asked");
    for _ in 0..20 {
        let once = async {
            let mut s = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
            s.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
            let mut answer = Vec::new();
            s.read_to_end(&mut answer).await?;
            anyhow::ensure!(!answer.is_empty(), "an empty answer");
            anyhow::Ok(String::from_utf8_lossy(&answer).into_owned())
        };
        match tokio::time::timeout(std::time::Duration::from_secs(3), once).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(e)) => last = e,
            Err(_) => last = anyhow::anyhow!("no answer within 3 s"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    Err(last)
}

#[tokio::test]
async fn twenty_pods_at_once_go_up_and_down_five_times() -> Result<()> {
    let w = World::new("pod-20").await?;
    for round in 0..5 {
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..20 {
            let (cri, config) = (w.cri.clone(), pod_config(&format!("p{round}-{n}"), &w.lab, false));
            tasks.spawn(async move {
                let pod = cri.run_pod(config.clone()).await?;
                cri.run(&pod, container_config("main", BUSYBOX, SLEEP), config)
                    .await?;
                anyhow::Ok(pod)
            });
        }
        let mut pods = Vec::new();
        while let Some(r) = tasks.join_next().await {
            pods.push(r??);
        }
        assert_eq!(pods.len(), 20);
        let mut tasks = tokio::task::JoinSet::new();
        for pod in pods {
            let cri = w.cri.clone();
            tasks.spawn(async move { cri.remove_pod(&pod).await });
        }
        while let Some(r) = tasks.join_next().await {
            r??;
        }
        assert!(w.cri.pods().await?.is_empty());
    }
    w.finish().await
}

#[tokio::test]
async fn the_network_is_not_ready_without_a_configuration_and_is_when_one_appears() -> Result<()> {
    let w = World::with(
        "pod-nonet",
        &harness::Setup {
            no_network: true,
            ..Default::default()
        },
    )
    .await?;
    let network = async || -> Result<v1::RuntimeCondition> {
        let s = w
            .cri
            .runtime
            .clone()
            .status(v1::StatusRequest { verbose: true })
            .await?
            .into_inner();
        let c = s.status.expect("a status").conditions;
        Ok(c.into_iter()
            .find(|c| c.r#type == "NetworkReady")
            .expect("NetworkReady"))
    };
    let c = network().await?;
    assert!(
        !c.status && !c.reason.is_empty() && !c.message.is_empty(),
        "{c:?}"
    );
    let e = w
        .cri
        .run_pod(pod_config("early", &w.lab, false))
        .await
        .expect_err("no network");
    assert!(format!("{e:#}").contains("network"), "{e:#}");
    w.lab.write_cni_config()?;
    assert!(network().await?.status);
    let pod = w.cri.run_pod(pod_config("early", &w.lab, false)).await?;
    w.cri.remove_pod(&pod).await?;
    w.finish().await
}

#[tokio::test]
async fn cve_2022_0811_a_sysctl_that_smuggles_another_is_refused() -> Result<()> {
    let w = World::new("pod-sysctl").await?;
    for (key, value) in [
        ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x"),
        ("net.ipv4.ip_forward\nkernel.core_pattern", "1"),
        ("kernel.core_pattern", "|/x"),
    ] {
        let mut config = pod_config("evil", &w.lab, false);
        config.linux.as_mut().expect("linux").sysctls = HashMap::from([(key.into(), value.into())]);
        let e = w.cri.run_pod(config).await.expect_err("refused");
        let code = e.downcast_ref::<tonic::Status>().map(tonic::Status::code);
        assert_eq!(code, Some(tonic::Code::InvalidArgument), "{e:#}");
    }
    assert!(w.cri.pods().await?.is_empty());
    w.finish().await
}
