//! The driver's files: which libraries, programs and other files of it a container gets, and where they are.
//!
//! The version is the running driver's: the kernel module and the libraries must be of one. A file's version is its name's
//! end: `libcuda.so.VERSION`. Everything of that version in the driver's library folders belongs to it, and the one library that
//! has a version of its own ([`UNVERSIONED`]).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use slipway_cdi::Mount;

use super::{GenerateError, bind};

/// Library folders, below the driver's root, in the order they are looked at; the first file of a name is taken.
const FOLDERS: [&str; 10] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/nvidia/current",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "lib/x86_64-linux-gnu",
    "lib64",
    "lib",
    "lib/nvidia",
    "nvidia/lib64",
];
/// Library folders below those that are looked at too: what a driver has for VDPAU.
const BELOW: &str = "vdpau";
/// The driver's compiler for kernels of older CUDA versions, named by its interface: `libnvidia-nvvm70.so.4`.
const UNVERSIONED: &str = "libnvidia-nvvm70.so.";
const PROGRAM_FOLDERS: [&str; 3] = ["usr/bin", "bin", "usr/sbin"];
const PROGRAMS: [&str; 7] = [
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
    "nvidia-imex",
    "nvidia-imex-ctl",
];
/// Files that programs look for by these names, where the driver has them.
const CONFIGURATION: [&str; 9] = [
    "usr/share/glvnd/egl_vendor.d/10_nvidia.json",
    "usr/share/egl/egl_external_platform.d/15_nvidia_gbm.json",
    "usr/share/egl/egl_external_platform.d/10_nvidia_wayland.json",
    "usr/share/nvidia/nvoptix.bin",
    "usr/share/vulkan/icd.d/nvidia_icd.json",
    "usr/share/vulkan/implicit_layer.d/nvidia_layers.json",
    "etc/vulkan/icd.d/nvidia_icd.json",
    "etc/vulkan/implicit_layer.d/nvidia_layers.json",
    "etc/OpenCL/vendors/nvidia.icd",
];
const SOCKETS: [&str; 3] = [
    "run/nvidia-persistenced/socket",
    "run/nvidia-fabricmanager/socket",
    "tmp/nvidia-mps",
];
/// Folders below usr/lib with firmware that the driver's user space loads.
const FIRMWARE: [&str; 2] = ["lib/firmware/nvidia", "usr/lib/firmware/nvidia"];

/// The library folders that are there: the known ones, then what the root's ld.so.conf.d names.
fn folders(root: &Path) -> Vec<PathBuf> {
    let mut names: Vec<String> = FOLDERS.map(str::to_owned).into();
    let mut files: Vec<PathBuf> = fs::read_dir(root.join("etc/ld.so.conf.d"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "conf"))
        .take(256)
        .collect();
    files.sort();
    for file in files {
        let text = fs::read_to_string(file).unwrap_or_default();
        let named = text
            .lines()
            .map(str::trim)
            .filter(|l| l.starts_with('/') && !l.contains(".."));
        names.extend(named.map(|l| l.trim_start_matches('/').to_owned()));
    }
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for name in names {
        let folder = root.join(name);
        // /lib is often a link to /usr/lib: the same files are not taken twice.
        let Ok(real) = fs::canonicalize(&folder) else {
            continue;
        };
        if !seen.contains(&real) {
            seen.push(real);
            found.push(folder);
        }
    }
    found
}

/// libnvidia-ml of the driver below `root`, by the name it is to be loaded by.
pub fn find_nvml(root: &Path) -> Option<PathBuf> {
    let mut all = folders(root).into_iter().map(|f| f.join("libnvidia-ml.so.1"));
    all.find(|p| p.exists())
}

/// The versions of the driver's libraries below `root`, in the order they are found.
fn versions(folders: &[PathBuf]) -> Vec<String> {
    let numbers = |v: &str| {
        v.contains('.')
            && v.split('.')
                .all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
    };
    let mut found = Vec::new();
    for name in ["libcuda.so.", "libnvidia-ml.so."] {
        for file in folders.iter().flat_map(|f| names_in(f)) {
            let version = file.strip_prefix(name).filter(|v| numbers(v));
            if let Some(version) = version
                && !found.iter().any(|f| f == version)
            {
                found.push(version.to_owned());
            }
        }
    }
    found
}

/// Checks that there are libraries of the running driver.
fn check(root: &Path, folders: &[PathBuf], running: &str) -> Result<(), GenerateError> {
    let found = versions(folders);
    if found.is_empty() {
        return Err(GenerateError::NoLibraries(root.to_owned()));
    }
    if found.iter().any(|v| v == running) {
        return Ok(());
    }
    Err(GenerateError::OtherVersion {
        root: root.to_owned(),
        wanted: running.to_owned(),
        found: found.join(", "),
    })
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Everything that a container gets of the driver that runs in this version.
pub fn mounts(root: &Path, version: &str) -> Result<Vec<Mount>, GenerateError> {
    let folders = folders(root);
    check(root, &folders, version)?;
    // By their place in the container: each once.
    let mut mounts = BTreeMap::new();
    let mut put = |host: PathBuf, place: String| {
        mounts.entry(place.clone()).or_insert_with(|| bind(&host, &place));
    };
    let inside = |path: &Path| match path.strip_prefix(root) {
        Ok(rest) => Path::new("/").join(rest).display().to_string(),
        Err(_) => path.display().to_string(),
    };
    let mut taken = Vec::new();
    let end = format!(".so.{version}");
    for folder in folders
        .into_iter()
        .flat_map(|f| [f.join(BELOW), f].into_iter().rev())
    {
        let names = names_in(&folder);
        let of_driver = names.iter().any(|n| n.ends_with(&end));
        let belongs = |n: &&String| n.ends_with(&end) || of_driver && n.starts_with(UNVERSIONED);
        for name in names.iter().filter(belongs) {
            if taken.contains(name) {
                continue;
            }
            taken.push(name.clone());
            let file = folder.join(name);
            put(file.clone(), inside(&file));
            // The names that link to it here are those that programs ask for.
            for link in links_to(&folder, &names, &file) {
                put(file.clone(), inside(&folder.join(link)));
            }
        }
    }
    for name in PROGRAMS {
        let found = PROGRAM_FOLDERS
            .iter()
            .map(|f| root.join(f).join(name))
            .find(|p| p.is_file());
        if let Some(file) = found {
            put(file.clone(), inside(&file));
        }
    }
    for name in CONFIGURATION {
        let file = root.join(name);
        if file.is_file() {
            put(file.clone(), inside(&file));
        }
    }
    for folder in FIRMWARE {
        let folder = root.join(folder).join(version);
        for name in names_in(&folder) {
            let known = (name.starts_with("gsp") || name.starts_with("ucodes")) && name.ends_with(".bin");
            if known {
                put(
                    folder.join(&name),
                    format!("/lib/firmware/nvidia/{version}/{name}"),
                );
            }
        }
    }
    let mut mounts: Vec<Mount> = mounts.into_values().collect();
    for name in SOCKETS {
        let path = root.join(name);
        if path.exists() {
            let mut mount = bind(&path, &inside(&path));
            mount.options = ["nosuid", "nodev", "noexec", "rbind", "rprivate"]
                .map(str::to_owned)
                .into();
            mounts.push(mount);
        }
    }
    Ok(mounts)
}

/// Where the driver's libraries are in the container, each folder once, in order: what `NVIDIA_CTK_LIBCUDA_DIR` says.
pub fn driver_folders(mounts: &[Mount]) -> String {
    let folders = super::hooks::library_folders(mounts).into_iter();
    let own: Vec<&str> = folders.filter(|f| !f.ends_with(&format!("/{BELOW}"))).collect();
    own.join(":")
}

/// Names in the folder that lead to the file, `libx.so.1` and `libx.so`.
fn links_to(folder: &Path, names: &[String], file: &Path) -> Vec<String> {
    let stem = |name: &str| name.split(".so").next().unwrap_or("").to_owned();
    let own = file.file_name().and_then(|n| n.to_str()).unwrap_or("");
    let real = fs::canonicalize(file).ok();
    let same = |name: &&String| {
        *name != own
            && stem(name) == stem(own)
            && fs::symlink_metadata(folder.join(name)).is_ok_and(|m| m.is_symlink())
            && fs::canonicalize(folder.join(name)).ok() == real
    };
    names.iter().filter(same).cloned().collect()
}
