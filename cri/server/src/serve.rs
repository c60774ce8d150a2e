//! From a configuration to a served socket, and to an orderly end at SIGTERM or SIGINT.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use slipway_cri_api::v1::image_service_server::ImageServiceServer;
use slipway_cri_api::v1::runtime_service_server::RuntimeServiceServer;
use slipway_sys::cgroup::{CgroupError, Layout};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::config::{CgroupDriver, Config};
use crate::daemon::Daemon;
use crate::instance::{self, Instance};
use crate::memory;
use crate::recover::{self, janitor};
use crate::rpc::fault::Faults;
use crate::rpc::{Cri, deadline};
use crate::stream;
use crate::systemd;

/// The largest request taken: the kubelet's own bound on messages.
const LARGEST_MESSAGE: usize = 16 << 20;

/// How long connections may take to end once nothing new is taken.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Serves until it is told to end.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    // Modes are what the code says, for us and the shims, whoever starts us.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "slipwayd has to be run by root: it makes mounts, namespaces and cgroups"
    );
    if config.runtime.cgroup_driver == CgroupDriver::Systemd && !Layout::detect()?.is_v2() {
        anyhow::bail!(
            "runtime.cgroup_driver is \"systemd\": {}",
            CgroupError::SystemdOnV1
        );
    }
    // Before anything is touched: it must not be ours to touch twice.
    let instance = Instance::acquire(&config)?;
    let kept = systemd::kept(&config.socket);
    let was_kept = kept.is_some();
    let (socket, fault_socket) = (config.socket.clone(), config.fault_socket.clone());
    let paths = instance.paths().clone();
    let daemon = Arc::new(
        crate::blocking::run(move || Daemon::build(config, paths))
            .await
            .map_err(chained)?,
    );
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;

    // Clients see the truth or nothing: the socket appears when the shims have said what they know, and what has become of the
    // containers of one that hangs is not told before it has. What takes long, as a network plugin that hangs, is finished
    // beside serving.
    recover::recover(&daemon).await.map_err(chained)?;
    daemon.background.spawn(janitor::run(daemon.clone()));
    daemon.background.spawn(janitor::builds(daemon.clone()));
    daemon.background.spawn(crate::pod::upkeep::run(daemon.clone()));
    daemon.background.spawn(memory::give_back());
    let streams = stream::bind(&daemon).await?;
    let cri = Cri::new(daemon.clone(), streams.urls());
    // Its sessions end first: what they run is ended by verbs that end after them.
    let streaming = tokio::spawn(streams.run(daemon.stopping.clone().cancelled_owned()));
    let listener = instance.listen(&socket, kept)?;
    let is_kept = was_kept || systemd::keep(&listener);
    let listener = UnixListener::from_std(listener).context("cannot use the socket")?;
    let ending = CancellationToken::new();
    let faults = UnixListener::from_std(instance.listen_for_faults(&fault_socket)?)
        .context("cannot use the socket of faults")?;
    let faults = Server::builder()
        .layer(tower::layer::layer_fn(deadline::around))
        .add_service(Faults::server(daemon.clone()))
        .serve_with_incoming_shutdown(UnixListenerStream::new(faults), ending.clone().cancelled_owned());
    let faults = tokio::spawn(faults);
    tracing::info!(
        socket = %socket.display(),
        root = %daemon.paths.root.display(),
        state = %daemon.paths.state.display(),
        version = crate::version::program(),
        "serving"
    );

    // This is the first thread, and starting went deeper than serving will.
    slipway_sys::memory::trim_stack();
    systemd::notify("READY=1");
    let server = Server::builder()
        .layer(tower::layer::layer_fn(deadline::around))
        .add_service(RuntimeServiceServer::new(cri.clone()).max_decoding_message_size(LARGEST_MESSAGE))
        .add_service(ImageServiceServer::new(cri).max_decoding_message_size(LARGEST_MESSAGE))
        .serve_with_incoming_shutdown(
            UnixListenerStream::new(listener),
            ending.clone().cancelled_owned(),
        );
    let mut server = std::pin::pin!(server);
    tokio::select! {
        served = &mut server => served.context("cannot serve")?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    systemd::notify("STOPPING=1");
    tracing::info!("ending; pods and containers go on");
    daemon.finish().await;
    ending.cancel();
    if let Ok(served) = tokio::time::timeout(LAST_WORDS, server).await {
        served.context("cannot serve")?;
    }
    if tokio::time::timeout(LAST_WORDS, streaming).await.is_err() {
        tracing::warn!("streaming sessions were cut off");
    }
    if let Ok(Ok(served)) = tokio::time::timeout(LAST_WORDS, faults).await {
        served.context("cannot serve faults")?;
    }
    if !is_kept {
        let _ = instance::remove_socket(&socket);
    }
    let _ = instance::remove_socket(&fault_socket);
    Ok(())
}

/// anyhow shows causes by itself, ours have them in one line already.
fn chained(error: crate::error::Error) -> anyhow::Error {
    anyhow::anyhow!(error.chain())
}
