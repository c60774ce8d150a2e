//! The driver's files about devices, as a container sees them: no permission to make nodes, and only its own GPUs in the
//! profile that EGL and Vulkan read.

use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};
use slipway_sys::{mount, root::Root};

use crate::{Step, Tree, loader, step};

/// What the driver's user space reads before it makes device nodes.
const PARAMS: &str = "/proc/driver/nvidia/params";
const MAX_PARAMS: u64 = 64 << 10;
const PROFILES: &str = "/etc/nvidia/nvidia-application-profiles-rc.d";

/// Puts a copy of the driver's parameters over them that says not to make device nodes, where they say otherwise.
/// `root` is the container's root with its mounts.
pub fn forbid_modification(root: &Path) -> Step<()> {
    let text = match read(Path::new(PARAMS)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(step(format!("read {PARAMS}"))(e)),
    };
    match without_permission(&text) {
        Some(text) => {
            cover(root, Path::new(PARAMS), &text).map_err(step(format!("mount a copy on {PARAMS}")))
        }
        None => Ok(()),
    }
}

fn read(path: &Path) -> io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_PARAMS)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// The text with the permission taken away; nothing when it is not given.
fn without_permission(text: &str) -> Option<String> {
    let given = "ModifyDeviceFiles: 1";
    text.lines().any(|l| l == given).then(|| {
        let line = |l| if l == given { "ModifyDeviceFiles: 0" } else { l };
        text.lines()
            .map(line)
            .fold(String::new(), |all, l| all + l + "\n")
    })
}

/// Mounts `text` over the container's file at `place`, read-only. What it is made on is a tmpfs over the host's view of the
/// file's folder, in the container's mount namespace, and gone again: nobody but the mount has it.
fn cover(root: &Path, place: &Path, text: &str) -> io::Result<()> {
    let root = Root::open(root)?;
    let target = root.open_file(place, OFlags::PATH)?;
    if rustix::fs::fstatfs(&target)?.f_type != rustix::fs::PROC_SUPER_MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the container's is no file of the kernel's",
        ));
    }
    // Nobody else's /proc: with mounts that travel back to the host it would be the host's too.
    mount::set_propagation(Path::new("/proc"), mount::Propagation::Private, true)?;
    let folder: PathBuf = place.parent().unwrap_or(Path::new("/")).to_owned();
    mount::tmpfs(&folder, 1 << 20, 0o755)?;
    let copied = (|| {
        let file = folder.join("params");
        std::fs::File::create_new(&file)?.write_all(text.as_bytes())?;
        mount::program(&file)
    })();
    mount::unmount(&folder, true)?;
    mount::attach_fd(copied?.as_fd(), target.as_fd())
}

/// Writes the profile for the GPUs whose nodes are in the container's /dev.
pub fn write_profile(tree: &Tree) -> Step<()> {
    let root = &tree.root;
    let Some(dev) = &tree.dev else { return Ok(()) };
    let Some(mask) = gpus(dev).map_err(step("look for GPUs in the container's /dev"))? else {
        return Ok(());
    };
    let text = format!(
        r#"{{"profiles":[{{"name":"_container_","settings":["EGLVisibleDGPUDevices",{mask:#x}]}}],"rules":[{{"pattern":[],"profile":"_container_"}}]}}"#
    );
    let write = || {
        root.mkdir_all(Path::new(PROFILES), 0o755, None)?;
        root.create_file(&Path::new(PROFILES).join("10-container.conf"), 0o444)?
            .write_all(text.as_bytes())
    };
    write().map_err(step("write the application profile"))
}

/// A bit for each GPU's minor number; the profile has no more than 64.
fn gpus(dev: &Root) -> io::Result<Option<u64>> {
    let names = loader::names_in(dev, Path::new("/"), 4096)?;
    let mut mask = 0u64;
    for name in names {
        let number = name.to_str().and_then(|n| n.strip_prefix("nvidia"));
        if !number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
            continue;
        }
        let Some(stat) = dev.symlink_metadata(Path::new(&name))? else {
            continue;
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice {
            mask |= 1u64.checked_shl(rustix::fs::minor(stat.st_rdev)).unwrap_or(0);
        }
    }
    Ok(Some(mask).filter(|m| *m != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_permission_is_taken_away_where_it_is_given() {
        let given = "ResmanDebugLevel: 4294967295\nModifyDeviceFiles: 1\nDeviceFileUID: 0\n";
        let taken = "ResmanDebugLevel: 4294967295\nModifyDeviceFiles: 0\nDeviceFileUID: 0\n";
        assert_eq!(without_permission(given).as_deref(), Some(taken));
        assert_eq!(without_permission(taken), None);
        assert_eq!(without_permission(""), None);
    }
}
