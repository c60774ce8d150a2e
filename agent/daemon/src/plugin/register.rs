//! Keeping a plugin registered. Each registration has a socket of its own name, because kubelet confuses a name that comes
//! twice with the plugin that had it before:
//!
//! ```text
//!  serve a new socket ─▶ Register ─▶ kubelet asks for the list ─▶ close the old socket
//!        ▲                                                              │
//!        └── kubelet.sock made anew · our socket gone · nobody lists ◀──┘
//! ```
//! The folder is watched, and looked at from time to time, since a folder that is put in its place is another one. What fails is tried again with growing pauses; health lies elsewhere and is not touched.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustix::fs::inotify;
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Endpoint, Server, Uri};

use super::serve::{Served, options};
use super::{KUBELET_SOCKET, Plugin, VERSION};
use slipway_kubelet_api::v1beta1::RegisterRequest;
use slipway_kubelet_api::v1beta1::device_plugin_server::DevicePluginServer;
use slipway_kubelet_api::v1beta1::registration_client::RegistrationClient;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// How often the folder is looked at where nothing is heard of it.
const LOOK: Duration = Duration::from_secs(10);
/// How long Register may take, and then how long until kubelet asks for the list.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a registration did not come about.
#[derive(Debug, thiserror::Error)]
enum RegisterError {
    #[error("serve on {}", path.display())]
    Serve {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("connect to {}", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("register {resource} with kubelet")]
    Refused {
        resource: String,
        #[source]
        source: Box<tonic::Status>,
    },
    #[error("register {resource} with kubelet: it did not ask for the list within {} s", PATIENCE.as_secs())]
    NotListed { resource: String },
}

/// A registration: a socket and what serves on it.
struct Registered {
    socket: PathBuf,
    open: watch::Sender<bool>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    lists: watch::Receiver<usize>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _ = self.open.send(false);
        self.server.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Registers the plugin, and again whenever kubelet has forgotten it. Ends only when it is dropped.
pub async fn keep_registered(plugin: Plugin) {
    let mut current: Option<Registered> = None;
    let mut pause = FIRST_PAUSE;
    let mut waiting = false;
    loop {
        // Watched before anything is done, so that nothing that happens meanwhile is missed.
        let watched = Folder::watch(&plugin.folder);
        let before = identity(&plugin.folder);
        let registered = match &watched {
            Ok(_) if before.is_none() => None,
            _ => Some(register(&plugin).await),
        };
        let done = matches!(registered, Some(Ok(_)));
        let absent = registered.is_none();
        match registered {
            Some(Ok(new)) => {
                tracing::info!(resource = plugin.resource, socket = %new.socket.display(), "registered with kubelet");
                // Only now may the old one go: until the new list is there, it is what kubelet has.
                current = Some(new);
                pause = FIRST_PAUSE;
            }
            Some(Err(e)) => {
                let error = &e as &dyn std::error::Error;
                tracing::warn!(resource = plugin.resource, error, "not registered; trying again");
            }
            None if !waiting => {
                tracing::info!(resource = plugin.resource, folder = %plugin.folder.display(), "waiting for kubelet");
            }
            None => {}
        }
        waiting = absent;
        plugin.status.registered(&plugin.resource, current.is_some());
        // Where it just failed, that our socket is gone is no news.
        let ours = current.as_ref().filter(|_| done).map(|r| r.socket.clone());
        let Ok(watched) = watched else {
            // The folder is not there yet.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
            continue;
        };
        tokio::select! {
            () = watched.changed(&plugin.folder, before, ours.as_deref()) => {}
            // kubelet.sock was there and did not answer, or was not there: both may change without a sign.
            () = tokio::time::sleep(pause), if !done => pause = (pause * 2).min(MAX_PAUSE),
            () = ended(&mut current, &plugin.resource) => {}
        }
    }
}

/// The server of the current registration has ended by itself, or nobody hears its list any more: kubelet never asks for it
/// again, and has counted its devices as unhealthy since.
async fn ended(current: &mut Option<Registered>, resource: &str) {
    let Some(registered) = current else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = &mut registered.server => {}
        _ = registered.lists.wait_for(|n| *n == 0) => {}
    }
    tracing::info!(resource, "kubelet hears the list no longer");
    *current = None;
}

async fn register(plugin: &Plugin) -> Result<Registered, RegisterError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name: String = plugin
        .resource
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(40)
        .collect();
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let endpoint = format!("slipway-{name}-{}-{n}.sock", std::process::id());
    let mut new = serve(plugin, plugin.folder.join(&endpoint))?;

    let path = plugin.folder.join(KUBELET_SOCKET);
    let to = path.clone();
    let channel = Endpoint::from_static("http://kubelet")
        .connect_timeout(PATIENCE)
        .timeout(PATIENCE)
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let to = to.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(to).await?)) }
        }))
        .await
        .map_err(|source| RegisterError::Connect { path, source })?;
    let request = RegisterRequest {
        version: VERSION.to_owned(),
        endpoint,
        resource_name: plugin.resource.clone(),
        options: Some(options()),
    };
    RegistrationClient::new(channel)
        .register(request)
        .await
        .map_err(|source| RegisterError::Refused {
            resource: plugin.resource.clone(),
            source: Box::new(source),
        })?;
    match tokio::time::timeout(PATIENCE, new.lists.wait_for(|n| *n > 0))
        .await
        .map(|r| r.is_ok())
    {
        Ok(true) => Ok(new),
        _ => Err(RegisterError::NotListed {
            resource: plugin.resource.clone(),
        }),
    }
}

fn serve(plugin: &Plugin, socket: PathBuf) -> Result<Registered, RegisterError> {
    let listener = UnixListener::bind(&socket).map_err(|source| RegisterError::Serve {
        path: socket.clone(),
        source,
    })?;
    let (to, lists) = watch::channel(0);
    let (open, opened) = watch::channel(true);
    let served = Served {
        plugin: plugin.clone(),
        lists: to,
        open: opened,
    };
    let server = Server::builder()
        .add_service(DevicePluginServer::new(served))
        .serve_with_incoming(UnixListenerStream::new(listener));
    Ok(Registered {
        socket,
        open,
        server: tokio::spawn(server),
        lists,
    })
}

/// Which socket of kubelet's it is: a new one has another inode, or was made at another time.
type Identity = (u64, i64, i64);

fn identity(folder: &Path) -> Option<Identity> {
    let meta = std::fs::symlink_metadata(folder.join(KUBELET_SOCKET)).ok()?;
    Some((meta.ino(), meta.ctime(), meta.ctime_nsec()))
}

/// kubelet's folder, watched.
struct Folder {
    watch: pipe::Receiver,
    /// Which folder that is: its device and inode.
    which: Option<(u64, u64)>,
}

fn which(folder: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(folder).ok()?;
    Some((meta.dev(), meta.ino()))
}

impl Folder {
    fn watch(folder: &Path) -> io::Result<Folder> {
        let which = which(folder);
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(
            &watch,
            folder,
            inotify::WatchFlags::CREATE
                | inotify::WatchFlags::DELETE
                | inotify::WatchFlags::MOVED_TO
                | inotify::WatchFlags::MOVED_FROM
                | inotify::WatchFlags::DELETE_SELF
                | inotify::WatchFlags::MOVE_SELF,
        )?;
        // Not a pipe, but read like one: it is only to be waited for.
        let watch = pipe::Receiver::from_owned_fd_unchecked(watch)?;
        Ok(Folder { watch, which })
    }

    /// Until kubelet's socket is another than `before`, ours is gone, or the folder itself is another. What happened is looked up
    /// and not taken from the events: they say only when to look.
    async fn changed(&self, folder: &Path, before: Option<Identity>, ours: Option<&Path>) {
        loop {
            let now = identity(folder);
            let lost = ours.is_some_and(|socket| !socket.exists());
            if lost || which(folder) != self.which || (now.is_some() && now != before) {
                return;
            }
            if let Ok(Err(_)) = tokio::time::timeout(LOOK, self.watch.readable()).await {
                tokio::time::sleep(LOOK).await;
            }
            while matches!(self.watch.try_read(&mut [0; 4096]), Ok(1..)) {}
        }
    }
}
