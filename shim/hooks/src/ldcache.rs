//! `update-ldcache`: the container's loader finds the driver's libraries by their names.
//!
//! The folders go into a part of the loader's configuration that comes first, the container's own folders into one that
//! comes last; then the host's `ldconfig` makes the cache, in a jail that is the container's root. Its format is its own.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use slipway_sys::process::Status;
use slipway_sys::root::Root;

use crate::{Step, loader, step};

/// After `00-compat`, which is to win over the driver's libraries, and before all others.
const DRIVER: &str = "00-nvcr-slipway.conf";
const SYSTEM: &str = "zz-nvcr-slipway.conf";

/// Puts the folders into the loader's configuration.
pub fn configure(root: &Root, folders: &[String]) -> Step<()> {
    loader::ensure_configuration(root).map_err(step("give the loader a configuration"))?;
    let system = loader::system_folders(root);
    let mut known = loader::configured(root);
    known.extend(system.iter().cloned());
    let mut new: Vec<String> = Vec::new();
    for folder in folders {
        if !known.contains(folder) && !new.contains(folder) {
            new.push(folder.clone());
        }
    }
    loader::write_part(root, DRIVER, &new).map_err(step("name the driver's folders to the loader"))?;
    loader::write_part(root, SYSTEM, &system).map_err(step("name the container's folders to the loader"))?;
    let mut all = new;
    all.extend(system);
    loader::write_musl(root, &all).map_err(step("name the folders to the musl loader"))
}

/// Makes the cache.
pub fn make(ldconfig: &Path, root: &Path) -> io::Result<()> {
    // Debian's derivatives have a script there, and the program beside it.
    let mut real = ldconfig.as_os_str().to_owned();
    real.push(".real");
    let program = Some(PathBuf::from(real)).filter(|p| p.exists());
    let program = program.as_deref().unwrap_or(ldconfig);
    let args = ["ldconfig", "-f", loader::CONFIGURATION, "-C", "/etc/ld.so.cache"].map(OsStr::new);
    let ended = slipway_sys::jail::run(program, &args, root)?;
    match ended.status {
        Status::Code(0) => Ok(()),
        other => Err(io::Error::other(format!(
            "it ended with exit code {}",
            other.exit_code()
        ))),
    }
}
