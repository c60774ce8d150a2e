//! What a caller wants networked: a pod, its namespace and the arguments that CNI plugins take.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::CniError;

/// The pod (or build stage) to connect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNetwork {
    /// CNI_CONTAINERID: the pod sandbox's id.
    pub id: String,
    /// K8S_POD_NAME.
    pub name: String,
    /// K8S_POD_NAMESPACE.
    pub namespace: String,
    /// K8S_POD_UID.
    pub uid: String,
    /// The pinned network namespace.
    pub netns: PathBuf,
    /// For plugins with the `portMappings` capability; those without a host port are left out.
    pub port_mappings: Vec<PortMapping>,
    /// For plugins with the `bandwidth` capability.
    pub bandwidth: Option<Bandwidth>,
    /// For plugins with the `dns` capability.
    pub dns: Option<Dns>,
    /// For plugins with the `aliases` capability.
    pub aliases: Vec<String>,
    /// For plugins with the `ips` capability: addresses wanted, with or without a prefix length.
    pub ips: Vec<String>,
    /// For plugins with the `mac` capability.
    pub mac: Option<String>,
    /// For plugins with the `cgroupPath` capability.
    pub cgroup_path: Option<String>,
    /// For plugins with the `io.kubernetes.cri.pod-annotations` capability.
    pub annotations: BTreeMap<String, String>,
}

/// One port of the host led to one of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port on the host; 0: not mapped.
    pub host_port: u16,
    /// Port in the pod.
    pub container_port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// Address of the host to listen on; empty: all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Traffic limits, in bits per second and bits; zero: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Bandwidth {
    /// Into the pod.
    pub ingress_rate: u64,
    /// Into the pod, burst.
    pub ingress_burst: u64,
    /// Out of the pod.
    pub egress_rate: u64,
    /// Out of the pod, burst.
    pub egress_burst: u64,
}

/// Resolver settings, as CNI spells them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain (results only).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search list. The capability argument calls it `searches`, results `search`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl PodNetwork {
    /// CNI_ARGS: who the pod is, in Kubernetes' words. Plugins that do not know them are told to
    /// pass over them.
    pub(crate) fn cni_args(&self) -> Result<String, CniError> {
        let mut args = String::from("IgnoreUnknown=1");
        let pairs = [
            ("K8S_POD_NAMESPACE", &self.namespace),
            ("K8S_POD_NAME", &self.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &self.id),
            ("K8S_POD_UID", &self.uid),
        ];
        for (key, value) in pairs.into_iter().filter(|(_, v)| !v.is_empty()) {
            if value.contains([';', '=']) || value.chars().any(char::is_control) {
                let reason = "has characters that CNI_ARGS cannot carry";
                return Err(CniError::Argument {
                    what: key,
                    value: value.clone(),
                    reason,
                });
            }
            args.push_str(&format!(";{key}={value}"));
        }
        Ok(args)
    }

    /// Arguments by the capability that a plugin must declare to get them.
    pub(crate) fn capability_args(&self) -> Map<String, Value> {
        let mut args = Map::new();
        let mut give = |name: &str, value: Value, given: bool| {
            if given {
                args.insert(name.to_owned(), value);
            }
        };
        let ports: Vec<&PortMapping> = self.port_mappings.iter().filter(|p| p.host_port != 0).collect();
        give("portMappings", json!(ports), !ports.is_empty());
        give("bandwidth", json!(self.bandwidth), self.bandwidth.is_some());
        if let Some(dns) = &self.dns {
            let value = json!({"servers": dns.nameservers, "searches": dns.search, "options": dns.options});
            give("dns", value, true);
        }
        give("aliases", json!(self.aliases), !self.aliases.is_empty());
        give("ips", json!(self.ips), !self.ips.is_empty());
        give("mac", json!(self.mac), self.mac.is_some());
        give("cgroupPath", json!(self.cgroup_path), self.cgroup_path.is_some());
        give(
            "io.kubernetes.cri.pod-annotations",
            json!(self.annotations),
            !self.annotations.is_empty(),
        );
        args
    }
}

impl Bandwidth {
    /// Kubernetes' annotations, as quantities of bits per second.
    const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
    const EGRESS: &str = "kubernetes.io/egress-bandwidth";

    /// Reads a pod's bandwidth annotations; `None` when it has none.
    ///
    /// # Errors
    /// A value that is no quantity, or is outside 1k to 1P, Kubernetes' bounds.
    pub fn from_annotations(annotations: &BTreeMap<String, String>) -> Result<Option<Bandwidth>, CniError> {
        let rate = |key: &'static str| match annotations.get(key) {
            None => Ok(0),
            Some(text) => quantity(text)
                .filter(|n| (1_000..=1_000_000_000_000_000).contains(n))
                .ok_or_else(|| CniError::Argument {
                    what: key,
                    value: text.clone(),
                    reason: "is not a rate between 1k and 1P",
                }),
        };
        let (ingress_rate, egress_rate) = (rate(Self::INGRESS)?, rate(Self::EGRESS)?);
        // The plugin wants a burst with each rate; this is what other runtimes give it.
        let burst = |rate: u64| if rate == 0 { 0 } else { u64::from(u32::MAX) };
        let found = ingress_rate > 0 || egress_rate > 0;
        Ok(found.then(|| Bandwidth {
            ingress_rate,
            ingress_burst: burst(ingress_rate),
            egress_rate,
            egress_burst: burst(egress_rate),
        }))
    }
}

/// A whole Kubernetes quantity: "10M", "1.5G", "1Gi", "1000".
fn quantity(text: &str) -> Option<u64> {
    const SUFFIXES: [(&str, u64); 12] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("Pi", 1 << 50),
        ("k", 1_000),
        ("K", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("P", 1_000_000_000_000_000),
        ("", 1),
    ];
    let (suffix, unit) = SUFFIXES.iter().find(|(s, _)| text.ends_with(s))?;
    let digits = &text[..text.len() - suffix.len()];
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let sound = |s: &str| s.bytes().all(|b| b.is_ascii_digit()) && s.len() <= 15;
    if whole.is_empty() && part.is_empty() || !sound(whole) || !sound(part) {
        return None;
    }
    let whole = if whole.is_empty() {
        0
    } else {
        whole.parse::<u128>().ok()?
    };
    let part_value = if part.is_empty() {
        0
    } else {
        part.parse::<u128>().ok()?
    };
    let unit = u128::from(*unit);
    let scale = 10u128.pow(u32::try_from(part.len()).ok()?);
    u64::try_from(whole * unit + part_value * unit / scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cni_args_say_who_the_pod_is_and_refuse_what_would_break_out() {
        let mut pod = PodNetwork {
            id: "abc".into(),
            name: "web-0".into(),
            namespace: "default".into(),
            ..PodNetwork::default()
        };
        assert_eq!(
            pod.cni_args().unwrap(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=abc"
        );
        pod.name = "a;K8S_POD_NAMESPACE=kube-system".into();
        assert!(pod.cni_args().is_err());
    }

    #[test]
    fn only_ports_with_a_host_port_are_mapped_and_spelled_as_the_plugin_reads_them() {
        let port = |host_port, protocol, host_ip: &str| PortMapping {
            host_port,
            container_port: 80,
            protocol,
            host_ip: host_ip.into(),
        };
        let pod = PodNetwork {
            port_mappings: vec![
                port(0, Protocol::Tcp, ""),
                port(8080, Protocol::Udp, "127.0.0.1"),
                port(81, Protocol::Tcp, ""),
            ],
            ..PodNetwork::default()
        };
        let expected = json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "127.0.0.1"},
            {"hostPort": 81, "containerPort": 80, "protocol": "tcp"}]);
        assert_eq!(pod.capability_args()["portMappings"], expected);
        assert!(PodNetwork::default().capability_args().is_empty());
    }

    #[test]
    fn bandwidth_annotations_are_quantities_within_kubernetes_bounds() {
        let read = |text: &str| {
            Bandwidth::from_annotations(&[(Bandwidth::INGRESS.to_owned(), text.to_owned())].into())
                .map(|b| b.map(|b| b.ingress_rate))
        };
        assert_eq!(read("10M").unwrap(), Some(10_000_000));
        assert_eq!(read("1.5G").unwrap(), Some(1_500_000_000));
        assert_eq!(read("1Gi").unwrap(), Some(1 << 30));
        assert_eq!(read("5000").unwrap(), Some(5000));
        for bad in ["", "M", "-1M", "999", "2P", "1e6", "ten", "1.M.2"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(Bandwidth::from_annotations(&BTreeMap::new()).unwrap(), None);
    }
}
