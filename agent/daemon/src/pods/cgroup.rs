//! From a process's cgroup to the pod and container it is in, by the paths that kubelet and container runtimes make. Pure.
//!
//! ```text
//! cgroupfs   …/kubepods/burstable/pod<UID>/<container>
//! systemd    …/kubepods-burstable-pod<UID with _>.slice/<runtime>-<container>.scope
//! ```
//! Below the container there may be more, which is its own business.

/// Where a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The pod's UID.
    pub pod: String,
    /// The container's id.
    pub container: String,
}

/// The place that `/proc/PID/cgroup` tells; none: not in a pod.
pub fn place(cgroup: &str) -> Option<Place> {
    // "NUMBER:CONTROLLERS:PATH": v2's line has no controllers; on v1 any of them tells it.
    cgroup
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .find_map(in_path)
}

fn in_path(path: &str) -> Option<Place> {
    let mut parts = path.split('/');
    let pod = parts.by_ref().find_map(pod_uid)?;
    let container = parts.next()?;
    let container = container.strip_suffix(".scope").unwrap_or(container);
    let container = container.rsplit('-').next().filter(|id| is_hex(id, 12))?;
    Some(Place {
        pod,
        container: container.to_owned(),
    })
}

/// "pod<UID>" or "kubepods[-CLASS]-pod<UID>.slice".
fn pod_uid(part: &str) -> Option<String> {
    let uid = match part.strip_suffix(".slice") {
        Some(slice) => slice.split_once("-pod")?.1.replace('_', "-"),
        None => part.strip_prefix("pod")?.to_owned(),
    };
    // A UUID; of a pod that kubelet has from a file, a hash.
    let digits = uid.replace('-', "");
    (digits.len() == 32 && is_hex(&digits, 32)).then_some(uid)
}

fn is_hex(text: &str, least: usize) -> bool {
    text.len() >= least && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b1c4f6e-2a35-4d7e-9f10-8a6b5c4d3e2f";
    const ID: &str = "3f1e0d9c8b7a69584736251403f2e1d0c9b8a7968574635241302f1e0d9c8b7a";

    fn found(text: &str) -> Option<(String, String)> {
        place(text).map(|p| (p.pod, p.container))
    }

    #[test]
    fn both_drivers_paths_are_read_on_both_versions_of_cgroups() {
        let under = UID.replace('-', "_");
        let there = Some((UID.to_owned(), ID.to_owned()));
        for text in [
            format!("0::/kubepods/burstable/pod{UID}/{ID}\n"),
            format!("0::/kubepods/pod{UID}/{ID}/inner/one\n"),
            format!(
                "12:pids:/kubepods/besteffort/pod{UID}/{ID}\n1:name=systemd:/kubepods/besteffort/pod{UID}/{ID}\n0::/\n"
            ),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/cri-containerd-{ID}.scope\n"
            ),
            format!("0::/kubepods.slice/kubepods-pod{under}.slice/slipway-{ID}.scope\n"),
            format!(
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{under}.slice/crio-{ID}.scope/x\n"
            ),
        ] {
            assert_eq!(found(&text), there, "{text}");
        }
        let hash = UID.replace('-', "");
        assert_eq!(
            found(&format!("0::/kubepods/pod{hash}/{ID}\n")),
            Some((hash, ID.to_owned()))
        );
    }

    #[test]
    fn what_is_in_no_pod_is_in_none() {
        for text in [
            "0::/system.slice/sshd.service\n".to_owned(),
            format!("0::/docker/{ID}\n"),
            format!("0::/kubepods/burstable/pod{UID}\n"),
            format!("0::/kubepods/burstable/pod{UID}/not-an-id\n"),
            format!("0::/podman/{ID}\n"),
            "garbage".to_owned(),
            String::new(),
        ] {
            assert_eq!(found(&text), None, "{text}");
        }
    }
}
