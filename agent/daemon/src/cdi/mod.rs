//! The CDI file of this node: from what NVML lists and what the driver has installed to a specification that a container
//! runtime can use. What is found here is trusted no more than to exist: nothing is executed.
//!
//! ```text
//! all devices       nvidiactl, nvidia-uvm, nvidia-uvm-tools, nvidia-modeset; libraries, firmware, programs, sockets
//!                   where the configuration asks for them: nvidia-fs*, gdrdrv, infiniband/*, an IMEX channel ([`extra`])
//! a GPU             /dev/nvidiaN, its DRM nodes and their names in /dev/dri/by-path
//! a MIG device      its GPU's /dev/nvidiaN, the capability nodes of its GPU and compute instance
//! ```
//! A library is mounted at each of its names (`libcuda.so.1`), so that it takes no hook to make links. What only a hook can
//! do, loader's cache, forward compatibility, the driver's parameters and profile, is said with the names that NVIDIA's files
//! use: slipwayd does it itself, other runtimes run `slipway-agent cdi-hook` ([`hooks`]).

mod extra;
mod hooks;
mod libraries;
mod write;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use slipway_cdi::{ContainerEdits, Device, DeviceEdit, Mount, Spec};
use slipway_gpu::{Gpu, Inventory, MigDevice};

use crate::config::Extra;

pub use libraries::find_nvml;
pub use write::{FILE_NAME, remove, write};

/// Where things are on the host.
#[derive(Debug, Clone)]
pub struct Roots {
    /// The driver's root.
    pub driver: PathBuf,
    /// Its device nodes.
    pub dev: PathBuf,
    /// /proc.
    pub proc: PathBuf,
    /// The program that does the hooks.
    pub hook: PathBuf,
    /// What every container with a GPU gets beside it.
    pub extra: Vec<Extra>,
}

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The driver's libraries are not there.
    #[error("find the driver's libraries below {}: there is neither libcuda.so.VERSION nor libnvidia-ml.so.VERSION", .0.display())]
    NoLibraries(PathBuf),
    /// A node that its device cannot do without.
    #[error("find the device node {} (of {device}; what makes it: {remedy})", path.display())]
    Node {
        /// On the host.
        path: PathBuf,
        /// Whose.
        device: String,
        /// How it comes to be there.
        remedy: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The driver does not say which nodes a MIG device has.
    #[error("read {} (of {device})", path.display())]
    Capability {
        /// The driver's file.
        path: PathBuf,
        /// Whose.
        device: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There are others than the running driver's.
    #[error("find the libraries of the running driver, {wanted}, below {}: those there are of {found}; every program would fail with them (install the driver that runs, or load the one that is installed)", root.display())]
    OtherVersion {
        /// The driver's root.
        root: PathBuf,
        /// The running driver.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// A folder cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The result would not be valid: a defect of ours, or a strange name.
    #[error("make a valid CDI file")]
    Invalid(#[from] slipway_cdi::ValidationError),
}

/// What could be made.
#[derive(Debug)]
pub struct Made {
    /// The specification; none: no device could be put into it.
    pub spec: Option<Spec>,
    /// The devices that are not in it, by UUID, and why.
    pub left_out: BTreeMap<String, GenerateError>,
}

/// Makes the specification of the devices that have what they need; one that has not costs only itself.
///
/// # Errors
/// Something that every device needs is not there; the error names it.
pub fn generate(inventory: &Inventory, roots: &Roots, kind: &str) -> Result<Made, GenerateError> {
    let mut devices = Vec::new();
    let mut all = ContainerEdits::default();
    let mut left_out = BTreeMap::new();
    for gpu in &inventory.gpus {
        let mut put = |number: String, uuid: &str, edits: Result<ContainerEdits, GenerateError>| match edits {
            Ok(edits) => {
                add(&mut all, &edits);
                devices.push(device(number, &edits));
                devices.push(device(uuid.to_owned(), &edits));
            }
            Err(e) => drop(left_out.insert(uuid.to_owned(), e)),
        };
        if gpu.mig == Some(true) {
            for slice in &gpu.mig_devices {
                let number = format!("{}:{}", gpu.index, slice.index);
                put(number, &slice.uuid, slice_edits(gpu, slice, roots));
            }
        } else {
            put(gpu.index.to_string(), &gpu.uuid, gpu_edits(gpu, roots));
        }
    }
    if devices.is_empty() {
        return Ok(Made { spec: None, left_out });
    }
    devices.push(device("all".to_owned(), &all));
    let mut spec = Spec {
        cdi_version: String::new(),
        kind: kind.to_owned(),
        annotations: [("slipway.dev/driver".to_owned(), inventory.driver.clone())].into(),
        devices,
        container_edits: common(roots, &inventory.driver)?,
    };
    spec.cdi_version = spec.minimum_version().0.to_owned();
    spec.validate()?;
    let spec = Some(spec);
    Ok(Made { spec, left_out })
}

fn device(name: String, edits: &ContainerEdits) -> Device {
    Device {
        name,
        container_edits: edits.clone(),
        ..Device::default()
    }
}

fn add(all: &mut ContainerEdits, edits: &ContainerEdits) {
    for node in &edits.device_nodes {
        if !all.device_nodes.contains(node) {
            all.device_nodes.push(node.clone());
        }
    }
    for gid in &edits.additional_gids {
        if !all.additional_gids.contains(gid) {
            all.additional_gids.push(*gid);
        }
    }
    all.hooks.extend_from_slice(&edits.hooks);
}

/// What every container with a GPU gets.
fn common(roots: &Roots, driver: &str) -> Result<ContainerEdits, GenerateError> {
    let mut edits = ContainerEdits {
        // So that NVIDIA's own runtime, where it is installed too, does not do the same again.
        env: vec!["NVIDIA_VISIBLE_DEVICES=void".to_owned()],
        mounts: libraries::mounts(&roots.driver, driver)?,
        ..ContainerEdits::default()
    };
    // For the programs of NVIDIA's in a container that look for the driver's libraries themselves.
    edits.env.push(format!(
        "NVIDIA_CTK_LIBCUDA_DIR={}",
        libraries::driver_folders(&edits.mounts)
    ));
    edits.hooks = hooks::all(&roots.hook, driver, &edits.mounts);
    for (name, needed) in [
        ("nvidiactl", true),
        ("nvidia-uvm", true),
        ("nvidia-uvm-tools", false),
        ("nvidia-modeset", false),
    ] {
        match node(roots, name) {
            Ok(found) => found.put(&mut edits),
            Err(e) if !needed && e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => {
                // A GPU's node is made with the driver; unified memory's with a module of its own.
                let remedy = match name {
                    "nvidiactl" => "nvidia-modprobe -c 255",
                    _ => "nvidia-modprobe -u -c 0",
                };
                return Err(missing(roots, name, "all GPUs", remedy.to_owned(), e));
            }
        }
    }
    for extra in &roots.extra {
        extra::add(*extra, roots, &mut edits);
    }
    Ok(edits)
}

/// The GPU's own node, which its MIG devices have too.
fn gpu_node(gpu: &Gpu, device: &str, roots: &Roots) -> Result<ContainerEdits, GenerateError> {
    let mut edits = ContainerEdits::default();
    let name = format!("nvidia{}", gpu.minor);
    let remedy = format!("nvidia-modprobe -c {}", gpu.minor);
    let found = node(roots, &name).map_err(|e| missing(roots, &name, device, remedy, e))?;
    found.put(&mut edits);
    Ok(edits)
}

fn gpu_edits(gpu: &Gpu, roots: &Roots) -> Result<ContainerEdits, GenerateError> {
    let mut edits = gpu_node(gpu, &gpu.uuid, roots)?;
    let mut links = Vec::new();
    // A card without a display driver has none.
    for kind in ["card", "render"] {
        let link = format!("dri/by-path/pci-{}-{kind}", gpu.pci);
        let target = fs::read_link(roots.dev.join(&link)).ok();
        let name = target
            .as_deref()
            .and_then(Path::file_name)
            .and_then(|n| n.to_str());
        if let Some(name) = name
            && let Ok(found) = node(roots, &format!("dri/{name}"))
        {
            found.put(&mut edits);
            links.push((format!("/dev/{link}"), format!("../{name}")));
        }
    }
    if !links.is_empty() {
        edits.hooks.push(hooks::links(&roots.hook, &links));
    }
    Ok(edits)
}

/// The display's nodes are of the whole GPU, so a MIG device has none.
fn slice_edits(gpu: &Gpu, slice: &MigDevice, roots: &Roots) -> Result<ContainerEdits, GenerateError> {
    let mut edits = gpu_node(gpu, &slice.uuid, roots)?;
    let instance = roots.proc.join(format!(
        "driver/nvidia/capabilities/gpu{}/mig/gi{}",
        gpu.minor, slice.gi
    ));
    for file in [
        instance.join("access"),
        instance.join(format!("ci{}/access", slice.ci)),
    ] {
        let failed = |source| GenerateError::Capability {
            path: file.clone(),
            device: slice.uuid.clone(),
            source,
        };
        let text = fs::read_to_string(&file).map_err(failed)?;
        let minor = text.lines().find_map(|l| l.strip_prefix("DeviceFileMinor:"));
        let minor: Option<u32> = minor.and_then(|m| m.trim().parse().ok());
        let minor = minor.ok_or_else(|| {
            failed(io::Error::new(
                io::ErrorKind::InvalidData,
                "it has no DeviceFileMinor",
            ))
        })?;
        let name = format!("nvidia-caps/nvidia-cap{minor}");
        let remedy = format!("nvidia-modprobe -f {}", file.display());
        let found = node(roots, &name).map_err(|e| missing(roots, &name, &slice.uuid, remedy, e))?;
        found.put(&mut edits);
    }
    Ok(edits)
}

fn missing(roots: &Roots, name: &str, device: &str, remedy: String, source: io::Error) -> GenerateError {
    GenerateError::Node {
        path: roots.dev.join(name),
        device: device.to_owned(),
        remedy,
        source,
    }
}

/// A node that is there.
struct Node {
    edit: DeviceEdit,
    /// A group that has to be had to use it.
    gid: Option<u32>,
}

impl Node {
    fn put(self, edits: &mut ContainerEdits) {
        if let Some(gid) = self.gid
            && !edits.additional_gids.contains(&gid)
        {
            edits.additional_gids.push(gid);
        }
        edits.device_nodes.push(self.edit);
    }
}

fn node(roots: &Roots, name: &str) -> io::Result<Node> {
    let host = roots.dev.join(name);
    let meta = fs::metadata(&host)?;
    let kind = meta.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no device node",
        ));
    }
    let path = format!("/dev/{name}");
    let host_path = host.display().to_string();
    let world = meta.mode() & 0o006 == 0o006 || meta.mode() & 0o666 == 0o444;
    Ok(Node {
        edit: DeviceEdit {
            // Said only where it is another one: older versions of CDI do not have it.
            host_path: if host_path == path {
                String::new()
            } else {
                host_path
            },
            path,
            ..DeviceEdit::default()
        },
        gid: (!world && meta.mode() & 0o060 != 0 && meta.gid() != 0).then_some(meta.gid()),
    })
}

/// A file or folder of the driver's, read-only in the container.
fn bind(host: &Path, container: &str) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        options: ["ro", "nosuid", "nodev", "rbind", "rprivate"]
            .map(str::to_owned)
            .into(),
        ..Mount::default()
    }
}
