//! Images made by hand and sent to a real registry as any client would: for what no builder makes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::Digest as _;

/// The repository of a registry that images are forged into.
pub struct Forge {
    host: String,
    repository: String,
}

/// One layer: its gzip blob, and the digest of its tar.
#[derive(Clone)]
pub struct Layer {
    /// The compressed tar.
    pub blob: Vec<u8>,
    /// "sha256:…" of the tar.
    pub diff_id: String,
}

/// An entry of a layer's tar, with whatever name and size one likes.
#[derive(Clone)]
pub struct Entry {
    name: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    mode: u32,
    /// What the header claims, when it is not the contents' length.
    claimed: Option<u64>,
    contents: Vec<u8>,
}

impl Entry {
    fn new(kind: u8, name: &str) -> Entry {
        Entry {
            name: name.into(),
            link: Vec::new(),
            kind,
            mode: 0o755,
            claimed: None,
            contents: Vec::new(),
        }
    }

    /// A file.
    pub fn file(name: &str, contents: &[u8]) -> Entry {
        Entry {
            contents: contents.to_vec(),
            mode: 0o644,
            ..Entry::new(b'0', name)
        }
    }

    /// A directory.
    pub fn dir(name: &str) -> Entry {
        Entry::new(b'5', name)
    }

    /// A symbolic link.
    pub fn link(name: &str, target: &str) -> Entry {
        Entry {
            link: target.into(),
            ..Entry::new(b'2', name)
        }
    }

    /// A hard link.
    pub fn hard(name: &str, target: &str) -> Entry {
        Entry {
            link: target.into(),
            ..Entry::new(b'1', name)
        }
    }

    /// With these permissions.
    pub fn mode(self, mode: u32) -> Entry {
        Entry { mode, ..self }
    }

    /// With a header that claims so many bytes.
    pub fn claiming(self, bytes: u64) -> Entry {
        Entry {
            claimed: Some(bytes),
            ..self
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut block = [0u8; 512];
        let size = self.claimed.unwrap_or(self.contents.len() as u64);
        let name = &self.name[..self.name.len().min(100)];
        block[..name.len()].copy_from_slice(name);
        let link = &self.link[..self.link.len().min(100)];
        block[157..157 + link.len()].copy_from_slice(link);
        for (at, digits, value) in [
            (100, 7, u64::from(self.mode)),
            (108, 7, 0),
            (116, 7, 0),
            (124, 11, size),
            (136, 11, 1_700_000_000),
        ] {
            let text = format!("{value:0digits$o}");
            block[at..at + digits].copy_from_slice(text.as_bytes());
        }
        block[156] = self.kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let mut out = block.to_vec();
        out.extend_from_slice(&self.contents);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }
}

/// A layer of these entries.
///
/// # Errors
/// Compressing does not fail.
pub fn layer(entries: &[Entry]) -> Result<Layer> {
    let mut tar: Vec<u8> = entries.iter().flat_map(Entry::bytes).collect();
    tar.resize(tar.len() + 1024, 0);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&tar)?;
    Ok(Layer {
        blob: encoder.finish()?,
        diff_id: digest(&tar),
    })
}

/// "sha256:…" of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)))
}

impl Forge {
    /// Of a registry at "127.0.0.1:port".
    pub fn new(host: &str, repository: &str) -> Forge {
        Forge {
            host: host.to_owned(),
            repository: repository.to_owned(),
        }
    }

    /// The full name of a tag.
    pub fn name(&self, tag: &str) -> String {
        format!("{}/{}:{tag}", self.host, self.repository)
    }

    /// Sends an image of these layers; its name. `change` may falsify the manifest before it goes.
    ///
    /// # Errors
    /// The registry refuses something.
    pub fn image(&self, tag: &str, layers: &[Layer], change: impl FnOnce(&mut Value)) -> Result<String> {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = json!({
            "architecture": architecture, "os": "linux", "config": { "Cmd": ["/x"] },
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|l| &l.diff_id).collect::<Vec<_>>() },
        })
        .to_string();
        self.blob(config.as_bytes())?;
        for layer in layers {
            self.blob(&layer.blob)?;
        }
        let descriptor = |bytes: &[u8], kind: &str| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(bytes), "size": bytes.len() });
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor(config.as_bytes(), "config.v1+json"),
            "layers": layers.iter().map(|l| descriptor(&l.blob, "layer.v1.tar+gzip")).collect::<Vec<_>>(),
        });
        change(&mut manifest);
        let kind = manifest["mediaType"].as_str().unwrap_or_default().to_owned();
        let path = format!("/v2/{}/manifests/{tag}", self.repository);
        let (status, _, body) = self.call("PUT", &path, &kind, manifest.to_string().as_bytes())?;
        ensure!(status == 201, "PUT {path}: {status} {body}");
        Ok(self.name(tag))
    }

    /// Sends a blob.
    ///
    /// # Errors
    /// The registry refuses it.
    pub fn blob(&self, bytes: &[u8]) -> Result<()> {
        let start = format!("/v2/{}/blobs/uploads/", self.repository);
        let (status, location, body) = self.call("POST", &start, "", b"")?;
        ensure!(status == 202, "POST {start}: {status} {body}");
        let place = location.context("an upload without a Location")?;
        let place = match place
            .split_once("://")
            .and_then(|(_, rest)| rest.find('/').map(|at| &rest[at..]))
        {
            Some(path) => path.to_owned(),
            None => place,
        };
        let with = if place.contains('?') { '&' } else { '?' };
        let path = format!("{place}{with}digest={}", digest(bytes));
        let (status, _, body) = self.call("PUT", &path, "application/octet-stream", bytes)?;
        ensure!(status == 201, "PUT {path}: {status} {body}");
        Ok(())
    }

    /// One request; status, Location and body of the answer.
    fn call(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> Result<(u16, Option<String>, String)> {
        let mut stream = TcpStream::connect(&self.host)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            self.host,
            body.len()
        )?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|s| s.parse().ok())
            .context("a status")?;
        let location = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("location")
                .then(|| value.trim().to_owned())
        });
        Ok((status, location, body.to_owned()))
    }
}
