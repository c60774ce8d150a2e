//! A real registry (the distribution's docker-registry) on a loopback port of its own.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lab::Lab;

/// A running registry; killed when dropped.
pub struct Registry {
    child: Child,
    port: u16,
    storage: PathBuf,
}

impl Registry {
    /// Starts one with its storage below `lab`. `htpasswd`: the path of a password file, for basic authentication.
    ///
    /// # Errors
    /// It is not installed, or does not answer within 10 seconds.
    pub fn start(lab: &Lab, htpasswd: Option<&std::path::Path>) -> Result<Registry> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let auth = htpasswd
            .map(|p| format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", p.display()))
            .unwrap_or_default();
        let storage = lab.join(format!("registry-{port}"));
        let config = lab.write(
            format!("registry-{port}.yml"),
            format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n{auth}",
                storage.display()
            ),
        )?;
        let log = std::fs::File::create(lab.join(format!("registry-{port}.log")))?;
        let child = std::process::Command::new("docker-registry")
            .arg("serve")
            .arg(config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting docker-registry (tests/setup/test-deps.sh installs it)")?;
        let r = Registry { child, port, storage };
        let began = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            if began.elapsed() > Duration::from_secs(10) {
                bail!("docker-registry does not listen on port {port}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(r)
    }

    /// Writes a tree of hosts.toml files below `lab` that sends pulls from `hosts` here instead; its directory.
    ///
    /// # Errors
    /// A file could not be written.
    pub fn mirror(&self, lab: &Lab, hosts: &[&str]) -> Result<std::path::PathBuf> {
        for host in hosts {
            let text = format!(
                "server = \"http://{0}\"\n[host.\"http://{0}\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
                self.host()
            );
            lab.write(format!("certs.d/{host}/hosts.toml"), text)?;
        }
        Ok(lab.join("certs.d"))
    }

    /// The file it keeps a blob ("sha256:…") in.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.storage
            .join("docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }

    /// "127.0.0.1:port".
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
