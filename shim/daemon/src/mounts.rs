//! The mounts that make a container's root under containerd, which leaves them to the shim. Ours come mounted.

use rustix::mount::{MountFlags, mount as mount2};
use slipway_shim_api::types::Mount;
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

/// Mounts one, as containerd describes it, on `target` (or below it, where the description says so).
///
/// # Errors
/// What the calls say, or that an option is not known.
pub fn mount(mount: &Mount, target: &Path) -> io::Result<()> {
    let target = &below(target, &mount.target)?;
    if mount.r#type == "overlay" {
        return overlay(mount, target);
    }
    let (flags, recursive, data) = options(&mount.options);
    let data = CString::new(data.join(",")).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    if mount.r#type != "bind" && !flags.contains(MountFlags::BIND) {
        return Ok(mount2(
            mount.source.as_str(),
            target,
            mount.r#type.as_str(),
            flags,
            Some(data.as_c_str()),
        )?);
    }
    let read_only = flags.contains(MountFlags::RDONLY);
    slipway_sys::mount::bind(Path::new(&mount.source), target, recursive, read_only)
}

fn below(target: &Path, sub: &str) -> io::Result<PathBuf> {
    let sub = sub.trim_start_matches('/');
    if Path::new(sub)
        .components()
        .any(|c| !matches!(c, std::path::Component::Normal(_)))
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "its target leads out of the root",
        ));
    }
    Ok(if sub.is_empty() {
        target.to_owned()
    } else {
        target.join(sub)
    })
}

fn overlay(mount: &Mount, target: &Path) -> io::Result<()> {
    let mut lower = Vec::new();
    let (mut upper, mut work) = (None, None);
    let mut rest = Vec::new();
    for option in &mount.options {
        match option.split_once('=') {
            Some(("lowerdir", dirs)) => lower = dirs.split(':').map(PathBuf::from).collect(),
            Some(("upperdir", dir)) => upper = Some(Path::new(dir)),
            Some(("workdir", dir)) => work = Some(Path::new(dir)),
            // These are what `mount_overlay` always says.
            Some(("index" | "metacopy" | "redirect_dir", _)) => {}
            _ => rest.push(option.as_str()),
        }
    }
    slipway_sys::mount::mount_overlay(&lower, upper.zip(work), target, &rest)
}

/// fstab's words as flags; what is no word of fstab is the file system's own.
fn options(options: &[String]) -> (MountFlags, bool, Vec<&str>) {
    let mut flags = MountFlags::empty();
    let mut recursive = false;
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" | "defaults" => flags -= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "bind" => flags |= MountFlags::BIND,
            "rbind" => {
                flags |= MountFlags::BIND;
                recursive = true;
            }
            other => data.push(other),
        }
    }
    (flags, recursive, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_cannot_lead_out_of_the_root() {
        assert_eq!(
            below(Path::new("/b/rootfs"), "/x").expect("inside"),
            Path::new("/b/rootfs/x")
        );
        assert_eq!(
            below(Path::new("/b/rootfs"), "").expect("itself"),
            Path::new("/b/rootfs")
        );
        assert!(below(Path::new("/b/rootfs"), "../x").is_err());
    }

    #[test]
    fn words_of_fstab_are_flags_and_the_rest_is_data() {
        let words: Vec<String> = ["ro", "rbind", "nosuid", "size=5k"].map(String::from).to_vec();
        let (flags, recursive, data) = options(&words);
        assert!(flags.contains(MountFlags::RDONLY | MountFlags::BIND | MountFlags::NOSUID));
        assert!(recursive);
        assert_eq!(data, ["size=5k"]);
    }
}
