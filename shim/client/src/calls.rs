//! The shim's methods as typed calls: which request, which deadline. It knows nothing of sockets.

use crate::connection::Connection;
use crate::{Code, Error, Result};
use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use slipway_shim_api::{Any, names, nanoseconds, pod, task};
use std::future::Future;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;

/// Calls that only look or signal.
const SHORT: Duration = Duration::from_secs(10);
/// Calls behind which a worker runs or cgroups are emptied. The shim's own deadlines are shorter, so that its error
/// arrives rather than ours.
const LONG: Duration = Duration::from_secs(60);

/// A connection to a pod's shim; clones share it.
#[derive(Clone)]
pub struct Shim {
    connection: Arc<Connection>,
}

/// How a container or exec ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, 128 + signal when killed by one.
    pub code: u32,
    /// When, in nanoseconds since 1970.
    pub at_ns: i64,
    /// The kernel killed something of it for want of memory.
    pub oom_killed: bool,
}

/// What a new container's stdin is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Stdin {
    /// /dev/null
    #[default]
    Null,
    /// A pipe (or the pty) that the shim keeps for [`Shim::attach`].
    Keep,
    /// The same, closed when the first attached stdin has ended.
    KeepOnce,
}

/// Where a new container's output goes.
#[derive(Debug)]
pub enum Output {
    /// /dev/null
    Null,
    /// Seen by Attach, and else by nobody.
    Discard,
    /// A CRI log file, written by the shim. Its directory exists.
    CriLog(PathBuf),
    /// The container writes straight into these.
    Pipes {
        /// Its stdout.
        stdout: OwnedFd,
        /// Its stderr.
        stderr: OwnedFd,
    },
}

/// A container to be created.
#[derive(Debug)]
pub struct CreateContainer {
    /// Unique in the pod.
    pub id: String,
    /// Holds config.json and the mounted rootfs.
    pub bundle: PathBuf,
    /// Its stdin.
    pub stdin: Stdin,
    /// Its stdout and stderr.
    pub stdout: Output,
    /// A pty; its output is the log's stdout.
    pub terminal: bool,
    /// The container of the pod, by its id, whose PID namespace it joins; its config.json has one without a path.
    pub pid_target: Option<String>,
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

impl Shim {
    pub(crate) fn new(connection: Connection) -> Shim {
        Shim {
            connection: Arc::new(connection),
        }
    }

    /// Whether both are the same connection.
    pub fn is(&self, other: &Shim) -> bool {
        Arc::ptr_eq(&self.connection, &other.connection)
    }

    async fn task<Q: prost::Message, R: prost::Message + Default>(
        &self,
        method: &'static str,
        request: &Q,
        deadline: Duration,
    ) -> Result<R> {
        self.connection
            .call(names::TASK, method, request, Vec::new(), Some(deadline))
            .await
    }

    async fn pod<Q: prost::Message, R: prost::Message + Default>(
        &self,
        method: &'static str,
        request: &Q,
        deadline: Duration,
    ) -> Result<R> {
        self.connection
            .call(names::POD, method, request, Vec::new(), Some(deadline))
            .await
    }

    /// Makes the pod's namespaces, cgroup and built-in init.
    ///
    /// # Errors
    /// When any of it fails; what was made before is undone.
    pub async fn create_pod(&self, request: pod::CreatePodRequest) -> Result<pod::CreatePodResponse> {
        self.pod("CreatePod", &request, LONG).await
    }

    /// Kills everything in the pod and unpins its namespaces, except the network's. Idempotent.
    ///
    /// # Errors
    /// When something would not die or let go.
    pub async fn stop_pod(&self) -> Result<()> {
        let pod::StopPodResponse {} = self.pod("StopPod", &pod::StopPodRequest {}, LONG).await?;
        Ok(())
    }

    /// Unpins the network namespace and removes the pod's cgroup if this shim made it. Idempotent.
    ///
    /// # Errors
    /// When they do not let go.
    pub async fn release_pod(&self) -> Result<()> {
        let pod::ReleasePodResponse {} = self.pod("ReleasePod", &pod::ReleasePodRequest {}, LONG).await?;
        Ok(())
    }

    /// Everything the shim knows.
    ///
    /// # Errors
    /// When the shim does not answer.
    pub async fn info(&self) -> Result<pod::InfoResponse> {
        self.pod("Info", &pod::InfoRequest {}, SHORT).await
    }

    /// Creates a container: its init exists and waits for [`Shim::start`]. Answers its pid on the host.
    ///
    /// # Errors
    /// When it cannot be created; nothing of it is left.
    pub async fn create(&self, container: CreateContainer) -> Result<u32> {
        self.ask_create(container, false).await
    }

    /// Has the shim begin to create a container: [`Shim::start`] waits for the end of that. Answers 0, or its pid where
    /// the shim is of a build that creates it before it answers.
    ///
    /// # Errors
    /// When it cannot be begun; nothing of it is left. A failure that comes later is told by [`Shim::start`], as an exit
    /// and by [`Shim::info`]; nothing is left then but the shim's memory of it, until it is deleted.
    pub async fn begin_create(&self, container: CreateContainer) -> Result<u32> {
        self.ask_create(container, true).await
    }

    async fn ask_create(&self, container: CreateContainer, begin: bool) -> Result<u32> {
        let discards = matches!(container.stdout, Output::Discard);
        let (stdout, fds) = match container.stdout {
            Output::Null => (String::new(), Vec::new()),
            Output::Discard => (names::DISCARD.to_owned(), Vec::new()),
            Output::CriLog(log) => (format!("{}{}", names::CRI_LOG, path(&log)), Vec::new()),
            Output::Pipes { stdout, stderr } => (names::PIPE.to_owned(), vec![stdout, stderr]),
        };
        let stdin = match container.stdin {
            Stdin::Null => "",
            Stdin::Keep => names::KEEP,
            Stdin::KeepOnce => names::KEEP_ONCE,
        };
        let mut request = task::CreateTaskRequest {
            id: container.id,
            bundle: path(&container.bundle),
            terminal: container.terminal,
            stdin: stdin.to_owned(),
            stdout,
            options: Some(Any {
                type_url: names::CREATE_OPTIONS.to_owned(),
                value: pod::CreateOptions {
                    pid_target: container.pid_target.unwrap_or_default(),
                    begin,
                }
                .encode_to_vec(),
            }),
            ..Default::default()
        };
        let call = |request, fds| async move {
            let create = self
                .connection
                .call(names::TASK, "Create", &request, fds, Some(LONG));
            create.await.map(|created: task::CreateTaskResponse| created.pid)
        };
        match call(request.clone(), fds).await {
            // A shim of a build before this kind of output drops what it is not told to keep. Whatever else it refuses it
            // refuses again.
            Err(refused) if discards && refused.is(Code::InvalidArgument) => {
                request.stdout = String::new();
                call(request, Vec::new()).await
            }
            answer => answer,
        }
    }

    /// Lets a created container's init run its program, once it is created. Answers its pid on the host.
    ///
    /// # Errors
    /// When there is no such container or it is not just created; when it could not be created, or its program not be run.
    pub async fn start(&self, id: &str) -> Result<u32> {
        let request = task::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let started: task::StartResponse = self.task("Start", &request, LONG).await?;
        Ok(started.pid)
    }

    /// Signals a container's init, or with `all` every process in its cgroup.
    ///
    /// # Errors
    /// When there is no such container, or it has exited (not found).
    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let request = task::KillRequest {
            id: id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.task("Kill", &request, SHORT).await
    }

    /// Forgets an exited container and removes its cgroup. A created one that was never started is killed first.
    ///
    /// # Errors
    /// When there is no such container, or it runs.
    pub async fn delete(&self, id: &str) -> Result<Exit> {
        let request = task::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let gone: task::DeleteResponse = self.task("Delete", &request, LONG).await?;
        let at_ns = gone.exited_at.as_ref().map_or(0, nanoseconds);
        Ok(Exit {
            code: gone.exit_status,
            at_ns,
            oom_killed: gone.oom_killed,
        })
    }

    /// Waits until a container has exited; answers at once when it has.
    ///
    /// # Errors
    /// When there is no such container; `Gone` when the shim dies meanwhile.
    pub async fn wait(&self, id: &str) -> Result<Exit> {
        let request = task::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let exit: task::WaitResponse = self
            .connection
            .call(names::TASK, "Wait", &request, Vec::new(), None)
            .await?;
        let at_ns = exit.exited_at.as_ref().map_or(0, nanoseconds);
        Ok(Exit {
            code: exit.exit_status,
            at_ns,
            oom_killed: exit.oom_killed,
        })
    }

    /// Changes a container's limits. `resources_json` is OCI LinuxResources; what it does not name stays.
    ///
    /// # Errors
    /// When there is no such container or the kernel refuses a limit.
    pub async fn update(&self, id: &str, resources_json: String) -> Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources_json.into_bytes(),
        };
        let request = task::UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(resources),
            ..Default::default()
        };
        // The kernel may look for memory to take back.
        self.task("Update", &request, LONG).await
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// When there is no such container or it does not run.
    pub async fn pause(&self, id: &str) -> Result<()> {
        self.task("Pause", &task::PauseRequest { id: id.to_owned() }, SHORT)
            .await
    }

    /// Lets a frozen container go on.
    ///
    /// # Errors
    /// When there is no such container or it is not paused.
    pub async fn resume(&self, id: &str) -> Result<()> {
        self.task("Resume", &task::ResumeRequest { id: id.to_owned() }, SHORT)
            .await
    }

    /// Pids of everything in a container's cgroup, as seen from the host.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let response: task::PidsResponse = self
            .task("Pids", &task::PidsRequest { id: id.to_owned() }, SHORT)
            .await?;
        Ok(response.processes.iter().map(|p| p.pid).collect())
    }

    /// Sets the size of a container's terminal.
    ///
    /// # Errors
    /// When there is no such container or it has none.
    pub async fn resize(&self, id: &str, width: u32, height: u32) -> Result<()> {
        let request = task::ResizePtyRequest {
            id: id.to_owned(),
            width,
            height,
            ..Default::default()
        };
        self.task("ResizePty", &request, SHORT).await
    }

    /// Runs a process in a container and waits for its end. `fds` are its stdin, stdout and stderr as far as the
    /// request names them; it writes straight into them. The shim goes on with it when this future is dropped, and kills it when the
    /// connection ends.
    ///
    /// The descriptors in the answer are for later versions of the protocol: empty today.
    ///
    /// # Errors
    /// When the program cannot be run: `NotFound` when it is not there, `FailedPrecondition` when the container does not
    /// run. A process that was run and failed is not an error.
    pub async fn exec(
        &self,
        request: pod::ExecRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<(pod::ExecResponse, Vec<OwnedFd>)> {
        // The shim enforces the timeout; ours only notices a shim that does not.
        let deadline = u64::try_from(request.timeout_ms)
            .ok()
            .filter(|ms| *ms > 0)
            .map(|ms| Duration::from_millis(ms).saturating_add(LONG));
        let response = self
            .connection
            .call(names::POD, "Exec", &request, fds, deadline)
            .await?;
        Ok((response, Vec::new()))
    }

    /// Runs a process in a container on a terminal of its own. Answers the terminal's master once the process runs, and
    /// a future of its end, which has to be polled meanwhile for the process's end to be seen.
    ///
    /// # Errors
    /// As [`Shim::exec`].
    pub async fn exec_terminal(
        &self,
        mut request: pod::ExecRequest,
    ) -> Result<(
        OwnedFd,
        impl Future<Output = Result<pod::ExecResponse>> + Send + use<>,
    )> {
        request.terminal = true;
        let broken = |source: std::io::Error| Error::Io {
            act: "pass a terminal through",
            path: "a socket".into(),
            source,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| broken(e.into()))?;
        let ours = tokio::net::UnixStream::from_std(ours.into()).map_err(broken)?;
        let shim = self.clone();
        let mut done = Box::pin(async move {
            shim.exec(request, vec![theirs])
                .await
                .map(|(response, _)| response)
        });
        let master = tokio::select! {
            early = &mut done => match early {
                Err(error) => return Err(error),
                // So short-lived that its end overtook the terminal, which is in the socket by now.
                Ok(response) => {
                    let master = receive_fd(&ours).await.map_err(broken)?;
                    let ended: std::pin::Pin<Box<dyn Future<Output = Result<pod::ExecResponse>> + Send>> =
                        Box::pin(async move { Ok(response) });
                    return Ok((master, ended));
                }
            },
            master = receive_fd(&ours) => match master {
                Ok(master) => master,
                // The shim let go of the socket because the command cannot be run, and says so.
                Err(source) => {
                    let told = tokio::time::timeout(SHORT, done).await;
                    return Err(told.ok().and_then(Result::err).unwrap_or_else(|| broken(source)));
                }
            },
        };
        Ok((
            master,
            done as std::pin::Pin<Box<dyn Future<Output = Result<pod::ExecResponse>> + Send>>,
        ))
    }

    /// Signals an exec by its id.
    ///
    /// # Errors
    /// When there is no such exec.
    pub async fn kill_exec(&self, container: &str, exec: &str, signal: u32) -> Result<()> {
        let request = pod::KillExecRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all: false,
        };
        let pod::KillExecResponse {} = self.pod("KillExec", &request, SHORT).await?;
        Ok(())
    }

    /// Kills an exec by its id, with what it started.
    ///
    /// # Errors
    /// When there is no such exec, or it has ended (not found).
    pub async fn kill_exec_tree(&self, container: &str, exec: &str) -> Result<()> {
        const SIGKILL: u32 = 9;
        let request = pod::KillExecRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            signal: SIGKILL,
            all: true,
        };
        let pod::KillExecResponse {} = self.pod("KillExec", &request, SHORT).await?;
        Ok(())
    }

    /// Opens a container's log file anew, after it was renamed.
    ///
    /// # Errors
    /// When it cannot be opened; the old one is written on.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = pod::ReopenLogRequest {
            container_id: id.to_owned(),
        };
        let pod::ReopenLogResponse {} = self.pod("ReopenLog", &request, SHORT).await?;
        Ok(())
    }

    /// Resource use of the containers named, or of all.
    ///
    /// # Errors
    /// When one of those named does not exist.
    pub async fn stats(&self, ids: Vec<String>) -> Result<pod::StatsResponse> {
        self.pod("Stats", &pod::StatsRequest { container_ids: ids }, SHORT)
            .await
    }

    /// Events after number `after`; those up to it are forgotten by the shim. Waits up to `wait` for the first.
    ///
    /// # Errors
    /// When the shim does not answer.
    pub async fn events(&self, after: u64, wait: Duration) -> Result<Vec<pod::Event>> {
        let wait_ms = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        let request = pod::EventsRequest { after, wait_ms };
        let response: pod::EventsResponse = self.pod("Events", &request, wait.saturating_add(SHORT)).await?;
        Ok(response.events)
    }

    /// Joins a container's streams: `fds` are those the request names, in the order stdin, stdout, stderr. Answers at
    /// once whether the container has a terminal.
    ///
    /// # Errors
    /// When there is no such container or it does not run.
    pub async fn attach(&self, request: pod::AttachRequest, fds: Vec<OwnedFd>) -> Result<bool> {
        let response: pod::AttachResponse = self
            .connection
            .call(names::POD, "Attach", &request, fds, Some(SHORT))
            .await?;
        Ok(response.terminal)
    }

    /// Asks the shim to end, which it does when it has no containers.
    ///
    /// # Errors
    /// When it has containers, or does not answer.
    pub async fn shutdown(&self) -> Result<()> {
        match self
            .task::<_, ()>("Shutdown", &task::ShutdownRequest::default(), SHORT)
            .await
        {
            // It may be gone before its answer is through.
            Err(Error::Gone) => Ok(()),
            other => other,
        }
    }

    /// Resolves when the connection is gone: the shim died, or ended because it was asked to.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }
}

/// Takes the one descriptor that is on its way through a socket.
async fn receive_fd(socket: &tokio::net::UnixStream) -> std::io::Result<OwnedFd> {
    loop {
        socket.readable().await?;
        let received = socket.try_io(Interest::READABLE, || {
            let mut byte = [0u8; 1];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut byte)];
            rustix::net::recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let fd = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            fd.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
        });
        match received {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}
