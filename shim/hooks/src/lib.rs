//! slipway-hooks: what NVIDIA's CDI files have done to a container between its mounts and its start, done by ourselves.
//!
//! Such files carry hooks for the moment when a container's mounts are there and its root is not changed yet: make links,
//! register libraries with the container's loader, keep the driver's files from being changed. They name a program of
//! NVIDIA's, which runs on the host as root and works on a tree that the container's image has made: links in it led that
//! program out of the container more than once (CVE-2024-0132, CVE-2025-23267), and what the image had put into the
//! environment was executed by it (CVE-2025-23266). Here every path is resolved by the kernel inside the container's root file
//! system alone ([`Tree`]): not in what is mounted on it, so that no link of the image's leads to the kernel's files in /proc,
//! which are still writable at that moment, or to a volume. Nothing of the image is executed, and no environment is read.
//!
//! Owns: recognising the hooks ([`recognise`]), their arguments, what each of them does ([`run`]). Two programs use it:
//! slipway-runc, in place of the hooks it recognises, and `slipway-agent cdi-hook`, for other runtimes.
//! Refuses to know: CDI, GPUs, who runs it. Writes to the container's root only, and starts one program: the host's
//! `ldconfig`, in a jail.
#![forbid(unsafe_code)]

mod args;
mod compat;
mod device_files;
mod elf;
mod ldcache;
mod links;
mod loader;

use std::io;
use std::path::Path;

use slipway_sys::root::Root;

pub use args::{Hook, Link, UsageError, VERBS, limits_memory, parse, recognise};

/// A hook that failed, and why.
#[derive(Debug, thiserror::Error)]
#[error("{verb}: {act}")]
pub struct HookError {
    /// Which.
    pub verb: &'static str,
    /// What it attempted.
    pub act: String,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl HookError {
    /// All of it on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(e) = next {
            let said = e.to_string();
            if !text.ends_with(&said) {
                text.push_str(": ");
                text.push_str(&said);
            }
            next = e.source();
        }
        text
    }
}

/// Does what the hooks say, in their order, to the container whose root directory is `root`. The container's mounts are
/// there, and are seen by this process at and below `root`; it is in the container's mount namespace, and has one thread.
///
/// The loader's cache is made once, after all of them: it is the same however often it was asked for. The jail that this
/// needs makes it the last thing a process can do: call this once.
///
/// # Errors
/// The first hook that failed. What was done before it stays, in a container that is not going to be.
pub fn run(hooks: &[Hook], root: &Path) -> Result<(), HookError> {
    let tree = Tree::open(root).map_err(|source| HookError {
        verb: "hooks",
        act: "open the container's root".to_owned(),
        source,
    })?;
    let inside = &tree.root;
    let mut ldconfig = None;
    for hook in hooks {
        let verb = hook.verb();
        let failed = |(act, source): (String, io::Error)| HookError { verb, act, source };
        match hook {
            Hook::CreateSymlinks(links) => links::create(&tree, links),
            Hook::UpdateLdcache {
                folders,
                ldconfig: path,
            } => {
                ldconfig = Some(path.clone());
                ldcache::configure(inside, folders)
            }
            Hook::EnableCudaCompat(wanted) => compat::enable(inside, wanted),
            Hook::DisableDeviceNodeModification => device_files::forbid_modification(root),
            Hook::UpdateApplicationProfile => device_files::write_profile(&tree),
            Hook::Chmod { mode, paths } => links::chmod(&tree, *mode, paths),
        }
        .map_err(failed)?;
    }
    let Some(path) = ldconfig else { return Ok(()) };
    ldcache::make(&path, root).map_err(|source| HookError {
        verb: "update-ldcache",
        act: format!("make the loader's cache with {}", path.display()),
        source,
    })
}

/// Where hooks work: the container's root without anything that is mounted on it, and its /dev.
struct Tree {
    root: Root,
    dev: Option<Root>,
}

impl Tree {
    fn open(path: &Path) -> io::Result<Tree> {
        let alone = slipway_sys::mount::clone_tree(path, false)?;
        Ok(Tree {
            root: Root::from_fd(alone, path),
            dev: Root::open(&path.join("dev")).ok(),
        })
    }

    /// The part that a path of the container's is in, and the path there.
    fn part<'a>(&'a self, path: &'a Path) -> (&'a Root, &'a Path) {
        match (&self.dev, path.strip_prefix("/dev")) {
            (Some(dev), Ok(rest)) => (dev, rest),
            _ => (&self.root, path),
        }
    }
}

/// What a step of a hook attempted, and why it failed.
type Step<T> = Result<T, (String, io::Error)>;

fn step<E: Into<io::Error>>(act: impl Into<String>) -> impl FnOnce(E) -> (String, io::Error) {
    let act = act.into();
    move |e| (act, e.into())
}
