//! Builds of COPY alone, with what cannot be brought about from outside. Needs root: layers are mounted.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use slipway_image::{OwnerKind, Puller, RegistryConfig, Store};
use slipway_shim_client::Launcher;

use crate::build::{Builder, Built};
use crate::cancel::Cancel;
use crate::devices::DeviceGrants;
use crate::error::BuildError;
use crate::progress::{Event, Progress};
use crate::request::{BuildRequest, ContextSource, DockerfileSource, Network};
use crate::sandbox::Surroundings;

/// `false` where we are not root; says so.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: layers are mounted, which only root can"
        );
    }
    root
}

/// Does something at each event, and keeps the warnings.
struct At<F> {
    act: F,
    warnings: Mutex<Vec<String>>,
}

impl<F: Fn(&Event) + Send + Sync> Progress for At<F> {
    fn event(&self, event: Event) {
        (self.act)(&event);
        if let Event::Warning { text } = event {
            self.warnings.lock().unwrap().push(text);
        }
    }
}

/// A build of a context with nothing else about it.
pub(crate) fn request(context: &Path) -> BuildRequest {
    BuildRequest {
        context: ContextSource::Directory(context.to_path_buf()),
        dockerfile: DockerfileSource::Default,
        tags: Vec::new(),
        build_args: BTreeMap::new(),
        target: None,
        labels: BTreeMap::new(),
        no_cache: false,
        pull: false,
        network: Network::Default,
        allow_host_network: false,
        devices: Vec::new(),
        allow_devices: DeviceGrants::default(),
        secrets: BTreeMap::new(),
    }
}

/// Builds a context below `dir`, which has `c/Dockerfile` and `c/f`; what came of it, and the warnings.
async fn build(
    dir: &Path,
    dockerfile: &str,
    cancel: Cancel,
    act: impl Fn(&Event) + Send + Sync + 'static,
) -> (Result<Built, BuildError>, Vec<String>) {
    let context = dir.join("c");
    std::fs::create_dir_all(&context).unwrap();
    std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    std::fs::write(context.join("f"), "f").unwrap();
    let store = Store::open(&dir.join("root"), OwnerKind::Build).unwrap();
    let missing = Launcher::find(Some(Path::new("/no/shim")), Some(Path::new("/no/worker")));
    let builder = Builder {
        puller: Arc::new(Puller::new(store.clone(), RegistryConfig::default())),
        store,
        around: Surroundings {
            state: dir.join("state"),
            launcher: Err(Arc::new(missing.err().unwrap())),
            cni: None,
            cdi: Arc::new(slipway_cdi::Cache::new(Vec::new())),
        },
    };
    let progress = Arc::new(At {
        act,
        warnings: Mutex::default(),
    });
    let built = builder
        .build(
            request(&context),
            Arc::clone(&progress) as Arc<dyn Progress>,
            cancel,
        )
        .await;
    let warnings = progress.warnings.lock().unwrap().clone();
    (built, warnings)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stage_that_panics_is_an_internal_error_and_no_interrupt() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let text = "FROM scratch AS odd\nCOPY f /\nFROM scratch\nCOPY --from=odd /f /g\n";
    let (built, _) = build(dir.path(), text, Cancel::new(), |event| {
        if let Event::Started { label, .. } = event {
            assert!(!label.text.starts_with("COPY f"), "a test's own panic");
        }
    })
    .await;
    let error = built.unwrap_err();
    assert!(matches!(error, BuildError::Panicked { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "internal error: the build of stage odd ended without a result"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_interrupted_build_leaves_is_told() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cancel = Cancel::new();
    let (state, interrupt) = (dir.path().join("state"), cancel.clone());
    let fixed = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&fixed);
    let (built, warnings) = build(dir.path(), "FROM scratch\nCOPY f /\n", cancel, move |event| {
        if matches!(event, Event::Started { .. }) {
            let own = std::fs::read_dir(state.join("builds")).unwrap().next().unwrap();
            let stays = own.unwrap().path().join("stays");
            std::fs::write(&stays, "x").unwrap();
            if immutable(&stays, true) {
                *keep.lock().unwrap() = Some(stays);
            }
            interrupt.set();
        }
    })
    .await;
    assert!(matches!(built, Err(BuildError::Cancelled)), "{built:?}");
    let stays = fixed.lock().unwrap().take();
    match stays {
        Some(stays) => {
            immutable(&stays, false);
            let told = warnings.iter().any(|w| w.contains("left something behind"));
            assert!(told, "{warnings:?}");
        }
        None => drop(writeln!(
            std::io::stderr(),
            "SKIPPED: the file system of {} keeps no file for ever",
            dir.path().display()
        )),
    }
}

/// Makes a file one that cannot be removed, or one that can.
fn immutable(path: &Path, yes: bool) -> bool {
    let flag = if yes { "+i" } else { "-i" };
    let changed = std::process::Command::new("chattr").arg(flag).arg(path).output();
    changed.is_ok_and(|output| output.status.success())
}
