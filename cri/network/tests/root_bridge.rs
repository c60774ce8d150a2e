//! The standard plugins for real: a bridge, addresses from host-local, mapped ports. Needs root,
//! iptables and the plugins; makes a bridge and a subnet of its own and leaves nothing.

#![allow(clippy::unwrap_used, reason = "a failing step ends the test")]

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use slipway_network::{Attachment, Cni, NetworkStatus, PodNetwork, PortMapping, Protocol, netns};

/// Where the plugins are: Debian's, or those of `SLIPWAY_TEST_CNI`.
fn plugins() -> PathBuf {
    std::env::var_os("SLIPWAY_TEST_CNI").map_or_else(|| "/usr/lib/cni".into(), PathBuf::from)
}

/// A network of its own, taken away with whatever is left of it.
struct Lab {
    dir: tempfile::TempDir,
    bridge: String,
    octet: u32,
    cni: Cni,
}

impl Lab {
    /// `None`, loudly, where these tests cannot run.
    fn new(tag: u32) -> Option<Lab> {
        let have = ["bridge", "host-local", "portmap"]
            .iter()
            .all(|p| plugins().join(p).is_file());
        let root = rustix::process::geteuid().is_root();
        let iptables = Command::new("iptables")
            .arg("-V")
            .output()
            .is_ok_and(|o| o.status.success());
        if !(have && root && iptables) {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: needs root ({root}), the CNI plugins in {} ({have}), iptables ({iptables})",
                plugins().display()
            );
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let pid = std::process::id();
        let octet = (pid * 4 + tag) % 250;
        let bridge = format!("swt{pid}x{tag}");
        let conf = dir.path().join("net.d");
        fs::create_dir(&conf).unwrap();
        let cni = Cni::new(conf, vec![plugins()]);
        let lab = Lab {
            dir,
            bridge,
            octet,
            cni,
        };
        lab.configure(None);
        Some(lab)
    }

    fn configure(&self, ipv6: Option<&str>) {
        let mut ranges = vec![json!([{"subnet": format!("10.213.{}.0/24", self.octet)}])];
        let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
        if let Some(subnet) = ipv6 {
            ranges.push(json!([{"subnet": subnet}]));
            routes.push(json!({"dst": "::/0"}));
        }
        let list = json!({"cniVersion": "1.0.0", "name": self.network(), "plugins": [
            {"type": "bridge", "bridge": self.bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
             "ipam": {"type": "host-local", "dataDir": self.data(), "ranges": ranges, "routes": routes}},
            {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}]});
        fs::write(self.dir.path().join("net.d/10-lab.conflist"), list.to_string()).unwrap();
    }

    fn network(&self) -> String {
        format!("lab-{}", self.bridge)
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("ipam")
    }

    fn pod(&self, name: &str) -> PodNetwork {
        let netns = self.dir.path().join(name);
        netns::pin_new_net(&netns).unwrap();
        PodNetwork {
            id: format!("{}-{name}", self.bridge),
            name: name.into(),
            namespace: "default".into(),
            uid: "u".into(),
            netns,
            ..PodNetwork::default()
        }
    }

    /// Addresses that host-local holds as given away.
    fn reserved(&self) -> Vec<String> {
        let entries = fs::read_dir(self.data().join(self.network()))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names.filter(|n| n.parse::<IpAddr>().is_ok()).collect();
        names.sort();
        names
    }

    /// Firewall rules that speak of this network, its addresses or containers.
    fn rules(&self) -> Vec<String> {
        let own = [self.bridge.clone(), format!("10.213.{}.", self.octet)];
        let mut found = Vec::new();
        for (program, table) in [("iptables", "nat"), ("iptables", "filter"), ("ip6tables", "nat")] {
            let out = Command::new(program)
                .args(["-w", "-t", table, "-S"])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            found.extend(
                text.lines()
                    .filter(|l| own.iter().any(|o| l.contains(o)))
                    .map(str::to_owned),
            );
        }
        found
    }

    fn veths(&self) -> usize {
        fs::read_dir(format!("/sys/class/net/{}/brif", self.bridge)).map_or(0, Iterator::count)
    }

    fn assert_nothing_is_left(&self) {
        assert!(self.reserved().is_empty(), "addresses: {:?}", self.reserved());
        assert!(self.rules().is_empty(), "rules: {:#?}", self.rules());
        assert_eq!(self.veths(), 0, "interfaces on the bridge");
    }
}

/// The chains that portmap shares among all networks and never takes away.
struct SharedChains {
    made_here: bool,
}

impl SharedChains {
    const CHAINS: [&str; 3] = ["CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK"];

    fn nat(args: &[&str]) -> String {
        let out = Command::new("iptables")
            .args(["-w", "-t", "nat"])
            .args(args)
            .output()
            .unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn look() -> SharedChains {
        SharedChains {
            made_here: !Self::nat(&["-S"]).contains(Self::CHAINS[0]),
        }
    }
}

impl Drop for SharedChains {
    fn drop(&mut self) {
        let rules = Self::nat(&["-S"]);
        if !self.made_here || rules.contains("-A CNI-HOSTPORT-DNAT ") {
            return;
        }
        for rule in rules
            .lines()
            .filter(|l| Self::CHAINS.iter().any(|c| l.ends_with(&format!("-j {c}"))))
        {
            let words = shell_words(rule);
            let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
            words[0] = "-D";
            Self::nat(&words);
        }
        for chain in Self::CHAINS {
            Self::nat(&["-F", chain]);
            Self::nat(&["-X", chain]);
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            if netns::is_pinned(&entry.path()) {
                let _ = netns::unpin(&entry.path());
            }
        }
        let _ = Command::new("ip").args(["link", "del", &self.bridge]).output();
    }
}

fn addresses_inside(ns: &Path) -> String {
    let out = netns::in_netns(ns, || Command::new("ip").args(["-o", "addr", "show"]).output())
        .unwrap()
        .unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Serves one connection in the pod, answering with `answer`.
fn serve(ns: &Path, port: u16, answer: &'static str, times: usize) -> std::thread::JoinHandle<()> {
    let listener = netns::in_netns(ns, || {
        TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
    });
    let listener = listener.unwrap().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(times) {
            let _ = stream.unwrap().write_all(answer.as_bytes());
        }
    })
}

fn ask(to: SocketAddr) -> String {
    let mut text = String::new();
    let mut stream =
        TcpStream::connect_timeout(&to, Duration::from_secs(3)).unwrap_or_else(|e| panic!("{to}: {e}"));
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn root_a_pod_is_connected_reachable_checked_and_disconnected_without_a_trace() {
    let Some(lab) = Lab::new(0) else { return };
    let _shared = SharedChains::look();
    assert_eq!(
        lab.cni.status(),
        NetworkStatus::Ready {
            network: lab.network()
        }
    );
    let mut pod = lab.pod("web");
    let host_port = 20_000 + (std::process::id() % 20_000) as u16;
    pod.port_mappings = vec![PortMapping {
        host_port,
        container_port: 8080,
        protocol: Protocol::Tcp,
        host_ip: String::new(),
    }];

    let attachment = lab.cni.add(&pod).await.unwrap();
    let ip = attachment.ips[0];
    assert!(ip.to_string().starts_with(&format!("10.213.{}.", lab.octet)));
    let inside = addresses_inside(&pod.netns);
    assert!(
        inside.contains(&format!("inet {ip}/24")) && inside.contains("eth0"),
        "{inside}"
    );
    assert!(inside.contains("inet 127.0.0.1/8"), "loopback is down: {inside}");
    assert_eq!(lab.reserved(), [ip.to_string()]);
    let result = attachment.result().unwrap().unwrap();
    assert_eq!(
        result.ips[0].gateway.unwrap().to_string(),
        format!("10.213.{}.1", lab.octet)
    );

    let server = serve(&pod.netns, 8080, "hello from the pod", 3);
    assert_eq!(ask((ip, 8080).into()), "hello from the pod");
    let gateway: IpAddr = format!("10.213.{}.1", lab.octet).parse().unwrap();
    assert_eq!(ask((gateway, host_port).into()), "hello from the pod");
    assert_eq!(ask(([127, 0, 0, 1], host_port).into()), "hello from the pod");
    server.join().unwrap();

    lab.cni.del(&attachment).await.unwrap();
    lab.assert_nothing_is_left();
    lab.cni.del(&attachment).await.unwrap();
}

/// Without mapped ports: portmap 1.1.1 looks for IPv6 chains that it has not made.
#[tokio::test]
async fn root_check_finds_what_is_missing() {
    let Some(lab) = Lab::new(5) else { return };
    let pod = lab.pod("checked");
    let attachment = lab.cni.add(&pod).await.unwrap();
    lab.cni.check(&attachment).await.unwrap();
    let cut = netns::in_netns(&pod.netns, || {
        Command::new("ip").args(["addr", "flush", "dev", "eth0"]).status()
    });
    assert!(cut.unwrap().unwrap().success());
    lab.cni.check(&attachment).await.unwrap_err();
    lab.cni.del(&attachment).await.unwrap();
    remove_rules(&lab);
    lab.assert_nothing_is_left();
}

#[tokio::test]
async fn root_del_from_the_record_frees_the_address_when_namespace_and_configuration_are_gone() {
    let Some(lab) = Lab::new(1) else { return };
    let pod = lab.pod("gone");
    let attachment = lab.cni.add(&pod).await.unwrap();
    let record = serde_json::to_string(&attachment).unwrap();
    fs::remove_file(lab.dir.path().join("net.d/10-lab.conflist")).unwrap();
    netns::unpin(&pod.netns).unwrap();
    assert_eq!(lab.reserved().len(), 1);
    let kept: Attachment = serde_json::from_str(&record).unwrap();
    lab.cni.del(&kept).await.unwrap();
    assert!(lab.reserved().is_empty());
    // The plugin itself forgets its masquerade rules without a namespace: taken away here.
    remove_rules(&lab);
}

#[tokio::test]
async fn root_a_half_made_connection_is_undone() {
    let Some(lab) = Lab::new(2) else { return };
    if !plugins().join("tuning").is_file() {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: no tuning plugin in {}",
            plugins().display()
        );
        return;
    }
    let pod = lab.pod("half");
    let path = lab.dir.path().join("net.d/10-lab.conflist");
    // A third plugin that fails after bridge and host-local have done their part.
    let mut list: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let tuning = json!({"type": "tuning", "sysctl": {"net.no.such.setting": "1"}});
    list["plugins"].as_array_mut().unwrap().insert(1, tuning);
    fs::write(&path, list.to_string()).unwrap();
    let error = lab.cni.add(&pod).await.unwrap_err();
    assert!(error.to_string().contains("tuning"), "{error}");
    lab.assert_nothing_is_left();
    assert!(!addresses_inside(&pod.netns).contains("eth0"));
}

#[tokio::test]
async fn root_two_stacks_give_two_addresses() {
    let Some(lab) = Lab::new(3) else { return };
    if !Path::new("/proc/net/if_inet6").exists() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: no IPv6 here");
        return;
    }
    lab.configure(Some(&format!("fd00:213:{:x}::/64", std::process::id() % 0xffff)));
    let pod = lab.pod("dual");
    let attachment = lab.cni.add(&pod).await.unwrap();
    assert_eq!(
        attachment.ips.iter().map(IpAddr::is_ipv4).collect::<Vec<_>>(),
        [true, false]
    );
    assert!(addresses_inside(&pod.netns).contains(&attachment.ips[1].to_string()));
    lab.cni.del(&attachment).await.unwrap();
    lab.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_many_pods_at_once_get_addresses_of_their_own() {
    let Some(lab) = Lab::new(4) else { return };
    let pods: Vec<PodNetwork> = (0..8).map(|n| lab.pod(&format!("p{n}"))).collect();
    let mut tasks = Vec::new();
    for pod in pods {
        let cni = lab.cni.clone();
        tasks.push(tokio::spawn(async move { cni.add(&pod).await }));
    }
    let mut attachments = Vec::new();
    for task in tasks {
        attachments.push(task.await.unwrap().unwrap());
    }
    let mut ips: Vec<_> = attachments.iter().map(|a| a.ips[0]).collect();
    ips.sort();
    ips.dedup();
    assert_eq!(ips.len(), 8);
    for attachment in &attachments {
        lab.cni.del(attachment).await.unwrap();
    }
    lab.assert_nothing_is_left();
}

/// Takes away the rules that mention this lab, chains and jumps.
fn remove_rules(lab: &Lab) {
    for rule in lab.rules() {
        let words: Vec<String> = shell_words(&rule);
        if let Some(chain) = words
            .iter()
            .position(|w| w == "-j")
            .and_then(|at| words.get(at + 1))
            && rule.starts_with("-A POSTROUTING")
        {
            let mut delete = words.clone();
            "-D".clone_into(&mut delete[0]);
            let run = |args: &[String]| {
                Command::new("iptables")
                    .args(["-w", "-t", "nat"])
                    .args(args)
                    .output()
            };
            let _ = run(&delete);
            let _ = run(&["-F".to_owned(), chain.clone()]);
            let _ = run(&["-X".to_owned(), chain.clone()]);
        }
    }
    assert!(lab.rules().is_empty(), "{:#?}", lab.rules());
}

/// Splits a line of `iptables -S`: words, some in double quotes with escaped quotes.
fn shell_words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
    for c in line.chars() {
        match c {
            c if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            c => word.push(c),
        }
    }
    words.push(word);
    words
}
