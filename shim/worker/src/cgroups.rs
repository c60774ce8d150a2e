//! libcontainer's cgroup managers, kept from doing anything: the cgroup is ours, made, limited and joined.
//!
//! They would read the mount table a dozen times and then write the pid into the cgroup it is in already, which takes a
//! lock that costs an RCU grace period (5 to 12 ms: more than the rest of a create); after a failure they kill
//! everything in the cgroup, this process first. In a mount namespace where no hierarchy is mounted they find nothing to do.
//!
//! The container's own mount of its cgroup is then a bind of the view that is left.

use libcontainer::oci_spec::runtime::{Mount, Spec};
use slipway_sys::cgroup::{Layout, hide_behind_view, is_covered};
use std::io;
use std::path::PathBuf;

/// Changes the mounts of `spec` and this process's mount namespace; returns what libcontainer is to take for the cgroup.
///
/// A container that binds `/sys` or `/` of the host has to see the machine's cgroups: then everything stays as it is, and
/// libcontainer's manager repeats what has been done.
pub fn neutralise(spec: &mut Spec) -> io::Result<PathBuf> {
    let layout = Layout::detect().map_err(io::Error::other)?;
    let own = if layout.is_v2() {
        layout.own_v2().map(PathBuf::from)
    } else {
        None
    };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let binds_the_host = mounts
        .iter()
        .any(|m| is_bind(m) && m.source().as_deref().is_some_and(is_covered));
    if !binds_the_host {
        let shown = mounts.iter().any(|m| is_cgroup(m) && !has(m, "ro"));
        let view = hide_behind_view(&layout, !shown)?;
        mounts.iter_mut().filter(|m| is_cgroup(m)).for_each(|m| {
            let mut options = m.options().clone().unwrap_or_default();
            options.retain(|o| {
                matches!(
                    o.as_str(),
                    "ro" | "rw" | "nosuid" | "nodev" | "noexec" | "relatime"
                )
            });
            options.push("rbind".into());
            m.set_typ(Some("bind".into()))
                .set_source(Some(view.clone()))
                .set_options(Some(options));
        });
        spec.set_mounts(Some(mounts));
    }
    // Empty: with v1, wherever we are in each hierarchy.
    Ok(own.unwrap_or_default())
}

fn is_cgroup(m: &Mount) -> bool {
    matches!(m.typ().as_deref(), Some("cgroup" | "cgroup2"))
}

fn is_bind(m: &Mount) -> bool {
    m.typ().as_deref() == Some("bind") || has(m, "bind") || has(m, "rbind")
}

fn has(m: &Mount, option: &str) -> bool {
    m.options().iter().flatten().any(|o| o == option)
}
