//! What a driver has beside its library: programs and libraries of its version, device nodes, and its files in /proc and
//! /sys, all below a folder of the test's.
//!
//! ```text
//! <dir>/nvml/                          the library's folder: topology.json, events, overrides, calls
//! <dir>/root/usr/lib/x86_64-linux-gnu  libraries (each a real one: it can be loaded on any libc), libnvidia-ml among them
//! <dir>/root/usr/bin, root/lib/firmware/nvidia/VERSION, root/usr/share, root/etc
//! <dir>/dev                            nodes with numbers that no driver of this machine answers to
//! <dir>/proc/driver/nvidia, <dir>/sys/bus/pci/devices
//! ```

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, Mode};

use crate::topology::{Gpu, Topology};

/// Where a Debian-like driver keeps its libraries, below its root.
pub const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// The major number of GPUs.
pub const GPU_MAJOR: u32 = 195;
/// Made up ones of what has no fixed number.
pub const UVM_MAJOR: u32 = 507;
/// The same, of MIG capabilities.
pub const CAPS_MAJOR: u32 = 508;
/// Library names without their version, beside libnvidia-ml; libcuda is what programs ask for.
const NAMES: [&str; 9] = [
    "libcuda",
    "libnvidia-ptxjitcompiler",
    "libnvidia-nvvm",
    "libnvidia-opencl",
    "libnvidia-gpucomp",
    "libnvidia-cfg",
    "libnvidia-encode",
    "libnvcuvid",
    "libcudadebugger",
];
/// Libraries that are not named `NAME.so.VERSION` in [`LIBRARIES`]: where they are below it, VERSION to be filled in; the name that
/// links to each.
const OTHERS: [(&str, &str); 2] = [
    ("libnvidia-nvvm70.so.4", ""),
    ("vdpau/libvdpau_nvidia.so.VERSION", "vdpau/libvdpau_nvidia.so.1"),
];
const PROGRAMS: [&str; 5] = [
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
];

/// A driver laid out in a folder.
#[derive(Debug, Clone)]
pub struct Driver {
    dir: PathBuf,
}

impl Driver {
    /// Lays a driver out in `dir`, which is made.
    ///
    /// # Errors
    /// A file cannot be written; no C compiler; the library under test is not built.
    pub fn lay_out(dir: &Path, topology: &Topology) -> Result<Driver> {
        let driver = Driver { dir: dir.to_owned() };
        fs::create_dir_all(driver.nvml())?;
        driver.set_topology(topology)?;
        driver.libraries(&topology.driver_version)?;
        for program in PROGRAMS {
            driver.write(
                &format!("root/usr/bin/{program}"),
                "#!/bin/sh\necho a fake driver\n",
            )?;
        }
        let firmware = format!("root/lib/firmware/nvidia/{}", topology.driver_version);
        for file in ["gsp_ga10x.bin", "gsp_tu10x.bin"] {
            driver.write(&format!("{firmware}/{file}"), "firmware\n")?;
        }
        for config in [
            "usr/share/glvnd/egl_vendor.d/10_nvidia.json",
            "etc/vulkan/icd.d/nvidia_icd.json",
            "etc/OpenCL/vendors/nvidia.icd",
        ] {
            driver.write(&format!("root/{config}"), "{}\n")?;
        }
        Ok(driver)
    }

    /// The folder that [`crate::FOLDER`] is to name.
    pub fn nvml(&self) -> PathBuf {
        self.dir.join("nvml")
    }

    /// The driver's root.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The folder of device nodes.
    pub fn dev(&self) -> PathBuf {
        self.dir.join("dev")
    }

    /// The fake /proc.
    pub fn proc(&self) -> PathBuf {
        self.dir.join("proc")
    }

    /// The fake /sys.
    pub fn sys(&self) -> PathBuf {
        self.dir.join("sys")
    }

    /// The library by the name it is asked for.
    pub fn library(&self) -> PathBuf {
        self.root().join(LIBRARIES).join("libnvidia-ml.so.1")
    }

    /// Changes what there is, at once and as a whole; nodes and files in /proc and /sys follow.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn set_topology(&self, topology: &Topology) -> Result<()> {
        for place in ["dev", "proc", "sys"] {
            let _ = fs::remove_dir_all(self.dir.join(place));
        }
        self.nodes(topology)?;
        self.proc_files(topology)?;
        self.sys_files(topology)?;
        let new = self.nvml().join("topology.json.new");
        fs::write(&new, serde_json::to_vec_pretty(topology)?)?;
        fs::rename(new, self.nvml().join("topology.json"))?;
        Ok(())
    }

    /// Installs another version's libraries in the place of those there are; what runs is the topology's.
    ///
    /// # Errors
    /// A file cannot be written; no C compiler.
    pub fn install(&self, version: &str) -> Result<()> {
        fs::remove_dir_all(self.root().join(LIBRARIES))?;
        self.libraries(version)
    }

    /// Appends to the events: "GPU XID [GI CI]", "GPU reset", "GPU reattach", "GPU set KEY VALUE" or "reload".
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn raise(&self, line: &str) -> Result<()> {
        let path = self.nvml().join("events");
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        Ok(file.write_all(format!("{line}\n").as_bytes())?)
    }

    /// Replaces the overrides: "FUNCTION CODE", "FUNCTION sleep MS", "FUNCTION hang", with or without a GPU's index.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn override_with(&self, lines: &[&str]) -> Result<()> {
        let new = self.nvml().join("overrides.new");
        fs::write(&new, lines.join("\n"))?;
        Ok(fs::rename(new, self.nvml().join("overrides"))?)
    }

    /// Whether a program has the driver open: it could not be unloaded.
    ///
    /// # Errors
    /// The file that says it cannot be opened.
    pub fn in_use(&self) -> Result<bool> {
        let path = self.nvml().join("held");
        let file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        let lock = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
        Ok(lock.is_err())
    }

    /// Logs calls from now on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn log_calls(&self) -> Result<()> {
        Ok(fs::write(self.nvml().join("calls"), "")?)
    }

    /// The calls logged.
    pub fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.nvml().join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(
            if path.parent().is_some_and(|p| p.ends_with("bin")) {
                0o755
            } else {
                0o644
            },
        );
        Ok(fs::set_permissions(&path, mode)?)
    }

    fn libraries(&self, version: &str) -> Result<()> {
        let dir = self.root().join(LIBRARIES);
        fs::create_dir_all(&dir)?;
        let link = |name: &str, target: &str| std::os::unix::fs::symlink(target, dir.join(name));
        for name in NAMES {
            let soname = format!("{name}.so.1");
            let file = format!("{name}.so.{version}");
            compile(&dir.join(&file), &soname, &name.replace('-', "_"))?;
            link(&soname, &file)?;
            link(&format!("{name}.so"), &soname)?;
        }
        fs::create_dir_all(dir.join("vdpau"))?;
        for (file, name) in OTHERS {
            let file = dir.join(file.replace("VERSION", version));
            let own = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let soname = name.rsplit('/').next().filter(|n| !n.is_empty());
            compile(&file, soname.unwrap_or(own), "other")?;
            if !name.is_empty() {
                link(name, own)?;
            }
        }
        let file = format!("libnvidia-ml.so.{version}");
        fs::copy(built()?, dir.join(&file))?;
        link("libnvidia-ml.so.1", &file)?;
        Ok(())
    }

    fn node(&self, name: &str, major: u32, minor: u32, mode: u32) -> Result<()> {
        let path = self.dev().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        if rustix::process::geteuid().is_root() {
            let dev = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::empty(), dev)
                .with_context(|| format!("making {}", path.display()))?;
        } else {
            fs::write(&path, "")?;
        }
        Ok(fs::set_permissions(
            &path,
            std::os::unix::fs::PermissionsExt::from_mode(mode),
        )?)
    }

    fn nodes(&self, topology: &Topology) -> Result<()> {
        self.node("nvidiactl", GPU_MAJOR, 255, 0o666)?;
        self.node("nvidia-modeset", GPU_MAJOR, 254, 0o666)?;
        self.node("nvidia-uvm", UVM_MAJOR, 0, 0o666)?;
        self.node("nvidia-uvm-tools", UVM_MAJOR, 1, 0o666)?;
        for (n, gpu) in topology.gpus.iter().enumerate() {
            self.node(&format!("nvidia{}", gpu.minor), GPU_MAJOR, gpu.minor, 0o666)?;
            let by_path = self.dev().join("dri/by-path");
            fs::create_dir_all(&by_path)?;
            let n = u32::try_from(n)?;
            for (kind, name, minor) in [
                ("card", format!("card{n}"), n),
                ("render", format!("renderD{}", 128 + n), 128 + n),
            ] {
                self.node(&format!("dri/{name}"), 226, minor, 0o660)?;
                std::os::unix::fs::symlink(
                    format!("../{name}"),
                    by_path.join(format!("pci-{}-{kind}", gpu.pci)),
                )?;
            }
        }
        for (capability, minor) in capabilities(topology) {
            if capability.ends_with("access") {
                self.node(
                    &format!("nvidia-caps/nvidia-cap{minor}"),
                    CAPS_MAJOR,
                    minor,
                    0o444,
                )?;
            }
        }
        Ok(())
    }

    fn proc_files(&self, topology: &Topology) -> Result<()> {
        let nvidia = "proc/driver/nvidia";
        let version = &topology.driver_version;
        self.write(
            &format!("{nvidia}/version"),
            &format!("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build\n"),
        )?;
        self.write(
            &format!("{nvidia}/params"),
            "ModifyDeviceFiles: 1\nDeviceFileUID: 0\n",
        )?;
        self.write(
            "proc/devices",
            &format!(
                "Character devices:\n  1 mem\n{GPU_MAJOR} nvidia\n{GPU_MAJOR} nvidiactl\n{UVM_MAJOR} nvidia-uvm\n{CAPS_MAJOR} nvidia-caps\n\nBlock devices:\n  7 loop\n"
            ),
        )?;
        for gpu in &topology.gpus {
            self.write(
                &format!("{nvidia}/gpus/{}/information", gpu.pci),
                &format!(
                    "Model: \t\t {}\nGPU UUID: \t {}\nBus Location: \t {}\nDevice Minor: \t {}\n",
                    gpu.name, gpu.uuid, gpu.pci, gpu.minor
                ),
            )?;
        }
        for (capability, minor) in capabilities(topology) {
            self.write(
                &format!("{nvidia}/capabilities/{capability}"),
                &format!("DeviceFileMinor: {minor}\nDeviceFileMode: 292\nDeviceFileModify: 1\n"),
            )?;
        }
        Ok(())
    }

    fn sys_files(&self, topology: &Topology) -> Result<()> {
        for (n, gpu) in topology.gpus.iter().enumerate() {
            let dir = format!("sys/bus/pci/devices/{}", gpu.pci);
            let numa = gpu.numa.map_or("-1".to_owned(), |n| n.to_string());
            for (file, text) in [
                ("vendor", "0x10de".to_owned()),
                ("device", format!("0x{:04x}", gpu.pci_device_id >> 16)),
                ("class", "0x030200".to_owned()),
                ("numa_node", numa),
                (&format!("drm/card{n}/dev"), format!("226:{n}")),
                (&format!("drm/renderD{}/dev", 128 + n), format!("226:{}", 128 + n)),
            ] {
                self.write(&format!("{dir}/{file}"), &format!("{text}\n"))?;
            }
        }
        Ok(())
    }
}

/// The driver's capability files below /proc/driver/nvidia/capabilities, with the minor numbers of their nodes.
fn capabilities(topology: &Topology) -> Vec<(String, u32)> {
    let mut all = vec![("mig/config".to_owned(), 1), ("mig/monitor".to_owned(), 2)];
    let enabled = |g: &&Gpu| g.mig.as_ref().is_some_and(|m| m.enabled);
    for gpu in topology.gpus.iter().filter(enabled) {
        let mut instances: Vec<u32> = Vec::new();
        for device in gpu.mig.iter().flat_map(|m| &m.devices) {
            let dir = format!("gpu{}/mig/gi{}", gpu.minor, device.gi);
            let minor = 3 + gpu.minor * 135 + device.gi * 9;
            if !instances.contains(&device.gi) {
                instances.push(device.gi);
                all.push((format!("{dir}/access"), minor));
            }
            all.push((format!("{dir}/ci{}/access", device.ci), minor + 1 + device.ci));
        }
    }
    all
}

/// A library with its own function and `whose`, which says the file's name, and no need of any other, so that every libc can load it.
fn compile(to: &Path, soname: &str, function: &str) -> Result<()> {
    let mut cc = Command::new("cc")
        .args(["-shared", "-nostdlib", "-fPIC", "-x", "c", "-", "-o"])
        .arg(to)
        .arg(format!("-Wl,-soname,{soname}"))
        .stdin(Stdio::piped())
        .spawn()
        .context("starting cc (tests/setup/build-deps.sh installs it)")?;
    let own = to.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let source = format!(
        "int {function}_fake(void) {{ return 580; }}\nconst char *whose(void) {{ return \"{own}\"; }}\n"
    );
    cc.stdin
        .take()
        .context("no stdin")?
        .write_all(source.as_bytes())?;
    if !cc.wait()?.success() {
        bail!("cc could not make {}", to.display());
    }
    Ok(())
}

/// The library as cargo has built it beside the test that runs.
fn built() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let name = "libslipway_fake_gpu.so";
    let mut folders = exe
        .ancestors()
        .skip(1)
        .take(2)
        .flat_map(|d| [d.join(name), d.join("deps").join(name)]);
    folders
        .find(|p| p.exists())
        .with_context(|| format!("{name} is not beside {}", exe.display()))
}
