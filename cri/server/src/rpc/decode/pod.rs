//! A pod's configuration.

use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use slipway_cri_api::v1;

use super::security::{pod_security, scope, user_namespace};
use super::{
    Invalid, bounded_map, invalid, name, optional_absolute, path_length, resources, shown, unknown_enum,
};
use crate::config::Runtime;
use crate::model::{Dns, PodConfig, PodMetadata, PodNamespaces, PortMapping, Protocol, Scope};

/// A whole RunPodSandbox request.
pub fn pod_config(
    config: Option<v1::PodSandboxConfig>,
    runtime_handler: String,
    runtime: &Runtime,
) -> Result<PodConfig, Invalid> {
    let config = config.ok_or_else(|| invalid("config", "is missing"))?;
    if runtime.handler(&runtime_handler).is_none() {
        let known: Vec<&str> = runtime.handler_names().collect();
        let shown = shown(&runtime_handler);
        return Err(invalid(
            "runtime_handler",
            format!("{shown} is not known here; {known:?} are"),
        ));
    }
    let linux = config.linux.unwrap_or_default();
    let security = pod_security(linux.security_context.unwrap_or_default())?;
    Ok(PodConfig {
        metadata: pod_metadata(config.metadata)?,
        hostname: hostname(config.hostname)?,
        log_directory: log_directory(&config.log_directory)?,
        dns: config.dns_config.map(dns).transpose()?,
        port_mappings: port_mappings(config.port_mappings)?,
        labels: bounded_map("config.labels", config.labels)?,
        annotations: bounded_map("config.annotations", config.annotations)?,
        runtime_handler,
        cgroup_parent: cgroup_parent(linux.cgroup_parent)?,
        namespaces: pod_namespaces(security.namespace_options)?,
        privileged: security.privileged,
        sysctls: bounded_map("config.linux.sysctls", linux.sysctls)?,
        overhead: linux
            .overhead
            .map(|r| resources("config.linux.overhead", &r))
            .transpose()?,
        resources: linux
            .resources
            .map(|r| resources("config.linux.resources", &r))
            .transpose()?,
    })
}

/// The pod's configuration again, in a request about a container or an image of it: the pod is as it was run, whatever this says.
pub fn sandbox_config(config: Option<v1::PodSandboxConfig>) -> Result<(), Invalid> {
    let Some(config) = config else { return Ok(()) };
    let metadata = config.metadata.unwrap_or_default();
    name("sandbox_config.metadata.name", metadata.name)?;
    name("sandbox_config.metadata.uid", metadata.uid)?;
    name("sandbox_config.metadata.namespace", metadata.namespace)?;
    bounded_map("sandbox_config.labels", config.labels)?;
    bounded_map("sandbox_config.annotations", config.annotations)?;
    Ok(())
}

fn pod_metadata(metadata: Option<v1::PodSandboxMetadata>) -> Result<PodMetadata, Invalid> {
    let metadata = metadata.ok_or_else(|| invalid("config.metadata", "is missing"))?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "is empty"));
    }
    Ok(PodMetadata {
        name: name("config.metadata.name", metadata.name)?,
        uid: name("config.metadata.uid", metadata.uid)?,
        namespace: name("config.metadata.namespace", metadata.namespace)?,
        attempt: metadata.attempt,
    })
}

fn log_directory(text: &str) -> Result<Option<PathBuf>, Invalid> {
    const FIELD: &str = "config.log_directory";
    if text.chars().any(char::is_control) {
        return Err(invalid(FIELD, format!("{} has control characters", shown(text))));
    }
    optional_absolute(FIELD, text)
}

fn hostname(name: String) -> Result<String, Invalid> {
    // sethostname(2) takes 64 bytes; it becomes a line of /etc/hostname and /etc/hosts.
    if name.len() > 64
        || name
            .bytes()
            .any(|b| b.is_ascii_whitespace() || b.is_ascii_control() || b == b'/')
    {
        return Err(invalid(
            "config.hostname",
            format!("{} is too long, or has white space or a slash", shown(&name)),
        ));
    }
    Ok(name)
}

fn dns(config: v1::DnsConfig) -> Result<Dns, Invalid> {
    let one_word = |field: &'static str, values: &[String]| match values
        .iter()
        .find(|v| v.is_empty() || v.bytes().any(|b| b.is_ascii_whitespace() || b.is_ascii_control()))
    {
        Some(value) => Err(invalid(
            field,
            format!("{} would not be one word of resolv.conf", shown(value)),
        )),
        None => Ok(()),
    };
    // The file lies in memory.
    const LARGEST: usize = 64 << 10;
    let all = [&config.servers, &config.searches, &config.options];
    let size: usize = all.into_iter().flatten().map(|word| word.len() + 1).sum();
    if size > LARGEST {
        return Err(invalid(
            "config.dns_config",
            format!("{size} bytes, more than {LARGEST}"),
        ));
    }
    one_word("config.dns_config.servers", &config.servers)?;
    one_word("config.dns_config.searches", &config.searches)?;
    one_word("config.dns_config.options", &config.options)?;
    Ok(Dns {
        servers: config.servers,
        searches: config.searches,
        options: config.options,
    })
}

fn port_mappings(mappings: Vec<v1::PortMapping>) -> Result<Vec<PortMapping>, Invalid> {
    let mut checked = Vec::with_capacity(mappings.len());
    for mapping in mappings {
        let port = |field: &'static str, port: i32| {
            u16::try_from(port)
                .ok()
                .filter(|p| *p != 0)
                .ok_or_else(|| invalid(field, format!("{port} is no port")))
        };
        let protocol = match v1::Protocol::try_from(mapping.protocol) {
            Ok(v1::Protocol::Tcp) => Protocol::Tcp,
            Ok(v1::Protocol::Udp) => Protocol::Udp,
            Ok(v1::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => return Err(unknown_enum("config.port_mappings.protocol", mapping.protocol)),
        };
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| {
                invalid(
                    "config.port_mappings.host_ip",
                    format!("{} is no address", shown(text)),
                )
            })?),
        };
        let container_port = port("config.port_mappings.container_port", mapping.container_port)?;
        // Kubernetes lists every container port; only those with a host port are mapped.
        if mapping.host_port == 0 {
            continue;
        }
        checked.push(PortMapping {
            protocol,
            container_port,
            host_port: port("config.port_mappings.host_port", mapping.host_port)?,
            host_ip,
        });
    }
    Ok(checked)
}

fn cgroup_parent(parent: String) -> Result<Option<String>, Invalid> {
    if parent.is_empty() {
        return Ok(None);
    }
    let climbs = Path::new(&parent)
        .components()
        .any(|c| matches!(c, Component::ParentDir | Component::CurDir));
    if climbs || parent.bytes().any(|b| b.is_ascii_control()) {
        return Err(invalid(
            "config.linux.cgroup_parent",
            format!("{} is no cgroup path", shown(&parent)),
        ));
    }
    path_length("config.linux.cgroup_parent", &parent)?;
    Ok(Some(parent))
}

fn pod_namespaces(options: Option<v1::NamespaceOption>) -> Result<PodNamespaces, Invalid> {
    let options = options.unwrap_or_default();
    let network = scope("namespace_options.network", options.network)?;
    if network == Scope::Container {
        return Err(invalid(
            "namespace_options.network",
            "CONTAINER: a network is the pod's or the node's",
        ));
    }
    Ok(PodNamespaces {
        network,
        pid: scope("namespace_options.pid", options.pid)?,
        ipc: scope("namespace_options.ipc", options.ipc)?,
        user: user_namespace(options.userns_options)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::samples::pod_field;
    use super::*;

    #[test]
    fn ports_without_a_host_port_are_dropped_and_impossible_ones_refused() {
        let map = |host_port, container_port| v1::PortMapping {
            host_port,
            container_port,
            ..Default::default()
        };
        let pod = pod_field(|p| p.port_mappings = vec![map(0, 80), map(8080, 80)]).unwrap();
        assert_eq!(pod.port_mappings.len(), 1);
        assert_eq!(pod.port_mappings[0].host_port, 8080);
        assert!(pod_field(|p| p.port_mappings = vec![map(70_000, 80)]).is_err());
        for host_port in [0, 80] {
            assert!(pod_field(|p| p.port_mappings = vec![map(host_port, -1)]).is_err());
        }
    }

    #[test]
    fn words_of_resolv_conf_cannot_bring_lines_of_their_own() {
        let dns = v1::DnsConfig {
            servers: vec!["1.1.1.1\nnameserver 6.6.6.6".into()],
            ..Default::default()
        };
        assert!(pod_field(|p| p.dns_config = Some(dns)).is_err());
    }
}
