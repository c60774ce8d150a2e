//! The cluster's networks on one machine: a bridge that joins the nodes, a pod subnet a node, and routes between them.
//!
//! ```text
//! host ── bridge NAME (nodes .1, the DNS server, the API server) ── veth ── netns NAME-2 (node2, .2)
//!   └ NAME-p1: pods of node1                                                 └ NAME-p2: pods of node2
//! ```

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cmd::sh;

/// The first address of the Services' network, which is the API server's.
pub const API_SERVICE: &str = "10.96.0.1";

/// Addresses and names: all of them in one network of 1,022 addresses.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Net {
    /// Begins the names of links and network namespaces, and is the cgroups'; 8 characters at most.
    pub name: String,
    /// "10.x.y" with y a multiple of four: the nodes' addresses, the host's being .1; the pods' of node n are 10.x.(y+n).
    pub base: (u8, u8),
    /// How many nodes, 1 to 3.
    pub count: usize,
}

impl Net {
    fn third(&self, n: usize) -> String {
        let y = usize::from(self.base.1 & !3) + n;
        format!("10.{}.{y}", self.base.0)
    }

    /// Every address of the cluster.
    fn all(&self) -> String {
        format!("{}.0/22", self.third(0))
    }

    /// The pods of node `n` (from 1).
    pub fn pods(&self, n: usize) -> String {
        format!("{}.0/24", self.third(n))
    }

    /// The address of node `n` (from 1).
    pub fn node(&self, n: usize) -> String {
        format!("{}.{n}", self.third(0))
    }

    /// Node `n`'s network namespace; `None`: the host's.
    pub fn netns(&self, n: usize) -> Option<String> {
        (n > 1).then(|| format!("{}-{n}", self.name))
    }

    /// The bridge of node `n`'s pods.
    pub fn bridge(&self, n: usize) -> String {
        format!("{}-p{n}", self.name)
    }

    /// What comes before a command line that is to run in node `n`'s network; empty on the host, and where that network is
    /// gone already.
    pub fn inside(&self, n: usize) -> Vec<String> {
        // Not `ip netns exec`, which hides /sys/fs/cgroup.
        self.netns(n)
            .map(|ns| format!("/run/netns/{ns}"))
            .filter(|path| Path::new(path).exists())
            .map_or_else(Vec::new, |path| vec!["nsenter".into(), format!("--net={path}")])
    }

    /// Lets pods out under the host's address; within the cluster every pod keeps its own.
    fn masquerade(&self, change: &str) -> String {
        let all = self.all();
        format!(
            "iptables -w -t nat {change} POSTROUTING -s {all} ! -d {all} -m comment --comment {} -j MASQUERADE",
            self.name
        )
    }

    /// There is no kube-proxy: what pods send to the Service `kubernetes`, whose address they are told, goes to the API server.
    fn api_service(&self, change: &str, port: u16) -> String {
        let (all, host) = (self.all(), self.node(1));
        format!(
            "iptables -w -t nat {change} PREROUTING -s {all} -d {API_SERVICE} -p tcp --dport 443 -m comment --comment {} -j DNAT --to-destination {host}:{port}",
            self.name
        )
    }

    /// Makes bridges, namespaces, routes, the rule that lets pods out, and the one that leads them to the API server's `port`.
    ///
    /// # Errors
    /// `ip` or `iptables` fails; what was made is left for [`Net::down`].
    pub fn up(&self, port: u16) -> Result<()> {
        let (name, host) = (&self.name, self.node(1));
        sh(&format!(
            "ip link add {name} type bridge && ip addr add {host}/24 dev {name} && ip link set {name} up"
        ))?;
        for n in 2..=self.count {
            let (ns, address) = (self.netns(n).unwrap_or_default(), self.node(n));
            sh(&format!(
                "ip netns add {ns} && ip link add {name}-v{n} type veth peer name eth0 netns {ns} \
                 && ip link set {name}-v{n} master {name} up && ip route add {} via {address}",
                self.pods(n)
            ))?;
            let inside = self.inside(n).join(" ");
            sh(&format!(
                "{inside} sh -ec 'ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up; \
                 ip route add default via {host}; echo 1 > /proc/sys/net/ipv4/ip_forward'"
            ))?;
        }
        sh("echo 1 > /proc/sys/net/ipv4/ip_forward")?;
        sh(&self.masquerade("-A"))?;
        sh(&self.api_service("-A", port))?;
        Ok(())
    }

    /// Removes all of it; silent where it is gone.
    pub fn down(&self, port: u16) {
        for n in 2..=self.count {
            let ns = self.netns(n).unwrap_or_default();
            if Path::new("/run/netns").join(&ns).exists() {
                let _ = sh(&format!("ip netns del {ns}"));
            }
        }
        for link in self.links() {
            let _ = sh(&format!("ip link del {link}"));
        }
        for rule in [self.masquerade("-D"), self.api_service("-D", port)] {
            let _ = sh(&format!("{rule} 2>/dev/null || true"));
        }
    }

    /// The links in this process's network that are this cluster's.
    pub fn links(&self) -> Vec<String> {
        let ours = |l: &&str| *l == self.name || l.starts_with(&format!("{}-", self.name));
        // Not /sys/class/net, which is of the network in which it was mounted.
        let links = sh("ip -o link").unwrap_or_default();
        links
            .lines()
            .filter_map(|l| l.split(": ").nth(1))
            .map(|l| l.split('@').next().unwrap_or(l))
            .filter(ours)
            .map(str::to_owned)
            .collect()
    }

    /// Whether a firewall rule is this cluster's: our comment, or a plugin's that names a node's network.
    pub fn names_us(&self, rule: &str) -> bool {
        rule.contains(&format!("--comment {} ", self.name)) || rule.contains(&format!("{}-pods", self.name))
    }

    /// Writes node `n`'s conflist into `dir`.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn write_cni(&self, n: usize, dir: &Path, ipam: &Path) -> Result<()> {
        let conf = serde_json::json!({
            "cniVersion": "1.0.0",
            "name": format!("{}-pods{n}", self.name),
            "plugins": [
                { "type": "bridge", "bridge": self.bridge(n), "isGateway": true, "hairpinMode": true,
                  "ipam": { "type": "host-local", "dataDir": ipam,
                            "ranges": [[{ "subnet": self.pods(n) }]],
                            "routes": [{ "dst": "0.0.0.0/0" }] } },
                { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }
            ]
        });
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("10-pods.conflist"), serde_json::to_vec_pretty(&conf)?)
            .with_context(|| format!("writing below {}", dir.display()))
    }
}
