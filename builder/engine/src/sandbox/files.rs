//! The files that a RUN sees instead of the image's own, and the caller's cgroup. Knows no containers.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::error::StepError;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where systemd-resolved keeps the real servers while the other file names itself.
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// Where nothing else is left in a network namespace of its own: as Docker and BuildKit do.
const PUBLIC: [&str; 4] = [
    "8.8.8.8",
    "8.8.4.4",
    "2001:4860:4860::8888",
    "2001:4860:4860::8844",
];

/// Writes resolv.conf and hosts into the build's directory; where they are.
pub(super) fn write(dir: &Path, host_network: bool, hostname: &str) -> Result<(PathBuf, PathBuf), StepError> {
    let resolv = dir.join(if host_network {
        "resolv-host.conf"
    } else {
        "resolv.conf"
    });
    let hosts = dir.join("hosts");
    let host = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    let resolved = std::fs::read_to_string(RESOLVED).unwrap_or_default();
    for (path, text) in [
        (&resolv, resolv_conf(&host, &resolved, host_network)),
        (
            &hosts,
            format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
        ),
    ] {
        // Written beside and renamed: a step of another stage may be reading it.
        if std::fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
            continue;
        }
        let beside = path.with_extension(format!("{:?}", std::thread::current().id()));
        std::fs::write(&beside, text)
            .and_then(|()| std::fs::rename(&beside, path))
            .map_err(|source| StepError::Io {
                act: "write",
                path: path.clone(),
                source,
            })?;
    }
    Ok((resolv, hosts))
}

/// The resolver's configuration for a step: the host's, without servers on the host's loopback where the step has a
/// loopback of its own.
fn resolv_conf(host: &str, resolved: &str, host_network: bool) -> String {
    if host_network {
        return host.to_owned();
    }
    let servers = |text: &str| -> Vec<String> {
        text.lines()
            .filter_map(|l| l.trim().strip_prefix("nameserver"))
            .map(|s| s.trim().to_owned())
            .collect()
    };
    let text = if servers(host) == ["127.0.0.53"] && !resolved.is_empty() {
        resolved
    } else {
        host
    };
    let local = |server: &str| {
        let address = server.split('%').next().unwrap_or(server);
        address.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
    };
    let mut out = String::new();
    let mut any = false;
    for line in text.lines() {
        if let Some(server) = line.trim().strip_prefix("nameserver") {
            if local(server.trim()) {
                continue;
            }
            any = true;
        }
        out.push_str(line);
        out.push('\n');
    }
    if !any {
        for server in PUBLIC {
            out.push_str(&format!("nameserver {server}\n"));
        }
    }
    out
}

/// The caller's own cgroup as one path below each hierarchy: v2's, else the memory or cpu controller's.
pub(super) fn own_cgroup(text: &str) -> String {
    let mut unified = None;
    let mut memory = None;
    let mut cpu = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let named = |name| controllers.split(',').any(|c| c == name);
        if controllers.is_empty() {
            unified = Some(path);
        } else if named("memory") {
            memory = Some(path);
        } else if named("cpu") {
            cpu = Some(path);
        }
    }
    let path = memory.or(cpu).or(unified).unwrap_or("/");
    // A path that leads out of the cgroup namespace cannot be used.
    if path.starts_with("/..") {
        "/".to_owned()
    } else {
        path.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_on_the_hosts_loopback_is_of_no_use_in_a_namespace() {
        let host = "search a.b\nnameserver 127.0.0.1\nnameserver 10.0.0.2\n";
        assert_eq!(resolv_conf(host, "", false), "search a.b\nnameserver 10.0.0.2\n");
        assert_eq!(resolv_conf(host, "", true), host);
        assert_eq!(
            resolv_conf("nameserver 127.0.0.53\n", "nameserver 9.9.9.9\n", false),
            "nameserver 9.9.9.9\n"
        );
        assert!(resolv_conf("", "", false).starts_with("nameserver 8.8.8.8\n"));
        assert!(resolv_conf("nameserver ::1\n", "", false).contains("8.8.4.4"));
    }

    #[test]
    fn the_callers_cgroup_is_found_on_both_versions() {
        assert_eq!(
            own_cgroup("0::/user.slice/session-1.scope\n"),
            "/user.slice/session-1.scope"
        );
        assert_eq!(own_cgroup("5:memory:/a\n3:cpu,cpuacct:/b\n0::/\n"), "/a");
        assert_eq!(own_cgroup("1:name=systemd:/x\n"), "/");
        assert_eq!(own_cgroup("0::/../..\n"), "/");
    }
}
