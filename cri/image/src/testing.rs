//! What the tests of this crate share: stores on temporary roots, layers and images made by hand, and children that
//! can be killed.

use crate::digest::{DiffId, Digest};
use crate::image::{Image, NewImage, PulledManifest, Writer};
use crate::reference::Reference;
use crate::store::{LayerSource, Lease, OwnerKind, Store, UnpackOptions};
use crate::{Result, StoreError};
use oci_spec::image::{Descriptor, MediaType};
use slipway_snapshot::tar::{Header, Kind, Writer as TarWriter};
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Whether the test may run; says so loudly when not.
pub(crate) fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: it needs root");
    }
    root
}

/// A store on a root of its own.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Bed {
    pub(crate) fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("root"), OwnerKind::Daemon).unwrap();
        Bed { dir, store }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Another opening of the same root.
    pub(crate) fn again(&self, kind: OwnerKind) -> Store {
        Store::open(&self.root(), kind).unwrap()
    }

    /// What lies in a directory under the root.
    pub(crate) fn list(&self, dir: &str) -> Vec<String> {
        list(&self.root().join(dir))
    }

    /// Snapshots on disk.
    pub(crate) fn snapshots(&self) -> Vec<String> {
        self.list("snapshots")
            .into_iter()
            .filter(|name| name != ".empty")
            .collect()
    }

    /// A directory to mount on.
    pub(crate) fn target(&self) -> PathBuf {
        let target = self.dir.path().join("target");
        std::fs::create_dir_all(&target).unwrap();
        target
    }
}

pub(crate) fn list(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A tar of files (`path`, `contents`); a path that ends in a slash is a directory.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = TarWriter::new(Vec::new());
    for (path, contents) in files {
        let kind = if path.ends_with('/') {
            Kind::Directory
        } else {
            Kind::File
        };
        let mode = if kind == Kind::Directory { 0o755 } else { 0o644 };
        let header = Header {
            mode,
            size: contents.len() as u64,
            ..Header::new(*path, kind)
        };
        writer.file(&header, &mut &contents[..]).unwrap();
    }
    writer.finish().unwrap().0
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer as a registry would hand it over.
#[derive(Clone)]
pub(crate) struct Blob {
    pub(crate) bytes: Vec<u8>,
    pub(crate) diff_id: DiffId,
    pub(crate) descriptor: Descriptor,
}

impl Blob {
    pub(crate) fn new(tar: &[u8], media_type: MediaType) -> Blob {
        let bytes = match media_type {
            MediaType::ImageLayerGzip => gzip(tar),
            MediaType::ImageLayerZstd => zstd::bulk::compress(tar, 1).unwrap(),
            _ => tar.to_vec(),
        };
        let descriptor = Descriptor::new(media_type, bytes.len() as u64, Digest::of(&bytes));
        Blob {
            bytes,
            diff_id: Digest::of(tar).into(),
            descriptor,
        }
    }

    pub(crate) fn gzip(files: &[(&str, &[u8])]) -> Blob {
        Blob::new(&tar(files), MediaType::ImageLayerGzip)
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    pub(crate) fn source(&self) -> LayerSource {
        self.source_of(Cursor::new(self.bytes.clone()))
    }

    pub(crate) fn source_of(&self, reader: impl crate::store::Blob + 'static) -> LayerSource {
        LayerSource {
            descriptor: self.descriptor.clone(),
            reader: Box::new(reader),
            verified: false,
            diff_id: self.diff_id,
        }
    }
}

pub(crate) fn config(diffs: &[DiffId], note: &str) -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({
        "architecture": "amd64", "os": "linux", "author": note, "config": {},
        "rootfs": { "type": "layers", "diff_ids": diffs },
    }))
    .unwrap()
}

pub(crate) fn name(text: &str) -> Reference {
    Reference::parse(text).unwrap()
}

/// What a pull does: blobs into the content store, layers unpacked, the image committed.
pub(crate) fn pull(store: &Store, blobs: &[Blob], names: &[&str], note: &str) -> Result<Image> {
    let lease = store.lease("test pull")?;
    for blob in blobs {
        let mut ingest = store.ingest(&lease)?;
        ingest
            .write_all(&blob.bytes)
            .map_err(|source| match slipway_snapshot::is_full(&source) {
                true => StoreError::DiskFull {
                    act: "write a blob".to_owned(),
                },
                false => StoreError::Read {
                    what: "a blob".to_owned(),
                    source,
                },
            })?;
        ingest.finish(Some(&blob.digest()), Some(blob.bytes.len() as u64))?;
    }
    let sources = blobs.iter().map(Blob::source).collect();
    store.unpack_layers(sources, &UnpackOptions::default(), &lease)?;
    commit(store, &lease, blobs, names, note)
}

pub(crate) fn commit(
    store: &Store,
    lease: &Lease,
    blobs: &[Blob],
    names: &[&str],
    note: &str,
) -> Result<Image> {
    let diffs: Vec<DiffId> = blobs.iter().map(|blob| blob.diff_id).collect();
    let config = config(&diffs, note);
    let layers: Vec<Descriptor> = blobs.iter().map(|blob| blob.descriptor.clone()).collect();
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": MediaType::ImageManifest,
        "config": Descriptor::new(MediaType::ImageConfig, config.len() as u64, Digest::of(&config)),
        "layers": layers,
    }))
    .unwrap();
    let digest = Digest::of(&manifest);
    store.commit_image(NewImage {
        config: &config,
        manifest: Some(PulledManifest {
            bytes: &manifest,
            media_type: MediaType::ImageManifest.to_string(),
            layers,
        }),
        names: names.iter().map(|text| name(text)).collect(),
        repo_digests: names
            .iter()
            .map(|text| name(text).with_digest(digest).to_string())
            .collect(),
        writer: Writer::Pull,
        lease,
    })
}

/// What a build does: one step that writes a file, on a base.
pub(crate) fn build(
    store: &Store,
    base: Option<&Image>,
    file: &str,
    contents: &[u8],
    tag: &str,
) -> Result<Image> {
    let lease = store.lease("test build")?;
    let parent = base.and_then(|base| base.chain);
    let key = format!("build-{file}");
    let active = store.prepare(&key, parent.as_ref(), &lease)?;
    std::fs::write(active.upper.join(file), contents).unwrap();
    let layer = store.seal_layer(active, &crate::LayerOptions::default(), parent.as_ref(), &lease)?;
    let mut diffs = base.map(|base| base.layers.clone()).unwrap_or_default();
    diffs.push(layer.diff_id);
    store.commit_image(NewImage {
        config: &config(&diffs, tag),
        manifest: None,
        names: vec![name(tag)],
        repo_digests: Vec::new(),
        writer: Writer::Build,
        lease: &lease,
    })
}

/// A child of the test: the same program, told to run one test only, which then does what `role` says.
pub(crate) struct Role {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

const ROLE: &str = "SLIPWAY_TEST_ROLE";

impl Role {
    /// Starts the test `test` in a process of its own.
    pub(crate) fn start(test: &str, role: &str, root: &Path, failpoint: Option<&str>) -> Role {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env("SLIPWAY_TEST_ROOT", root);
        if let Some(failpoint) = failpoint {
            command.env("SLIPWAY_STORE_FAILPOINT", failpoint);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Role { child, output }
    }

    /// The role this process has to play, and the root.
    pub(crate) fn mine() -> Option<(String, PathBuf)> {
        let role = std::env::var(ROLE).ok()?;
        Some((role, PathBuf::from(std::env::var_os("SLIPWAY_TEST_ROOT")?)))
    }

    /// Waits until the child has said it is ready.
    pub(crate) fn wait_ready(&mut self) {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(
                self.output.read_line(&mut line).unwrap(),
                0,
                "the child ended before it was ready"
            );
            if line.contains("READY") {
                return;
            }
        }
    }

    /// To be called by the child: says so, and waits to be killed.
    pub(crate) fn ready_and_wait() {
        println!("\nREADY");
        let mut nothing = String::new();
        let _ = std::io::stdin().read_line(&mut nothing);
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end; whether it ended well, and its signal.
    pub(crate) fn wait(mut self) -> (bool, Option<i32>) {
        use std::os::unix::process::ExitStatusExt;
        drop(self.child.stdin.take());
        let mut rest = String::new();
        let _ = self.output.read_to_string(&mut rest);
        let status = self.child.wait().unwrap();
        (status.success(), status.signal())
    }
}
