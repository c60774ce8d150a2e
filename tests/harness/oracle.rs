//! A real BuildKit to compare with, and an independent reading of OCI archives into file trees.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::cmd;
use crate::lab::{self, Lab};

/// An image as a person would compare two: its merged file tree and its config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The runtime configuration and history.
    pub config: Config,
    /// Path → what is there ("file 0644 0:0 sha256…", "dir 0755 0:0", "link 0:0 → target").
    pub tree: BTreeMap<String, String>,
}

/// The parts of an image config that say what runs and how it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The `config` object as it stands, without keys whose value says nothing.
    pub config: serde_json::Value,
    /// `os/architecture`.
    pub platform: String,
    /// "created_by" of each entry, with " (empty)" where it made no layer.
    pub history: Vec<String>,
}

/// Reads an OCI archive: follows index → manifest → config and layers, applies the layers.
///
/// # Errors
/// It is no OCI archive, or uses a compression that is not gzip, zstd or none.
pub fn read_oci(tar: &Path) -> Result<Image> {
    let blobs = entries(std::fs::File::open(tar)?)?;
    let json = |bytes: &[u8]| -> Result<serde_json::Value> { Ok(serde_json::from_slice(bytes)?) };
    let blob = |v: &serde_json::Value| -> Result<&Vec<u8>> {
        let d = v["digest"].as_str().context("a digest")?.replace(':', "/");
        blobs
            .get(&format!("blobs/{d}"))
            .with_context(|| format!("no blob {d} in {}", tar.display()))
    };
    let mut manifest = json(blobs.get("index.json").context("no index.json")?)?;
    while manifest["manifests"].is_array() {
        let list = manifest["manifests"].as_array().cloned().unwrap_or_default();
        let first = list
            .iter()
            .find(|m| m["platform"]["os"] != "unknown")
            .context("an empty index")?;
        manifest = json(blob(first)?)?;
    }
    let config = json(blob(&manifest["config"])?)?;
    let mut tree = BTreeMap::new();
    for layer in manifest["layers"].as_array().context("layers")? {
        apply(&mut tree, blob(layer)?)?;
    }
    let history = config["history"].as_array().cloned().unwrap_or_default();
    Ok(Image {
        config: Config {
            config: spare(&config["config"]),
            platform: format!(
                "{}/{}",
                config["os"].as_str().unwrap_or(""),
                config["architecture"].as_str().unwrap_or("")
            ),
            history: history
                .iter()
                .map(|h| {
                    let empty = if h["empty_layer"] == true { " (empty)" } else { "" };
                    format!("{}{empty}", h["created_by"].as_str().unwrap_or(""))
                })
                .collect(),
        },
        tree,
    })
}

/// An object without nulls, empty strings and false.
fn spare(v: &serde_json::Value) -> serde_json::Value {
    let Some(o) = v.as_object() else { return v.clone() };
    o.iter()
        .filter(|(_, v)| !v.is_null() && *v != "" && *v != &serde_json::Value::Bool(false))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

fn entries(r: impl Read) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for e in tar::Archive::new(r).entries()? {
        let mut e = e?;
        let name = e.path()?.to_string_lossy().trim_start_matches("./").to_owned();
        let mut bytes = Vec::new();
        e.read_to_end(&mut bytes)?;
        all.insert(name, bytes);
    }
    Ok(all)
}

fn apply(tree: &mut BTreeMap<String, String>, blob: &[u8]) -> Result<()> {
    let reader: Box<dyn Read> = match blob {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::new(blob)?),
        _ => Box::new(blob),
    };
    for e in tar::Archive::new(reader).entries()? {
        let mut e = e?;
        let path = format!(
            "/{}",
            e.path()?
                .to_string_lossy()
                .trim_start_matches("./")
                .trim_matches('/')
        );
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let below = |dir: &str| format!("{}/", dir.trim_end_matches('/'));
        if name == ".wh..wh..opq" {
            let dir = below(path.rsplit_once('/').map_or("", |(d, _)| d));
            tree.retain(|p, _| !p.starts_with(&dir));
            continue;
        }
        if let Some(gone) = name.strip_prefix(".wh.") {
            let gone = format!("{}/{gone}", path.rsplit_once('/').map_or("", |(d, _)| d));
            let inside = below(&gone);
            tree.retain(|p, _| *p != gone && !p.starts_with(&inside));
            continue;
        }
        let h = e.header().clone();
        let (mode, owner) = (h.mode()? & 0o7777, format!("{}:{}", h.uid()?, h.gid()?));
        let target = e.link_name()?.map(|l| l.to_string_lossy().into_owned());
        let what = match h.entry_type() {
            tar::EntryType::Directory => format!("dir {mode:04o} {owner}"),
            tar::EntryType::Symlink => format!("link {owner} → {}", target.unwrap_or_default()),
            tar::EntryType::Link => {
                let t = format!(
                    "/{}",
                    target
                        .unwrap_or_default()
                        .trim_start_matches("./")
                        .trim_matches('/')
                );
                tree.get(&t)
                    .cloned()
                    .with_context(|| format!("a hard link to {t}, which is not there"))?
            }
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                let mut hash = sha2::Sha256::new();
                let mut bytes = Vec::new();
                e.read_to_end(&mut bytes)?;
                hash.update(&bytes);
                format!("file {mode:04o} {owner} {}", hex::encode(&hash.finalize()[..8]))
            }
            other => format!("{other:?} {mode:04o} {owner}"),
        };
        tree.insert(if path.is_empty() { "/".into() } else { path }, what);
    }
    tree.remove("/");
    Ok(())
}

/// What differs, a line each, for a person to read.
pub fn differences(want: &Image, got: &Image) -> String {
    let mut lines = Vec::new();
    if want.config.config != got.config.config {
        lines.push(format!(
            "  config: want {}\n          got  {}",
            want.config.config, got.config.config
        ));
    }
    let (a, b) = (&want.config.history, &got.config.history);
    for n in 0..a.len().max(b.len()) {
        if a.get(n) != b.get(n) {
            lines.push(format!(
                "  history {n}: want {:?}\n             got  {:?}",
                a.get(n),
                b.get(n)
            ));
        }
    }
    for path in want
        .tree
        .keys()
        .chain(got.tree.keys())
        .collect::<std::collections::BTreeSet<_>>()
    {
        let (a, b) = (want.tree.get(path), got.tree.get(path));
        if a != b {
            lines.push(format!("  {path}: want {a:?}, got {b:?}"));
        }
    }
    lines.join("\n")
}

/// containerd with BuildKit on it; killed when dropped.
pub struct Oracle {
    children: Vec<Child>,
    address: String,
}

impl Oracle {
    /// Starts both below `lab`, with plain HTTP to `registry`.
    ///
    /// # Errors
    /// They are not built, or do not answer within 20 seconds.
    pub fn start(lab: &Lab, registry: &str) -> Result<Oracle> {
        let socket = lab.join("oracle/ctrd.sock").display().to_string();
        let address = format!("unix://{}", lab.join("oracle/buildkit.sock").display());
        let containerd = lab.write(
            "oracle/containerd.toml",
            format!(
                "version = 3\nroot = '{0}/root'\nstate = '{0}/run'\ndisabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.runtime', 'io.containerd.cri.v1.images', 'io.containerd.nri.v1.nri']\n[grpc]\n  address = '{socket}'\n[ttrpc]\n  address = '{socket}.ttrpc'\n",
                lab.join("oracle").display()
            ),
        )?;
        let buildkit = lab.write(
            "oracle/buildkitd.toml",
            format!(
                "root = '{}'\n[grpc]\n  address = ['{address}']\n[worker.oci]\n  enabled = false\n[worker.containerd]\n  enabled = true\n  address = '{socket}'\n  namespace = 'oracle'\n  networkMode = 'host'\n  gc = false\n[registry.'{registry}']\n  http = true\n",
                lab.join("oracle/buildkit").display()
            ),
        )?;
        let mut o = Oracle {
            children: Vec::new(),
            address,
        };
        o.spawn(lab, "containerd", &containerd)?;
        let began = Instant::now();
        while !Path::new(&socket).exists() && began.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(50));
        }
        o.spawn(lab, "buildkitd", &buildkit)?;
        while cmd::run(&mut o.ctl(&["debug", "workers"]), Duration::from_secs(10))?.code != 0 {
            if began.elapsed() > Duration::from_secs(40) {
                bail!(
                    "buildkitd does not answer:\n{}",
                    std::fs::read_to_string(lab.join("oracle/buildkitd.log"))?
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(o)
    }

    fn spawn(&mut self, lab: &Lab, program: &str, config: &Path) -> Result<()> {
        let log = std::fs::File::create(lab.join(format!("oracle/{program}.log")))?;
        let path = format!(
            "{}:/usr/sbin:/usr/bin:/sbin:/bin",
            lab::cache().join("tools/bin").display()
        );
        let child = Command::new(lab::tool(program))
            .arg("--config")
            .arg(config)
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {program} (tests/setup/go-tools.sh builds it)"))?;
        self.children.push(child);
        Ok(())
    }

    fn ctl(&self, args: &[&str]) -> Command {
        let mut c = cmd::command(lab::tool("buildctl"), ["--addr", self.address.as_str()]);
        c.args(args);
        c
    }

    /// Builds `dockerfile` on `context`; the OCI archive it makes.
    ///
    /// # Errors
    /// The build failed.
    pub fn build(
        &self,
        lab: &Lab,
        context: &str,
        dockerfile: &Path,
        args: &BTreeMap<String, String>,
    ) -> Result<PathBuf> {
        let out = lab.join("oracle/out.tar");
        let dir = dockerfile.parent().context("a parent")?.display().to_string();
        let file = dockerfile
            .file_name()
            .context("a name")?
            .to_string_lossy()
            .into_owned();
        let mut c = self.ctl(&[
            "build",
            "--no-cache",
            "--progress",
            "plain",
            "--frontend",
            "dockerfile.v0",
        ]);
        c.args([
            "--local",
            &format!("context={context}"),
            "--local",
            &format!("dockerfile={dir}"),
        ]);
        c.args([
            "--opt",
            &format!("filename={file}"),
            "--opt",
            "build-arg:SOURCE_DATE_EPOCH=1700000000",
        ]);
        for (k, v) in args {
            c.args(["--opt", &format!("build-arg:{k}={v}")]);
        }
        c.args(["--output", &format!("type=oci,dest={}", out.display())]);
        cmd::run(&mut c, Duration::from_secs(300))?.ok()?;
        Ok(out)
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        for c in self.children.iter_mut().rev() {
            let _ = c.kill();
            let _ = c.wait();
        }
    }
}
