//! RUN: a container on the step's snapshot, made by the build's shim, its output shown while it runs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use slipway_dockerfile::instruction::Network;
use slipway_dockerfile::step::RunStep;
use slipway_image::Active;
use slipway_shim_client::{CreateContainer, Exit, Output, Shim, Stdin};
use slipway_snapshot::Root;
use slipway_spec::user::FILE_LIMIT;
use slipway_spec::{Mount, RunStep as RunInput};

use super::foreign::Foreign;
use super::origins::Places;
use super::{Keys, StepContext, StepResult, mounts};
use crate::error::StepError;
use crate::key::Scope;
use crate::layer::Later;
use crate::output;
use crate::request;
use crate::sandbox::{Connection, MountPoints, Point};

/// How long the last output may take to arrive once the command has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(3);
/// What is mounted fresh in every container.
pub(super) const OWN_MOUNTS: [&str; 3] = ["/dev", "/proc", "/sys"];
/// How long a killed container may take to be gone.
const DYING: Duration = Duration::from_secs(20);

pub(super) async fn execute(cx: &StepContext<'_>, step: &RunStep) -> Result<StepResult, StepError> {
    let inputs = mounts::prepare(cx, step).await?;
    let devices = cx.build.devices.of_step(&cx.build.request, step)?.names;
    let scope = Scope {
        devices: devices.clone(),
        ..cx.build.scope(cx.stage)
    };
    let places = inputs.places();
    let known = places.as_ref().and_then(Places::layers);
    let shortcut = known
        .map(|layers| scope.shortcut(&cx.key, &cx.step.action, &layers))
        .transpose()?;
    if let Some(shortcut) = shortcut
        && let Some(found) = cx.cached(&[shortcut]).await?
    {
        return Ok(found);
    }
    let contents = inputs.by_contents(cx).await?;
    let key = scope.step(&cx.key, &cx.step.action, &contents)?;
    let keys = Keys::with(key, shortcut, || {
        let (below, action) = (cx.key, cx.step.action.clone());
        let places = places?;
        Some(Later {
            tips: places.tips(),
            key: Box::new(move || scope.shortcut(&below, &action, &places.layers()?).ok()),
        })
    });
    cx.cached_or_made(keys, async |active: &Active| {
        let mut foreign = Foreign::of(&devices, active);
        let worked = cx.on_mount(active, async |point: &Path| {
            let mounted = mounts::mount(cx, &inputs).await?;
            let ran = run(cx, step, point, &mounted, &inputs.env, &mut foreign).await;
            let unmounted = mounts::unmount(cx, mounted).await;
            ran.and(unmounted)?;
            foreign.look(cx, active, point).await
        });
        worked.await?;
        foreign.strike(cx, active).await
    })
    .await
}

async fn run(
    cx: &StepContext<'_>,
    step: &RunStep,
    rootfs: &Path,
    mounted: &[mounts::Mounted],
    secrets: &[(String, request::Secret)],
    foreign: &mut Foreign,
) -> Result<(), StepError> {
    let root = Root::open(rootfs).map_err(|source| StepError::Io {
        act: "open",
        path: rootfs.to_path_buf(),
        source,
    })?;
    let mut points = MountPoints::default();
    let ran = run_in(cx, step, rootfs, &root, &mut points, mounted, secrets, foreign).await;
    let cleaned = cx.blocking(move || points.remove(&root)).await;
    ran.and(cleaned)
}

#[allow(clippy::too_many_arguments)]
async fn run_in(
    cx: &StepContext<'_>,
    step: &RunStep,
    rootfs: &Path,
    root: &Root,
    points: &mut MountPoints,
    mounted: &[mounts::Mounted],
    secrets: &[(String, request::Secret)],
    foreign: &mut Foreign,
) -> Result<(), StepError> {
    let sandbox = &cx.build.sandbox;
    // Before the network: what cannot run needs none.
    sandbox.shim().await?;
    let bundle = sandbox.fresh_dir("run")?;
    let id = format!(
        "run-{}",
        bundle
            .file_name()
            .map(|n| n.to_string_lossy())
            .unwrap_or_default()
    );
    let described = describe(
        cx, step, rootfs, root, points, mounted, secrets, foreign, &id, &bundle,
    )
    .await;
    let ran = match described {
        Ok(()) => contain(cx, step, foreign, &id, &bundle).await,
        Err(e) => Err(e),
    };
    let removed = slipway_snapshot::remove_tree(&bundle);
    ran?;
    removed.map_err(|source| StepError::Io {
        act: "remove",
        path: bundle,
        source,
    })
}

/// Writes the bundle's config.json.
#[allow(clippy::too_many_arguments)]
async fn describe(
    cx: &StepContext<'_>,
    step: &RunStep,
    rootfs: &Path,
    root: &Root,
    points: &mut MountPoints,
    mounted: &[mounts::Mounted],
    secrets: &[(String, request::Secret)],
    foreign: &mut Foreign,
    id: &str,
    bundle: &Path,
) -> Result<(), StepError> {
    let sandbox = &cx.build.sandbox;
    let network = sandbox
        .network(cx.stage.id.0, connection(cx.build.request.network, step.network))
        .await?;
    let (resolv, hosts) = sandbox.network_files(&network)?;
    let io = |act: &'static str, path: &Path| {
        let path = path.to_path_buf();
        move |source| StepError::Io { act, path, source }
    };
    // As runc does; a directory that the command runs in stays in the layer.
    root.mkdir_all(Path::new(&step.cwd), 0o755, None)
        .map_err(io("make the directory", Path::new(&step.cwd)))?;
    foreign.begin(cx, root).await?;
    let mut binds = Vec::new();
    for (path, source) in [("/etc/resolv.conf", resolv), ("/etc/hosts", hosts)] {
        let real = points.ensure(root, Path::new(path), Point::File)?;
        binds.push(bind(&real, &source, true));
    }
    if let Some(script) = &step.script {
        // Below /dev, which is a mount of its own: nothing of it can reach the layer.
        let source = bundle.join("script");
        write_new(&source, script.content.as_bytes(), 0o755).map_err(io("write", &source))?;
        binds.push(bind(Path::new(&script.path), &source, true));
    }
    for mount in mounted {
        let point = if mount.is_file {
            Point::File
        } else {
            Point::Directory
        };
        let target = if under_own_mount(&mount.target) {
            mount.target.clone()
        } else {
            points.ensure(root, &mount.target, point)?
        };
        binds.push(bind(&target, &mount.source, mount.read_only));
    }
    let mut env = step.env.clone();
    env.extend(step.proxy_env.iter().cloned());
    for (name, secret) in secrets {
        env.retain(|(there, _)| there != name);
        env.push((name.clone(), secret.text()?));
    }
    let read = |path: &str| {
        root.read(Path::new(path), FILE_LIMIT)
            .map_err(io("read the image's", Path::new(path)))
    };
    let input = RunInput {
        args: step.argv.clone(),
        env,
        cwd: step.cwd.clone(),
        user: step.user.clone(),
        passwd: read("/etc/passwd")?.unwrap_or_default(),
        group: read("/etc/group")?.unwrap_or_default(),
        mounts: binds,
        cdi: cx.build.devices.edits(&foreign.devices)?,
        network: network.namespace,
        hostname: crate::sandbox::HOSTNAME.to_owned(),
        cgroups_path: format!("{}/{id}", sandbox.cgroup()),
        rootfs: rootfs.to_path_buf(),
        host: sandbox.host().await?.clone(),
        ..RunInput::default()
    };
    let mut spec = slipway_spec::generate(&input.into_input())
        .map_err(|e| StepError::Spec(Box::new(e)))?
        .spec;
    mounts::add_tmpfs(&mut spec, step, root, points)?;
    let path = bundle.join("config.json");
    let json = serde_json::to_vec(&spec).map_err(|e| io("write", &path)(e.into()))?;
    // The values of secrets that are variables are in it.
    write_new(&path, &json, 0o600).map_err(io("write", &path))
}

/// Writes a file that is not there yet, with exactly this mode.
fn write_new(path: &Path, content: &[u8], mode: u32) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode & 0o700)
        .open(path)?;
    file.write_all(content)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

fn bind(target: &Path, source: &Path, read_only: bool) -> Mount {
    Mount {
        container_path: target.to_string_lossy().into_owned(),
        host_path: source.to_path_buf(),
        readonly: read_only,
        ..Mount::default()
    }
}

/// Whether a path lies in something that is mounted fresh in every container.
pub(super) fn under_own_mount(path: &Path) -> bool {
    OWN_MOUNTS
        .iter()
        .any(|own| path.starts_with(own) && path != Path::new(own))
}

fn connection(build: request::Network, step: Network) -> Connection {
    match (step, build) {
        (Network::None, _) => Connection::None,
        (Network::Host, _) => Connection::Host,
        (Network::Default, request::Network::Default) => Connection::Default,
        (Network::Default, request::Network::Host) => Connection::Host,
        (Network::Default, request::Network::None) => Connection::None,
    }
}

/// Creates, starts, follows and removes the container.
async fn contain(
    cx: &StepContext<'_>,
    step: &RunStep,
    foreign: &mut Foreign,
    id: &str,
    bundle: &Path,
) -> Result<(), StepError> {
    let shim = cx.build.sandbox.shim().await?;
    if cx.build.cancel.is_set() {
        return Err(StepError::Cancelled);
    }
    let (reader, writer) = pipe(bundle)?;
    let second = writer.try_clone().map_err(|source| StepError::Io {
        act: "make a pipe for",
        path: bundle.to_path_buf(),
        source,
    })?;
    let ended = output::follow(
        reader,
        cx.id,
        Arc::clone(&cx.build.progress),
        Arc::clone(&cx.tail),
    );
    let created = shim
        .create(CreateContainer {
            id: id.to_owned(),
            bundle: bundle.to_path_buf(),
            stdin: Stdin::Null,
            stdout: Output::Pipes {
                stdout: writer,
                stderr: second,
            },
            terminal: false,
            pid_target: None,
        })
        .await;
    created.map_err(StepError::shim("create"))?;
    let exit = match foreign.end(cx).await {
        Ok(()) => match shim.start(id).await {
            Ok(_) => follow(cx, shim, id).await,
            Err(e) => Err(StepError::shim("start")(e)),
        },
        Err(e) => Err(e),
    };
    // Whatever happened, the container goes.
    let gone = remove(shim, id).await;
    let _ = tokio::time::timeout(LAST_OUTPUT, ended).await;
    let exit = exit?;
    gone?;
    judge(step, exit, is_full(cx.build.store.root()))
}

fn pipe(bundle: &Path) -> Result<(File, OwnedFd), StepError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| StepError::Io {
        act: "make a pipe for",
        path: bundle.to_path_buf(),
        source: e.into(),
    })?;
    Ok((reader.into(), writer))
}

/// Waits for the container's end; kills it when the build is cancelled.
async fn follow(cx: &StepContext<'_>, shim: &Shim, id: &str) -> Result<Exit, StepError> {
    tokio::select! {
        exit = shim.wait(id) => exit.map_err(StepError::shim("wait for")),
        () = cx.build.cancel.wait() => {
            kill(shim, id).await;
            Err(StepError::Cancelled)
        }
    }
}

async fn kill(shim: &Shim, id: &str) {
    if let Err(error) = shim.kill(id, 9, true).await {
        tracing::debug!(%error, id, "a step's container cannot be killed (it may have ended)");
    }
    let _ = tokio::time::timeout(DYING, shim.wait(id)).await;
}

async fn remove(shim: &Shim, id: &str) -> Result<(), StepError> {
    match shim.delete(id).await {
        Ok(_) => Ok(()),
        Err(e) if e.is_not_found() => Ok(()),
        Err(_) => {
            kill(shim, id).await;
            shim.delete(id)
                .await
                .map(|_| ())
                .map_err(StepError::shim("remove"))
        }
    }
}

fn judge(step: &RunStep, exit: Exit, disk_full: bool) -> Result<(), StepError> {
    let command = shown(step);
    match exit.code {
        0 => Ok(()),
        _ if exit.oom_killed => Err(StepError::OutOfMemory { command }),
        code => Err(StepError::Exit {
            command,
            code,
            disk_full,
        }),
    }
}

/// Whether next to nothing can be written any more.
fn is_full(path: &Path) -> bool {
    const NOTHING: u64 = 256 * 1024;
    rustix::fs::statvfs(path).is_ok_and(|fs| fs.f_bavail.saturating_mul(fs.f_frsize) < NOTHING)
}

/// The command for a message: what follows the shell's `-c` on one line, shortened.
fn shown(step: &RunStep) -> String {
    let words = match step.argv.as_slice() {
        [_, flag, command] if flag.starts_with('-') && flag.ends_with('c') => command.clone(),
        words => words.join(" "),
    };
    let line: String = words.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() > 120 {
        format!("{}…", line.chars().take(119).collect::<String>())
    } else {
        line
    }
}
