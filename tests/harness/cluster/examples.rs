//! What manifests/examples needs in a cluster: images in node 1's store, a registry that every node trusts, this cluster's places.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Cluster;
use crate::{cmd, lab};

/// The host in the names of images that nodes hand each other.
const REGISTRY: &str = "registry.slipway.local:5000";

impl Cluster {
    /// Builds a stage of tests/images/Dockerfile into node `n`'s store as `name`.
    ///
    /// # Errors
    /// Its context is not in the cache, or the build fails.
    pub fn build_stage(&self, n: usize, stage: &str, name: &str) -> Result<()> {
        let context = lab::cache().join("lab-images");
        ensure!(
            context.join("made").exists(),
            "{} is not there (tests/setup/lab-rootfs.sh makes it)",
            context.display()
        );
        let context = context.display().to_string();
        self.build(n, &["--target", stage, "-t", name, &context])?;
        if self.has_containerd(n) {
            self.hand_over(n, name)?;
        }
        Ok(())
    }

    pub(super) fn build(&self, n: usize, args: &[&str]) -> Result<()> {
        let mut all = vec!["build", "-q"];
        all.extend(args);
        cmd::run(&mut self.slipway(n, &all), Duration::from_secs(300))?
            .ok()
            .with_context(|| format!("slipway {}", all.join(" ")))?;
        Ok(())
    }

    /// Makes everything the examples need, and writes them with this cluster's places; the directory they are in.
    ///
    /// # Errors
    /// A base image is not in the cache, or a build fails.
    pub fn prepare_examples(&self) -> Result<PathBuf> {
        let base = lab::cache().join("demo/base");
        ensure!(
            base.join("rootfs.tar").exists(),
            "{} is not there (tests/setup/base-image.sh makes it)",
            base.display()
        );
        self.build_stage(1, "busybox", "slipway.local/tools:1")?;
        self.build_stage(1, "registry", "slipway.local/registry:1")?;
        self.build(1, &["-t", "slipway.local/python:3", &base.display().to_string()])?;
        self.trust_registry(REGISTRY, &format!("http://{}:5000", self.net().node(1)))?;
        let (from, to) = (
            lab::repo().join("manifests/examples"),
            self.dir().join("examples"),
        );
        std::fs::create_dir_all(&to)?;
        for e in std::fs::read_dir(&from).with_context(|| format!("reading {}", from.display()))? {
            let e = e?;
            if e.path().extension().is_some_and(|x| x == "yaml") {
                let text = std::fs::read_to_string(e.path())?;
                std::fs::write(to.join(e.file_name()), self.localise(&text, 1))?;
            }
        }
        Ok(to)
    }
}
