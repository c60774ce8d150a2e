//! What the registry tests share: synthetic images, a store of their own, Debian's registry, and a server that
//! misbehaves on demand.
#![allow(dead_code, clippy::unwrap_used)]

pub mod fake;
pub mod image;
pub mod real;

use slipway_image::{OwnerKind, Platform, Progress, ProgressEvent, Puller, Pusher, RegistryConfig, Store};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A store in a temporary directory.
#[derive(Debug)]
pub struct Node {
    pub dir: TempDir,
    pub store: Store,
}

impl Node {
    pub fn new() -> Node {
        let dir = tempfile::Builder::new()
            .prefix("slipway-test-")
            .tempdir()
            .unwrap();
        let store = Store::open(&dir.path().join("root"), OwnerKind::Daemon).unwrap();
        Node { dir, store }
    }

    pub fn puller(&self, config: RegistryConfig) -> Puller {
        Puller::new(self.store.clone(), config)
    }

    pub fn pusher(&self, config: RegistryConfig) -> Pusher {
        Pusher::new(self.store.clone(), config)
    }

    fn names(&self, below: &str) -> Vec<PathBuf> {
        let dir = self.dir.path().join("root").join(below);
        let entries = std::fs::read_dir(dir).unwrap();
        let visible = |path: &PathBuf| !path.file_name().unwrap().to_string_lossy().starts_with('.');
        entries
            .map(|entry| entry.unwrap().path())
            .filter(visible)
            .collect()
    }

    /// The files of complete blobs.
    pub fn blobs(&self) -> Vec<PathBuf> {
        self.names("content/sha256")
    }

    /// What a layer of an image has at a path, read from its own directory.
    pub fn layer_file(&self, image: &slipway_image::Image, layer: usize, path: &str) -> Option<Vec<u8>> {
        let chain = slipway_image::ChainId::all(&image.layers)[layer];
        let snapshot = self.store.layer(&chain).unwrap().unwrap().snapshot;
        let dir = self.dir.path().join("root/snapshots").join(snapshot.to_string());
        std::fs::read(dir.join("fs").join(path)).ok()
    }

    /// Nothing is half there: no ingest, no directory that no layer has. Removal runs beside us: it gets a moment.
    pub fn assert_nothing_half_there(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let ingests = self.names("content/ingest");
            let snapshots = self.names("snapshots");
            let mut layers: Vec<_> = self
                .store
                .images()
                .unwrap()
                .iter()
                .flat_map(|i| i.layers.clone())
                .collect();
            layers.sort();
            layers.dedup();
            if ingests.is_empty() && snapshots.len() <= layers.len() {
                return;
            }
            assert!(Instant::now() < deadline, "left over: {ingests:?}, {snapshots:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Fast to give up and quick to try again.
pub fn quick() -> RegistryConfig {
    RegistryConfig {
        attempts: 5,
        first_pause: Duration::from_millis(5),
        read_timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_secs(2),
        ..RegistryConfig::default()
    }
}

pub fn amd64() -> Platform {
    Platform::new("linux", "amd64", None)
}

/// Keeps all events.
#[derive(Default)]
pub struct Heard(pub Mutex<Vec<ProgressEvent>>);

impl Heard {
    pub fn events(&self) -> Vec<ProgressEvent> {
        self.0.lock().unwrap().clone()
    }

    pub fn any(&self, is: impl Fn(&ProgressEvent) -> bool) -> bool {
        self.events().iter().any(is)
    }
}

impl Progress for Heard {
    fn event(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// A small filesystem of its own, unmounted in the end.
pub struct Small(pub TempDir);

impl Small {
    /// `None`, loudly, where nothing may be mounted.
    pub fn mount(size: &str) -> Option<Small> {
        let dir = tempfile::Builder::new()
            .prefix("slipway-test-")
            .tempdir()
            .unwrap();
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .status();
        if status.is_ok_and(|status| status.success()) {
            return Some(Small(dir));
        }
        let _ = writeln!(std::io::stderr(), "SKIPPED: cannot mount a tmpfs");
        None
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let done = std::process::Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// Whether we may change owners and mount; says so loudly when not.
pub fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let _ = writeln!(std::io::stderr(), "SKIPPED: this test needs root");
    }
    root
}

pub fn write(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}
