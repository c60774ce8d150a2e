//! Pod sandboxes over the CRI: what RunPodSandbox honours, what listing filters, what stop and remove leave.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use anyhow::Result;
use harness::cri::{container_config, pod_config};
use harness::daemon::{Daemon, Setup};
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
    linux.sysctls = BTreeMap::from([
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
        config.labels = BTreeMap::from([("tier".into(), tier.into())]);
        config.annotations = BTreeMap::from([("note".into(), format!("of {name}"))]);
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
    let label = BTreeMap::from([("tier".to_owned(), "back".to_owned())]);
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
        config.linux.as_mut().expect("linux").sysctls = BTreeMap::from([(key.into(), value.into())]);
        let e = w.cri.run_pod(config).await.expect_err("refused");
        let code = e.downcast_ref::<tonic::Status>().map(tonic::Status::code);
        assert_eq!(code, Some(tonic::Code::InvalidArgument), "{e:#}");
    }
    assert!(w.cri.pods().await?.is_empty());
    w.finish().await
}

/// A block device of the test's own.
struct Disk {
    node: String,
    number: String,
}

impl Disk {
    fn new(lab: &harness::Lab) -> Result<Disk> {
        let file = lab.join("disk");
        std::fs::File::create(&file)?.set_len(8 << 20)?;
        let node = harness::cmd::sh(&format!("losetup --find --show '{}'", file.display()))?;
        let node = node.trim().to_owned();
        let name = node.trim_start_matches("/dev/");
        let number = std::fs::read_to_string(format!("/sys/block/{name}/dev"))?;
        Ok(Disk {
            number: number.trim().to_owned(),
            node,
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(e) = harness::cmd::sh(&format!("losetup -d {}", self.node)) {
            eprintln!("{} stays: {e:#}", self.node);
        }
    }
}

#[tokio::test]
async fn block_io_classes_limit_the_devices_that_they_name() -> Result<()> {
    let lab = harness::Lab::new("pod-blockio")?;
    let disk = Disk::new(&lab)?;
    let classes = format!(
        "Classes:\n  slow:\n  - Devices: ['{}[0-9]', '{}', /dev/not-there*]\n    ThrottleReadBps: 1Mi\n    ThrottleWriteIOPS: 5k\n  heavy:\n  - Weight: 500\n    Devices: [{}]\n",
        disk.node, disk.node, disk.node
    );
    let file = lab.write("blockio.yaml", &classes)?;
    harness::image::busybox(&lab)?;
    let setup = Setup {
        config: format!("[runtime]\nblockio_config_file = {file:?}\n"),
        ..Setup::default()
    };
    let daemon = Daemon::start(&lab, &setup).await?;
    let cri = daemon.cri().await?;
    let w = World { lab, daemon, cri };

    let of = "blockio.resources.beta.kubernetes.io";
    let mut config = pod_config("io", &w.lab, true);
    config.annotations = BTreeMap::from([
        (format!("{of}/pod"), "slow".into()),
        (format!("{of}/container.free"), String::new()),
        (format!("{of}/container.heavy"), "heavy".into()),
        (format!("{of}/container.odd"), "fast".into()),
    ]);
    let pod = w.cri.run_pod(config.clone()).await?;
    let with_disk = |name: &str| {
        let mut c = container_config(name, BUSYBOX, SLEEP);
        c.devices = vec![v1::Device {
            container_path: "/dev/disk".into(),
            host_path: disk.node.clone(),
            permissions: "r".into(),
        }];
        c
    };
    let slow = w.cri.run(&pod, with_disk("slow"), config.clone()).await?;
    let read = "dd if=/dev/disk of=/dev/null bs=64k count=48 2>&1";
    let began = std::time::Instant::now();
    let (code, out, _) = w.cri.exec(&slow, &["sh", "-c", read], 60).await?;
    let took = began.elapsed();
    assert_eq!(code, 0, "{out}");
    // 3 MiB, of which the kernel may let the first tenths of a second through.
    assert!(took.as_secs_f64() > 2.0, "3 MiB at 1 MiB/s took {took:?}");
    let files = "cd /sys/fs/cgroup; [ -e io.max ] && cat io.max || cat blkio/blkio.throttle.read_bps_device blkio/blkio.throttle.write_iops_device";
    let (_, out, _) = w.cri.exec(&slow, &["sh", "-c", files], 10).await?;
    let want = [format!("{} 1048576\n{} 5000\n", disk.number, disk.number)];
    let v2 = ["rbps=1048576", "wiops=5000"].iter().all(|w| out.contains(w));
    assert!(want.contains(&out) || v2, "{out:?}");

    // The container's own annotation goes before the pod's.
    let free = w.cri.run(&pod, with_disk("free"), config.clone()).await?;
    let (_, out, _) = w.cri.exec(&free, &["sh", "-c", files], 10).await?;
    assert_eq!(out, "", "a container of no class");

    // What is not there is said, by its name.
    let refused = async |name: &str| {
        let made = w.cri.create(&pod, with_disk(name), config.clone()).await;
        format!("{:#}", made.expect_err("it is refused")).replace('\\', "")
    };
    let error = refused("odd").await;
    assert!(
        error.contains("config.annotations")
            && error.contains("\"fast\"")
            && error.contains("[\"heavy\", \"slow\"]"),
        "{error}"
    );
    // Loop devices have no IO scheduler that knows weights until somebody gives them one.
    let error = refused("heavy").await;
    assert!(
        error.contains("blockIO.weightDevice") && error.contains(&disk.number) && error.contains("BFQ"),
        "{error}"
    );
    let queue = format!(
        "/sys/block/{}/queue/scheduler",
        disk.node.trim_start_matches("/dev/")
    );
    if std::fs::read_to_string(&queue)?.contains("bfq") {
        std::fs::write(&queue, "bfq")?;
        let heavy = w.cri.run(&pod, with_disk("heavy"), config.clone()).await?;
        let weight =
            "cat /sys/fs/cgroup/blkio/blkio.bfq.weight_device /sys/fs/cgroup/io.bfq.weight 2>/dev/null";
        let (_, out, _) = w.cri.exec(&heavy, &["sh", "-c", weight], 10).await?;
        assert!(out.contains(&format!("{} 500", disk.number)), "{out:?}");
        w.cri.remove(&heavy).await?;
        std::fs::write(&queue, "none")?;
    } else {
        println!("this kernel has no BFQ: weights are not tried");
    }
    w.cri.remove_pod(&pod).await?;
    drop(disk);
    w.finish().await
}

#[tokio::test]
async fn a_block_io_class_without_a_file_of_classes_is_refused() -> Result<()> {
    let w = World::new("pod-noblockio").await?;
    let mut c = container_config("main", BUSYBOX, SLEEP);
    c.annotations = BTreeMap::from([("io.kubernetes.cri.blockio-class".into(), "slow".into())]);
    let made = w.pod_with("none", c).await;
    let error = format!("{:#}", made.expect_err("it is refused")).replace('\\', "");
    assert!(
        error.contains("\"slow\"") && error.contains("runtime.blockio_config_file"),
        "{error}"
    );
    w.finish().await
}
