//! `make cluster` and `make cluster-down`: the program behind them, as somebody runs it who knows nothing else of it.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a panic is how a test says no")]

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::cmd::{self, Output, sh};
use harness::leftovers;

/// What clusters change of the machine, and note while one is up.
const NOTED: &str = "/run/slipway-clusters.json";
const FOLDERS: [&str; 2] = ["/var/lib/kubelet/device-plugins", "/var/log/containers"];
/// Written by kubelet at its start, and nothing depends on it that is not about to panic.
const SETTING: &str = "/proc/sys/kernel/panic";

/// A network of the test's own, so that no port and no firewall rule is anybody else's.
struct Network {
    name: String,
}

impl Network {
    fn new() -> Result<Network> {
        let name = format!("c{:x}", std::process::id());
        sh(&format!("ip netns add {name}"))?;
        let network = Network { name };
        network.sh("ip link set lo up; echo 0 > /proc/sys/net/ipv4/ip_forward")?;
        Ok(network)
    }

    fn run(&self, program: impl AsRef<Path>, args: &[&str]) -> Result<Output> {
        let mut c = cmd::command("nsenter", [format!("--net=/run/netns/{}", self.name)]);
        c.arg(program.as_ref()).args(args).env("CLUSTER_NAME", &self.name);
        cmd::run(&mut c, Duration::from_secs(240))
    }

    fn sh(&self, line: &str) -> Result<String> {
        let o = self.run("sh", &["-ec", line])?;
        Ok(o.ok().with_context(|| line.to_owned())?.stdout)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = sh(&format!("ip netns del {}", self.name));
    }
}

/// The machine as clusters might change it, outside any network.
fn machine() -> Vec<String> {
    let mut all: Vec<String> = FOLDERS
        .iter()
        .map(|f| format!("{f}: {}", Path::new(f).exists()))
        .collect();
    let settings = "kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes vm.overcommit_memory vm.panic_on_oom";
    all.push(sh(&format!("sysctl {settings}")).unwrap_or_default());
    all
}

const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  containers:
  - {name: main, image: busybox-of-nobody:1, ports: [{containerPort: 80, hostPort: 18080}]}
"#;

#[test]
fn a_cluster_comes_up_as_it_says_and_goes_without_a_trace() -> Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_cluster"));
    let dir = tempfile::Builder::new()
        .prefix("slipway-cluster-test-")
        .tempdir_in("/var/tmp")?;
    let at = dir.path().join("c");
    let at = at.to_str().context("a path in UTF-8")?;
    let network = Network::new()?;
    let others = Path::new(NOTED).exists();
    let was = std::fs::read_to_string(SETTING)?;
    if !others {
        // Kubelet sets 10.
        std::fs::write(SETTING, "7")?;
    }
    let before = machine();
    let result = up_and_down(program, at, &network);
    if result.is_err() {
        let _ = network.run(program, &["down", at]);
    }
    let after = machine();
    let noted = Path::new(NOTED).exists();
    if !others {
        std::fs::write(SETTING, was.trim())?;
    }
    result?;
    if !others {
        assert_eq!(after, before);
        assert!(!noted, "{NOTED} is left");
    }
    Ok(())
}

fn up_and_down(program: &Path, at: &str, network: &Network) -> Result<()> {
    let up = network.run(program, &["up", at, "2"])?.ok()?;
    let said: Vec<&str> = up.stdout.lines().collect();
    let exports: Vec<&str> = said
        .iter()
        .copied()
        .filter(|l| l.starts_with("export "))
        .collect();
    ensure!(
        up.stdout.contains("2 nodes Ready after")
            && matches!(exports[..], [k, p] if k.starts_with("export KUBECONFIG=") && p.starts_with("export PATH=")),
        "{}",
        up.stdout
    );
    // The lines as they are copied, into a shell that knows nothing.
    let nodes = network.sh(&format!("{}\nkubectl get nodes --no-headers", exports.join("\n")))?;
    let ready = nodes.lines().filter(|l| l.contains(" Ready ")).count();
    ensure!(ready == 2 && nodes.lines().count() == 2, "{nodes}");
    // A pod with a port of the node's: the plugin makes its chains for it.
    let pod = format!(
        "{}\nkubectl wait --for=create --timeout=60s serviceaccount/default\nkubectl apply -f - <<'END'\n{POD}\nEND",
        exports.join("\n")
    );
    network.sh(&pod)?;
    let began = std::time::Instant::now();
    while !network.sh("iptables-save -t nat")?.contains("CNI-HOSTPORT-DNAT") {
        ensure!(
            began.elapsed() < Duration::from_secs(60),
            "no host port after a minute"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    let again = network.run(program, &["up", at, "2"])?;
    ensure!(
        again.code != 0 && again.stderr.contains("make cluster-down"),
        "{again:?}"
    );

    let down = network.run(program, &["down", at])?.ok()?;
    ensure!(down.stdout.contains("nothing is left"), "{}", down.stdout);
    let name = &network.name;
    let mut left: Vec<String> = leftovers::processes_naming(Path::new(at))
        .into_iter()
        .map(|(pid, line)| format!("process {pid}: {line}"))
        .collect();
    left.extend(leftovers::mounts_under(Path::new(at)));
    left.extend(leftovers::cgroups_named(name));
    let links = network.sh("ip -o link")?;
    left.extend(links.lines().filter(|l| !l.contains(" lo: ")).map(str::to_owned));
    let rules = network.sh("iptables-save")?;
    left.extend(
        rules
            .lines()
            .filter(|l| l.starts_with("-A") || l.starts_with(":CNI"))
            .map(str::to_owned),
    );
    let files = [at.to_owned(), format!("/run/netns/{name}-2")];
    left.extend(files.into_iter().filter(|f| Path::new(f).exists()));
    let forward = network.sh("cat /proc/sys/net/ipv4/ip_forward")?;
    ensure!(
        left.is_empty() && forward.trim() == "0",
        "left: {left:#?}, ip_forward {forward}"
    );
    let again = network.run(program, &["down", at])?.ok()?;
    ensure!(again.stdout.contains("no cluster is up"), "{}", again.stdout);
    Ok(())
}
