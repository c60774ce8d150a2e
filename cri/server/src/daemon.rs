//! Everything a verb may need, wired once at start: the recipe of the whole program.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slipway_image::{LocalBuilds, OwnerKind, Puller, RegistryConfig, Store};
use slipway_network::Cni;
use slipway_shim_client::Launcher;
use slipway_spec::HostFacts;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::apparmor::Apparmor;
use crate::config::Config;
use crate::container::Container;
use crate::container::blockio::Classes;
use crate::container::bundle::Bundle;
use crate::error::Error;
use crate::events::Events;
use crate::ids::ContainerId;
use crate::instance::Paths;
use crate::pod::Pod;
use crate::pod::network::Releases;
use crate::pod_cidr::PodCidr;
use crate::records::Records;
use crate::recover::janitor::Janitor;
use crate::registry::Registry;

/// Pulls at once; more wait. The downloads of all together are bounded by the configuration.
pub const PULLS: usize = 32;
/// Containers whose host paths are looked at at once: threads that a dead mount of the host's can hold.
const HOST_PATHS: usize = 16;
/// How long verbs in progress may take to end after SIGTERM. The next start finishes or undoes what does not.
const FINISH: Duration = Duration::from_secs(8);

/// The running instance.
pub struct Daemon {
    pub config: Config,
    pub paths: Paths,
    pub boot_id: String,
    pub host: HostFacts,
    pub apparmor: Apparmor,
    pub block_io: Classes,
    /// Pods can have user namespaces of their own: the root's file system can be mounted with mapped owners.
    pub maps_owners: bool,
    pub store: Store,
    pub records: Records,
    pub registry: Registry,
    pub launcher: Launcher,
    pub cni: Cni,
    pub releases: Releases,
    pub cdi: slipway_cdi::Cache,
    pub puller: Puller,
    pub pulls: Semaphore,
    /// Looks at paths of the host's, any of which may hang for ever.
    pub host_paths: Arc<Semaphore>,
    pub janitor: Janitor,
    pub pod_cidr: PodCidr,
    pub events: Events,
    /// Mutating verbs in progress: waited for at shutdown.
    pub verbs: TaskTracker,
    /// Everything else that runs beside them: dropped at shutdown.
    pub background: TaskTracker,
    pub stopping: CancellationToken,
}

impl Daemon {
    /// Opens the store and puts the parts together. Blocks: to be called on a blocking thread.
    pub fn build(config: Config, paths: Paths) -> Result<Daemon, Error> {
        let launcher = Launcher::find(config.runtime.shim.as_deref(), config.runtime.worker.as_deref())
            .map_err(Error::shim("find the programs", &"the shim"))?;
        let block_io = Classes::load(config.runtime.blockio_config_file.as_deref())?;
        let store = Store::open(&config.root, OwnerKind::Daemon).map_err(Error::store("open everything"))?;
        store.pin_builds_for(config.images.upkeep().pin_builds_for);
        let mut host = HostFacts::gather(|path: &Path| std::fs::read(path))
            .map_err(Error::io("look at the host through", "/proc"))?;
        let apparmor = Apparmor::start(&host, &config.runtime.apparmor_profile, &paths.state);
        host.apparmor_default = apparmor.default_profile();
        Ok(Daemon {
            boot_id: boot_id(&config.boot_id_file)?,
            host,
            apparmor,
            block_io,
            maps_owners: slipway_snapshot::maps_owners(&config.root),
            records: Records::new(store.clone()),
            registry: Registry::default(),
            launcher,
            cni: Cni::new(config.network.conf_dir.clone(), config.network.bin_dirs.clone()),
            releases: Releases::default(),
            cdi: slipway_cdi::Cache::new(config.cdi.spec_dirs.clone()),
            puller: Puller::new(store.clone(), registry_config(&config)),
            pulls: Semaphore::new(PULLS),
            host_paths: Arc::new(Semaphore::new(HOST_PATHS)),
            janitor: Janitor::default(),
            pod_cidr: PodCidr::default(),
            events: Events::default(),
            verbs: TaskTracker::new(),
            background: TaskTracker::new(),
            stopping: CancellationToken::new(),
            store,
            paths,
            config,
        })
    }

    pub fn bundle(&self, id: &ContainerId) -> Bundle {
        Bundle::new(&self.paths.containers, id)
    }

    /// A pod that somebody may have been told of.
    pub fn visible_pod(&self, id: &str) -> Result<Arc<Pod>, Error> {
        let pod = self.registry.pod(id)?;
        if pod.hidden() {
            Err(Error::NotFound {
                kind: "pod",
                id: id.to_owned(),
            })
        } else {
            Ok(pod)
        }
    }

    /// A container that somebody may have been told of.
    pub fn visible_container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let container = self.registry.container(id)?;
        if container.hidden() {
            Err(Error::NotFound {
                kind: "container",
                id: id.to_owned(),
            })
        } else {
            Ok(container)
        }
    }

    /// Runs a mutating verb to its end in a task of its own: a client that goes away cancels nothing half-way.
    pub async fn to_the_end<T, F>(&self, verb: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        if self.stopping.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        self.verbs
            .spawn(verb.in_current_span())
            .await
            .unwrap_or(Err(Error::Panicked))
    }

    /// Lets verbs in progress end, within reason.
    pub async fn finish(self: &Arc<Self>) {
        self.stopping.cancel();
        self.verbs.close();
        if tokio::time::timeout(FINISH, self.verbs.wait()).await.is_err() {
            tracing::warn!(
                left = self.verbs.len(),
                "verbs still in progress are left to the next start"
            );
        }
    }
}

fn boot_id(file: &Path) -> Result<String, Error> {
    let id = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
    Ok(id.trim().to_owned())
}

fn registry_config(config: &Config) -> RegistryConfig {
    RegistryConfig {
        certs_dir: Some(config.images.certs_dir.clone()),
        docker_config: config.images.docker_config.clone(),
        max_concurrent: config.images.max_concurrent_downloads,
        insecure: config.images.insecure_registries.clone(),
        local_builds: if config.images.answer_with_local_builds {
            LocalBuilds::Answer
        } else {
            LocalBuilds::Refuse
        },
        ..RegistryConfig::default()
    }
}
