//! Keeping a plugin registered. Each registration has a socket of its own name, because kubelet confuses a name that comes
//! twice with the plugin that had it before:
//!
//! ```text
//!  serve a new socket ─▶ Register ─▶ kubelet asks for the list ─▶ close the old socket
//!        ▲                                                              │
//!        └── kubelet.sock made anew · our socket gone · nobody lists ◀──┘
//! ```
//! The folder is watched, and looked at from time to time, since a folder that is put in its place is another one, and where it
//! cannot be watched, looked at only. What fails is tried again with growing pauses; health lies elsewhere and is not touched. What a killed agent left is removed.

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
use super::{KUBELET_SOCKET, Pace, Plugin, VERSION};
use crate::cause::chain;
use slipway_kubelet_api::v1beta1::RegisterRequest;
use slipway_kubelet_api::v1beta1::device_plugin_server::DevicePluginServer;
use slipway_kubelet_api::v1beta1::registration_client::RegistrationClient;

/// How the names of our sockets begin.
const PREFIX: &str = "slipway-";
/// Most entries of kubelet's folder that are looked at for what was left.
const MAX_SWEPT: usize = 1024;
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
    let Pace { first, longest, look } = plugin.pace;
    let mut pause = first;
    let mut waiting = false;
    // Each failure is told once.
    let (mut told, mut unwatched) = (String::new(), false);
    loop {
        // Watched before anything is done, so that nothing that happens meanwhile is missed.
        let (mut folder, error) = Folder::watch(&plugin.folder);
        if let Some(e) = error.filter(|_| folder.which.is_some() && !unwatched) {
            let error = &e as &dyn std::error::Error;
            tracing::warn!(
                folder = %plugin.folder.display(),
                error,
                "a new kubelet is noticed late: its folder cannot be watched, and is looked at every {} s only (fs.inotify.max_user_instances and max_user_watches bound how many are)",
                look.as_secs()
            );
            unwatched = true;
        }
        let before = identity(&plugin.folder);
        let registered = match folder.which {
            Some(_) if before.is_none() => None,
            // Of a folder that is not there, the failure tells.
            _ => Some(register(&plugin).await),
        };
        let done = matches!(registered, Some(Ok(_)));
        let absent = registered.is_none();
        match registered {
            Some(Ok(new)) => {
                tracing::info!(resource = plugin.resource, socket = %new.socket.display(), "registered with kubelet");
                // Only now may the old one go: until the new list is there, it is what kubelet has.
                current = Some(new);
                sweep(&plugin.folder);
                pause = first;
                told.clear();
            }
            Some(Err(e)) => {
                let error = chain(&e);
                if error != told {
                    tracing::warn!(resource = plugin.resource, error, "not registered; trying again");
                    told = error;
                }
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
        tokio::select! {
            () = folder.changed(&plugin.folder, before, ours.as_deref(), look) => {}
            // kubelet.sock was there and did not answer, or was not there: both may change without a sign.
            () = tokio::time::sleep(pause), if !done => pause = (pause * 2).min(longest),
            () = ended(&mut current, &plugin.resource) => {}
        }
    }
}

/// Removes the sockets that agents have left that were killed: nobody listens on them.
fn sweep(folder: &Path) {
    let all = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in all.take(MAX_SWEPT) {
        let name = entry.file_name();
        let ours = name
            .to_str()
            .is_some_and(|n| n.starts_with(PREFIX) && n.ends_with(".sock"));
        let path = entry.path();
        let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
        if ours && std::os::unix::net::UnixStream::connect(&path).is_err_and(refused) {
            let _ = std::fs::remove_file(&path);
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
    let endpoint = format!("{PREFIX}{name}-{}-{n}.sock", std::process::id());
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
    /// None: it is not there, or there are too many watches on this machine.
    watch: Option<pipe::Receiver>,
    /// Which folder that is: its device and inode.
    which: Option<(u64, u64)>,
}

fn which(folder: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(folder).ok()?;
    Some((meta.dev(), meta.ino()))
}

impl Folder {
    /// And why it is not watched.
    fn watch(folder: &Path) -> (Folder, Option<io::Error>) {
        let which = which(folder);
        let (watch, error) = match watch(folder) {
            Ok(watch) => (Some(watch), None),
            Err(e) => (None, Some(e)),
        };
        (Folder { watch, which }, error)
    }

    /// Until kubelet's socket is another than `before`, ours is gone, or the folder itself is another. What happened is looked up
    /// and not taken from the events: they say only when to look.
    async fn changed(
        &mut self,
        folder: &Path,
        before: Option<Identity>,
        ours: Option<&Path>,
        look: Duration,
    ) {
        loop {
            let now = identity(folder);
            let lost = ours.is_some_and(|socket| !socket.exists());
            if lost || which(folder) != self.which || (now.is_some() && now != before) {
                return;
            }
            let Some(events) = &self.watch else {
                tokio::time::sleep(look).await;
                self.watch = watch(folder).ok();
                continue;
            };
            if let Ok(Err(_)) = tokio::time::timeout(look, events.readable()).await {
                tokio::time::sleep(look).await;
            }
            while matches!(events.try_read(&mut [0; 4096]), Ok(1..)) {}
        }
    }
}

fn watch(folder: &Path) -> io::Result<pipe::Receiver> {
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
    pipe::Receiver::from_owned_fd_unchecked(watch)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use slipway_kubelet_api::v1beta1::Empty;
    use slipway_kubelet_api::v1beta1::device_plugin_client::DevicePluginClient;
    use slipway_kubelet_api::v1beta1::registration_server::{Registration, RegistrationServer};
    use tonic::{Request, Response, Status};

    use super::*;
    use crate::config::Resources;

    /// Refuses the first ones, and listens to the list of those after them.
    #[derive(Clone)]
    struct Kubelet {
        folder: PathBuf,
        refuses: Arc<AtomicU32>,
    }

    #[tonic::async_trait]
    impl Registration for Kubelet {
        async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
            let left = self.refuses.load(Ordering::Relaxed);
            if left > 0 {
                self.refuses.store(left - 1, Ordering::Relaxed);
                return Err(Status::unavailable("not yet"));
            }
            let socket = self.folder.join(&request.get_ref().endpoint);
            tokio::spawn(async move {
                let channel = Endpoint::from_static("http://plugin")
                    .connect_with_connector(tower::service_fn(move |_: Uri| {
                        let socket = socket.clone();
                        async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
                    }))
                    .await
                    .expect("a plugin");
                let list = DevicePluginClient::new(channel).list_and_watch(Empty {}).await;
                let mut lists = list.expect("a list").into_inner();
                while let Ok(Some(_)) = lists.message().await {}
            });
            Ok(Response::new(Empty {}))
        }
    }

    fn serve_registrations(folder: &Path, refuses: u32) -> JoinHandle<Result<(), tonic::transport::Error>> {
        let socket = folder.join(KUBELET_SOCKET);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(socket).expect("a socket");
        let kubelet = Kubelet {
            folder: folder.to_owned(),
            refuses: Arc::new(refuses.into()),
        };
        let server = Server::builder().add_service(RegistrationServer::new(kubelet));
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)))
    }

    async fn until(what: &str, there: impl Fn() -> bool) -> Duration {
        let began = Instant::now();
        while !there() {
            assert!(began.elapsed() < Duration::from_secs(30), "{what} did not come");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        began.elapsed()
    }

    /// A thousand times as fast as it is: 600 ms are ten minutes.
    #[tokio::test]
    async fn a_kubelet_that_is_gone_for_ten_minutes_is_tried_ever_more_rarely_and_found_when_it_comes() {
        let dir = tempfile::tempdir().expect("a directory");
        let folder = dir.path().to_owned();
        let status = Arc::<crate::status::Status>::default();
        let (_board, posted) = watch::channel(Arc::default());
        let (attempts, ours) = (Arc::new(AtomicU32::new(0)), folder.clone());
        let plugin = Plugin {
            resource: "nvidia.com/gpu".into(),
            folder: folder.clone(),
            kind: "nvidia.com/gpu".into(),
            settings: Resources::default(),
            refuse_start: true,
            refused: tokio::sync::mpsc::channel(1).0,
            board: posted,
            status: Arc::clone(&status),
            pace: Pace {
                first: Duration::from_micros(50),
                longest: Duration::from_millis(10),
                look: Duration::from_millis(10),
            },
        };
        let keeper = tokio::spawn(keep_registered(plugin));
        let has = || status.registrations() == [("nvidia.com/gpu".to_owned(), true)];
        // What kubelets leave that end: a socket that nobody listens on.
        drop(UnixListener::bind(folder.join(KUBELET_SOCKET)).expect("a socket"));
        let counted = Arc::clone(&attempts);
        let counter = tokio::spawn(async move {
            let mut seen = std::collections::BTreeSet::new();
            loop {
                for entry in std::fs::read_dir(&ours).expect("a folder").flatten() {
                    if seen.insert(entry.file_name()) {
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                }
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        });
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert!(!has());
        // 60 at the longest pause, and a few before it is reached.
        let tried = attempts.load(Ordering::Relaxed);
        assert!(tried <= 80, "{tried} attempts in ten minutes");
        counter.abort();

        // It comes back, and does not take the first ones.
        let server = serve_registrations(&folder, 5);
        until("a registration", has).await;
        let left = std::fs::read_dir(&folder).expect("a folder").count();
        assert_eq!(
            left, 2,
            "kubelet's socket and ours: nothing is left of what failed"
        );

        // Its folder is taken away and put back, with another kubelet.
        server.abort();
        std::fs::remove_dir_all(&folder).expect("removed");
        tokio::time::sleep(Duration::from_millis(50)).await;
        std::fs::create_dir(&folder).expect("made");
        let _server = serve_registrations(&folder, 0);
        until("our socket", || {
            has() && std::fs::read_dir(&folder).expect("a folder").count() == 2
        })
        .await;
        assert!(!keeper.is_finished());
        keeper.abort();
    }
}
