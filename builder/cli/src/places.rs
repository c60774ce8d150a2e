//! Where everything is: flags, then slipwayd's configuration file, then the defaults. Opens the store.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use slipway_engine::Surroundings;
use slipway_image::{OwnerKind, RegistryConfig, Store, Upkeep};

use crate::args::Global;

const ROOT: &str = "/var/lib/slipway";
const STATE: &str = "/run/slipway";
const CONFIG: &str = "/etc/slipway/config.toml";
const CERTS: &str = "/etc/slipway/certs.d";
const CNI_CONF: &str = "/etc/cni/net.d";
const CNI_BIN: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];
const CDI: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// The keys of slipwayd's configuration that matter here; slipwayd itself refuses unknown ones.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    root: Option<PathBuf>,
    state: Option<PathBuf>,
    runtime: Runtime,
    network: Network,
    cdi: Cdi,
    images: Images,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Runtime {
    shim: Option<PathBuf>,
    worker: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Network {
    conf_dir: Option<PathBuf>,
    bin_dirs: Option<Vec<PathBuf>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cdi {
    spec_dirs: Option<Vec<PathBuf>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Images {
    certs_dir: Option<PathBuf>,
    docker_config: Option<PathBuf>,
    insecure_registries: Vec<String>,
    pin_builds_days: Option<u32>,
    build_cache_unused_days: Option<u32>,
    build_cache_percent: Option<u8>,
}

impl Images {
    /// The store's limits, as slipwayd has them: 0 days are no limit.
    fn upkeep(&self) -> Upkeep {
        let default = Upkeep::default();
        let days =
            |days: u32| (days > 0).then(|| std::time::Duration::from_secs(u64::from(days) * 24 * 60 * 60));
        Upkeep {
            pin_builds_for: self.pin_builds_days.map_or(default.pin_builds_for, days),
            cache_unused_for: self
                .build_cache_unused_days
                .map_or(default.cache_unused_for, days),
            cache_percent: self.build_cache_percent.unwrap_or(default.cache_percent),
        }
    }
}

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Places {
    pub root: PathBuf,
    pub state: PathBuf,
    shim: Option<PathBuf>,
    worker: Option<PathBuf>,
    cni_conf: PathBuf,
    cni_bin: Vec<PathBuf>,
    cdi: Vec<PathBuf>,
    certs: PathBuf,
    docker_config: Option<PathBuf>,
    insecure: Vec<String>,
    /// What keeps the store from growing without end.
    pub upkeep: Upkeep,
}

impl Places {
    /// Resolves flags, file and defaults.
    pub fn resolve(flags: &Global) -> Result<Places> {
        let file = read(flags.config.as_deref())?;
        let or = |flag: &Option<PathBuf>, file: Option<PathBuf>, default: &str| {
            flag.clone().or(file).unwrap_or_else(|| PathBuf::from(default))
        };
        let dirs = |flags: &[PathBuf], file: Option<Vec<PathBuf>>, default: &[&str]| match (flags, file) {
            ([], Some(dirs)) => dirs,
            ([], None) => default.iter().map(PathBuf::from).collect(),
            (dirs, _) => dirs.to_vec(),
        };
        let absolute = |path: PathBuf| {
            std::path::absolute(&path).with_context(|| format!("cannot make {} absolute", path.display()))
        };
        Ok(Places {
            upkeep: file.images.upkeep(),
            root: absolute(or(&flags.root, file.root, ROOT))?,
            state: absolute(or(&flags.state, file.state, STATE))?,
            shim: file.runtime.shim,
            worker: file.runtime.worker,
            cni_conf: or(&flags.cni_conf_dir, file.network.conf_dir, CNI_CONF),
            cni_bin: dirs(&flags.cni_bin_dir, file.network.bin_dirs, &CNI_BIN),
            cdi: dirs(&flags.cdi_spec_dir, file.cdi.spec_dirs, &CDI),
            certs: or(&flags.certs_dir, file.images.certs_dir, CERTS),
            docker_config: file
                .images
                .docker_config
                .or_else(RegistryConfig::user_docker_config),
            insecure: file.images.insecure_registries,
        })
    }

    /// Opens the store, if there is one: a misspelt root is not one that is empty.
    pub async fn store_that_is_there(&self, kind: OwnerKind) -> Result<Store> {
        let catalog = self.root.join("catalog.db");
        if let Err(error) = std::fs::metadata(&catalog)
            && error.kind() == std::io::ErrorKind::NotFound
        {
            bail!(
                "there is no store at {}: `slipway build`, `pull` and `load` make one, and so does slipwayd; --root names another",
                self.root.display()
            );
        }
        self.store(kind).await
    }

    /// Opens the store, which is made where there is none.
    pub async fn store(&self, kind: OwnerKind) -> Result<Store> {
        let (root, pinned) = (self.root.clone(), self.upkeep.pin_builds_for);
        let open = move || {
            let store = Store::open(&root, kind)?;
            store.pin_builds_for(pinned);
            Ok::<_, slipway_image::StoreError>(store)
        };
        tokio::task::spawn_blocking(open).await?.with_context(|| {
            format!(
                "cannot open the store at {} (are you root? --root names another)",
                self.root.display()
            )
        })
    }

    /// What a build needs around it.
    pub fn surroundings(&self) -> Surroundings {
        Surroundings::find(
            self.state.clone(),
            self.shim.as_deref(),
            self.worker.as_deref(),
            self.cni_conf.clone(),
            self.cni_bin.clone(),
            self.cdi.clone(),
        )
    }

    /// How registries are spoken to.
    pub fn registries(&self) -> RegistryConfig {
        RegistryConfig {
            certs_dir: Some(self.certs.clone()),
            docker_config: self.docker_config.clone(),
            insecure: self.insecure.clone(),
            user_agent: format!("slipway/{}", env!("CARGO_PKG_VERSION")),
            ..RegistryConfig::default()
        }
    }
}

fn read(given: Option<&Path>) -> Result<File> {
    let path = given.unwrap_or(Path::new(CONFIG));
    match std::fs::read_to_string(path) {
        Ok(text) => toml::from_str(&text).with_context(|| format!("cannot understand {}", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && given.is_none() => Ok(File::default()),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_spoken_to_as_slipwayds_configuration_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "[images]\ninsecure_registries = [\"registry.lan:5000\"]\n").unwrap();
        let flags = Global {
            config: Some(path),
            ..Global::default()
        };
        let places = Places::resolve(&flags).unwrap();
        assert_eq!(places.registries().insecure, ["registry.lan:5000"]);
    }
}
