//! What RUN steps run in: the build's own directory, its one shim, a network namespace a stage, and the files
//! bind-mounted into containers. Everything outside the store is written into the estate before it is made, and
//! [`Sandbox::end`] undoes it all. Knows nothing of instructions.

mod files;
mod mount_points;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use slipway_image::Store;
use slipway_network::{Cni, NetworkStatus, PodNetwork};
use slipway_shim_client::{Launcher, Shim, pod};
use slipway_spec::{HostFacts, Namespace};
use tokio::sync::{Mutex, OnceCell};

pub use mount_points::{MountPoints, Point};

use crate::error::{BuildError, StepError};
use crate::estate::{Estate, EstateError};

/// The host name in every RUN: fixed, so that it cannot make two builds differ.
pub const HOSTNAME: &str = "buildkitsandbox";

/// How a step is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Connection {
    /// Through CNI where it is configured, else the host's.
    Default,
    /// The host's.
    Host,
    /// Loopback only.
    None,
}

/// What a build needs from its surroundings.
#[derive(Clone)]
pub struct Surroundings {
    /// Where runtime state lives: `/run/slipway`.
    pub state: PathBuf,
    /// Starts shims; `None`: none was found, and the reason why RUN cannot work.
    pub launcher: Result<Launcher, Arc<slipway_shim_client::Error>>,
    /// Connects network namespaces.
    pub cni: Option<Arc<Cni>>,
    /// The machine's devices.
    pub cdi: Arc<slipway_cdi::Cache>,
}

impl Surroundings {
    /// Looks for the shim's programs (those given, else beside this one, in ../libexec/slipway, on PATH); networks are
    /// those configured in `cni_conf`, with plugins from `cni_bin`; devices those of the files in `cdi`, the folder that
    /// wins last.
    #[must_use]
    pub fn find(
        state: PathBuf,
        shim: Option<&Path>,
        worker: Option<&Path>,
        cni_conf: PathBuf,
        cni_bin: Vec<PathBuf>,
        cdi: Vec<PathBuf>,
    ) -> Surroundings {
        Surroundings {
            state,
            launcher: Launcher::find(shim, worker).map_err(Arc::new),
            cni: Some(Arc::new(Cni::new(cni_conf, cni_bin))),
            cdi: Arc::new(slipway_cdi::Cache::new(cdi)),
        }
    }
}

/// A network that was, or is just being, made.
type Shared = Arc<OnceCell<Network>>;

/// The build's place on the node outside the store.
pub struct Sandbox {
    id: String,
    dir: PathBuf,
    around: Surroundings,
    store: Store,
    estate: Mutex<Estate>,
    shim: OnceCell<Shim>,
    host: OnceCell<HostFacts>,
    networks: Mutex<HashMap<(usize, Connection), Shared>>,
    next: AtomicU32,
    gone: AtomicBool,
}

/// A network namespace of a stage.
#[derive(Debug, Clone)]
pub struct Network {
    /// For the container's specification.
    pub namespace: Namespace,
    /// Whether the host's own resolver can be reached from it.
    pub is_host: bool,
}

impl Sandbox {
    /// Makes the build's directory, having told the store of it.
    ///
    /// # Errors
    /// When the store or the file system says no.
    pub async fn begin(id: &str, store: &Store, around: Surroundings) -> Result<Sandbox, BuildError> {
        let dir = around.state.join("builds").join(id);
        let estate = Estate::of(&dir);
        let (asked, words) = (store.clone(), estate.to_json());
        let told = tokio::task::spawn_blocking(move || asked.set_estate(Some(&words))).await;
        told.map_err(|e| panicked(&dir, e))?.map_err(BuildError::store(
            "tell the store what the build will leave outside it",
        ))?;
        make_dir(&around.state, &dir)?;
        Ok(Sandbox {
            id: id.to_owned(),
            dir,
            around,
            store: store.clone(),
            estate: Mutex::new(estate),
            shim: OnceCell::new(),
            host: OnceCell::new(),
            networks: Mutex::new(HashMap::new()),
            next: AtomicU32::new(1),
            gone: AtomicBool::new(false),
        })
    }

    /// A directory nobody else uses: `mnt/7`, `run/8`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn fresh_dir(&self, what: &str) -> Result<PathBuf, StepError> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let dir = self.dir.join(what).join(n.to_string());
        match std::fs::create_dir_all(&dir) {
            Ok(()) => Ok(dir),
            Err(source) => Err(StepError::Io {
                act: "make",
                path: dir,
                source,
            }),
        }
    }

    /// Why there can be no shim; `None` where its programs are there.
    #[must_use]
    pub fn no_shim(&self) -> Option<Arc<slipway_shim_client::Error>> {
        self.around.launcher.as_ref().err().map(Arc::clone)
    }

    /// The shim, started at the first use.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn shim(&self) -> Result<&Shim, StepError> {
        self.shim
            .get_or_try_init(|| async {
                let launcher = self.around.launcher.as_ref();
                let launcher = launcher.map_err(|e| StepError::NoShim(Arc::clone(e)))?;
                let failed = StepError::shim;
                let shim = launcher
                    .start(&self.pod_id(), &self.dir)
                    .await
                    .map_err(failed("start the shim for"))?;
                match shim.create_pod(self.pod()).await {
                    Ok(_) => Ok(shim),
                    Err(error) => {
                        // The next step to ask would bind the same socket anew, and nobody could reach this one.
                        let estate = self.estate.lock().await.clone();
                        if let Err(left) = estate.stop_shim(launcher).await {
                            tracing::warn!(error = %left, "a shim that could not be prepared does not end");
                        }
                        Err(failed("prepare the shim for")(error))
                    }
                }
            })
            .await
    }

    /// No namespaces but those that the steps bring along.
    fn pod(&self) -> pod::CreatePodRequest {
        pod::CreatePodRequest {
            pod_id: self.pod_id(),
            state_dir: self.dir.to_string_lossy().into_owned(),
            hostname: HOSTNAME.to_owned(),
            net: pod::NamespaceMode::None.into(),
            ipc: pod::NamespaceMode::None.into(),
            uts: pod::NamespaceMode::None.into(),
            pid: pod::NamespaceMode::None.into(),
            cgroup_parent: self.cgroup(),
            ..Default::default()
        }
    }

    fn pod_id(&self) -> String {
        format!("build-{}", self.id)
    }

    /// The build's cgroup, under that of whoever called it.
    #[must_use]
    pub fn cgroup(&self) -> String {
        let own = files::own_cgroup(&std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
        format!("{}/slipway-build-{}", own.trim_end_matches('/'), self.id)
    }

    /// The facts of this machine.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub async fn host(&self) -> Result<&HostFacts, StepError> {
        self.host
            .get_or_try_init(|| async {
                HostFacts::gather(|p| std::fs::read(p)).map_err(|source| StepError::Io {
                    act: "read",
                    path: PathBuf::from("/proc/self"),
                    source,
                })
            })
            .await
    }

    /// The network of a stage's steps, made at the first use.
    ///
    /// # Errors
    /// When the namespace cannot be made or connected.
    pub async fn network(&self, stage: usize, wanted: Connection) -> Result<Network, StepError> {
        let connection = match (wanted, &self.around.cni) {
            (Connection::Default, Some(cni)) if matches!(cni.status(), NetworkStatus::Ready { .. }) => wanted,
            (Connection::Default, _) => Connection::Host,
            _ => wanted,
        };
        if connection == Connection::Host {
            return Ok(Network {
                namespace: Namespace::Host,
                is_host: true,
            });
        }
        let cell = Arc::clone(self.networks.lock().await.entry((stage, connection)).or_default());
        let network = cell.get_or_try_init(|| self.connect(stage, connection)).await?;
        Ok(network.clone())
    }

    async fn connect(&self, stage: usize, connection: Connection) -> Result<Network, StepError> {
        let name = if connection == Connection::None {
            "none"
        } else {
            "default"
        };
        let path = self.dir.join("net").join(format!("{stage}-{name}"));
        let io = |act: &'static str, path: &Path| {
            let path = path.to_path_buf();
            move |source| StepError::Io { act, path, source }
        };
        let parent = self.dir.join("net");
        std::fs::create_dir_all(&parent).map_err(io("make", &parent))?;
        let pin = path.clone();
        tokio::task::spawn_blocking(move || slipway_network::netns::pin_new_net(&pin))
            .await
            .map_err(|e| StepError::Task {
                reason: e.to_string(),
            })?
            .map_err(|e| io("make the network namespace", &path)(std::io::Error::other(e)))?;
        if let (Connection::Default, Some(cni)) = (connection, &self.around.cni) {
            let id = format!("{}-{stage}", self.pod_id());
            let pod = PodNetwork {
                name: id.clone(),
                id,
                namespace: "slipway-build".to_owned(),
                uid: self.id.clone(),
                netns: path.clone(),
                ..PodNetwork::default()
            };
            let planned = cni
                .plan(&pod)
                .await
                .map_err(|e| StepError::Network(Box::new(e)))?;
            let intent = planned.clone();
            self.record(|estate| estate.attachments.push(intent)).await?;
            let made = cni
                .attach(planned)
                .await
                .map_err(|e| StepError::Network(Box::new(e)))?;
            self.record(|estate| {
                estate.attachments.retain(|a| a.container_id != made.container_id);
                estate.attachments.push(made);
            })
            .await?;
        }
        Ok(Network {
            namespace: Namespace::Path(path),
            is_host: false,
        })
    }

    /// Changes the estate and has the store know of it before going on.
    async fn record(&self, change: impl FnOnce(&mut Estate)) -> Result<(), StepError> {
        let mut estate = self.estate.lock().await;
        change(&mut estate);
        let (store, words) = (self.store.clone(), estate.to_json());
        tokio::task::spawn_blocking(move || store.set_estate(Some(&words)))
            .await
            .map_err(|e| StepError::Task {
                reason: e.to_string(),
            })?
            .map_err(StepError::store("record the build's network in the store"))
    }

    /// The generated resolv.conf and hosts files, as bind-mount sources.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn network_files(&self, network: &Network) -> Result<(PathBuf, PathBuf), StepError> {
        files::write(&self.dir, network.is_host, HOSTNAME)
    }

    /// Undoes everything outside the store.
    ///
    /// # Errors
    /// What would not go; the estate stays in the store then, for the next one to try.
    pub async fn end(&self) -> Result<(), EstateError> {
        if self.gone.load(Ordering::Relaxed) {
            return Ok(());
        }
        let estate = self.estate.lock().await.clone();
        // Not by whether one came to be of use: one that was started and failed after is one, too. Without its programs
        // there was none.
        let started = self.dir.join("shim.sock").exists();
        let launcher = self.around.launcher.as_ref().ok().filter(|_| started);
        estate.undo(launcher, self.around.cni.as_deref()).await?;
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || store.set_estate(None))
            .await
            .map_err(|e| EstateError::Io {
                act: "forget",
                path: self.dir.clone(),
                source: std::io::Error::other(e),
            })?
            .map_err(|e| EstateError::Store(Box::new(e)))?;
        self.gone.store(true, Ordering::Relaxed);
        Ok(())
    }
}

fn panicked(dir: &Path, error: tokio::task::JoinError) -> BuildError {
    BuildError::Io {
        act: "make",
        path: dir.to_path_buf(),
        source: std::io::Error::other(error),
    }
}

/// Makes the build's directory, private to root like the state directory above it.
fn make_dir(state: &Path, dir: &Path) -> Result<(), BuildError> {
    use std::os::unix::fs::DirBuilderExt;
    let io = |path: &Path, source| BuildError::Io {
        act: "make",
        path: path.to_path_buf(),
        source,
    };
    let builder = || {
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700);
        builder
    };
    if let Some(parent) = state.parent() {
        std::fs::create_dir_all(parent).map_err(|e| io(parent, e))?;
    }
    builder()
        .recursive(true)
        .create(state)
        .map_err(|e| io(state, e))?;
    builder().recursive(true).create(dir).map_err(|e| io(dir, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_image::OwnerKind;
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt;

    /// A plugin that writes down what it is told, and fails when it is to.
    const PLUGIN: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$CNI_COMMAND" >> "$here/told"
cat > /dev/null
[ "$CNI_COMMAND" != DEL ] || [ ! -e "$here/broken" ] || { echo '{"cniVersion":"1.0.0","code":11,"msg":"no"}'; exit 1; }
[ "$CNI_COMMAND" != ADD ] || echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"address":"10.9.9.9/24","interface":0}]}'
"#;

    #[tokio::test]
    async fn a_network_is_left_also_without_a_shim_and_remembered_until_it_is() {
        if !rustix::process::geteuid().is_root() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: network namespaces need root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("conf")).unwrap();
        std::fs::write(at("plugin"), PLUGIN).unwrap();
        std::fs::set_permissions(at("plugin"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let list = r#"{"cniVersion":"1.0.0","name":"t","plugins":[{"type":"plugin"}]}"#;
        std::fs::write(at("conf/10-t.conflist"), list).unwrap();
        let missing = Launcher::find(Some(Path::new("/no/shim")), Some(Path::new("/no/worker")));
        let missing = Arc::new(missing.err().unwrap());
        let around = |cni: bool| Surroundings {
            state: at("state"),
            launcher: Err(Arc::clone(&missing)),
            cdi: Arc::new(slipway_cdi::Cache::new(Vec::new())),
            cni: cni.then(|| Arc::new(Cni::new(at("conf"), vec![dir.path().to_path_buf()]))),
        };
        let told = || std::fs::read_to_string(at("told")).unwrap_or_default();
        let store = Store::open(&at("root"), OwnerKind::Build).unwrap();
        let sandbox = Sandbox::begin("one", &store, around(true)).await.unwrap();
        let network = sandbox.network(0, Connection::Default).await.unwrap();
        assert!(!network.is_host && told().contains("ADD"));
        std::fs::write(at("broken"), "").unwrap();
        let left = sandbox.end().await.unwrap_err();
        assert!(matches!(left, EstateError::Network { .. }), "{left}");
        // Nor is it forgotten where nobody can leave networks.
        let estate = sandbox.estate.lock().await.clone();
        let left = estate.undo(None, None).await.unwrap_err();
        assert!(matches!(left, EstateError::NoNetworks { .. }), "{left}");
        std::fs::remove_file(at("broken")).unwrap();
        std::fs::remove_file(at("told")).unwrap();
        sandbox.end().await.unwrap();
        assert!(told().contains("DEL"));
        assert!(!at("state/builds/one").exists());
    }
}
