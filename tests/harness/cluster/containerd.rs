//! A node with containerd and runc under its kubelet: what the same kubelet says, counts and costs there.

use std::time::Duration;

use anyhow::{Context, Result};

use super::Cluster;
use crate::{cmd, lab};

/// What containerd's sandboxes run: it has to go on for as long as its pod does.
const SANDBOX: &str = "slipway.test/sandbox:1";

impl Cluster {
    /// Whether node `n` has containerd instead of slipwayd.
    pub fn has_containerd(&self, n: usize) -> bool {
        self.options.containerd.contains(&n)
    }

    pub(super) fn containerd_config(&self, n: usize) -> String {
        let dir = self.node_dir(n);
        let at = |p: &str| dir.join(p).display().to_string();
        format!(
            "version = 3
root = '{root}'
state = '{state}'
disabled_plugins = ['io.containerd.nri.v1.nri', 'io.containerd.snapshotter.v1.devmapper', 'io.containerd.internal.v1.opt']
[grpc]
  address = '{socket}'
[ttrpc]
  address = '{socket}.ttrpc'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{SANDBOX}'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '{certs}'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{cni}']
  conf_dir = '{conf}'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
",
            root = at("containerd"),
            state = at("state"),
            socket = self.socket(n).display(),
            certs = at("certs.d"),
            cni = lab::cni_bin().display(),
            conf = at("cni"),
        )
    }

    /// Starts it, and hands it the image of its sandboxes where it is new.
    pub(super) fn start_containerd(&self, n: usize) -> Result<()> {
        let mut c = self.on(n, &lab::tool("containerd"));
        let tools = lab::tool("runc").with_file_name("");
        c.arg("--config").arg(self.node_dir(n).join("config.toml")).env(
            "PATH",
            format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools.display()),
        );
        self.processes().start(&self.runtime(n), &c)?;
        let made = self.node_dir(n).join("sandbox");
        if made.exists() {
            return Ok(());
        }
        self.build_stage(n, "pause", SANDBOX)?;
        std::fs::write(made, "").context("noting that the sandbox image is there")
    }

    /// Imports an image of the node's own Slipway store, where builds go, into containerd's.
    pub(super) fn hand_over(&self, n: usize, image: &str) -> Result<()> {
        let tar = self.node_dir(n).join("handed-over.tar").display().to_string();
        cmd::run(
            &mut self.slipway(n, &["save", "-o", &tar, image]),
            Duration::from_secs(60),
        )?
        .ok()?;
        let socket = self.socket(n).display().to_string();
        // ctr waits for a daemon that is just starting.
        let import = [
            "--address",
            &socket,
            "--connect-timeout",
            "20s",
            "-n",
            "k8s.io",
            "images",
            "import",
            &tar,
        ];
        cmd::run(
            &mut cmd::command(lab::tool("ctr"), import),
            Duration::from_secs(60),
        )?
        .ok()
        .with_context(|| format!("importing {image} into containerd"))?;
        std::fs::remove_file(&tar)?;
        Ok(())
    }
}
