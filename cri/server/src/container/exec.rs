//! ExecSync: a command in a running container, its output bounded, its end awaited, its background children not.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use slipway_shim_client::pod as wire;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::command::{self, Killer};
use crate::daemon::Daemon;
use crate::error::Error;

const VERB: &str = "run a command in it";
/// What the CRI allows of each stream. Decimal: what the kubelet takes in one message is 16 MiB, and the rest of the
/// answer needs a few bytes too.
pub const STREAM_LIMIT: usize = 16_000_000;
/// One read of a pipe, whose usual capacity it is.
const CHUNK: usize = 64 << 10;

/// What came of a command.
#[derive(Debug, Default)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub code: i32,
}

/// Runs a command. A timeout of zero is none. Dropping the future kills the command.
pub async fn exec_sync(
    daemon: &Arc<Daemon>,
    id: &str,
    cmd: Vec<String>,
    timeout: Duration,
) -> Result<Output, Error> {
    let (container, shim, owner) = command::running(daemon, id, VERB)?;
    let (stdout, stdout_end) = owner.pipe()?;
    let (stderr, stderr_end) = owner.pipe()?;
    let (mut out, mut err) = (Stream::new(stdout)?, Stream::new(stderr)?);
    let exec_id = command::next_id("sync");
    let shown = shown(&cmd);
    let request = wire::ExecRequest {
        container_id: container.id().to_string(),
        exec_id: exec_id.clone(),
        args: cmd,
        stdout: true,
        stderr: true,
        timeout_ms: i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX),
        ..Default::default()
    };
    let mut killer = Killer::new(&shim, &container, &exec_id);
    let mut ended = std::pin::pin!(shim.exec(request, vec![stdout_end, stderr_end]));
    let answer = loop {
        tokio::select! {
            answer = &mut ended => break answer,
            () = out.read() => {}
            () = err.read() => {}
        }
    };
    killer.disarm();
    let (answer, _) = answer.map_err(Error::shim("run a command in container", container.id()))?;
    if answer.timed_out {
        return Err(Error::ExecTimeout {
            id: container.id().to_string(),
            cmd: shown,
            timeout,
        });
    }
    // What it had written is in the pipes; a background child that still holds them is not waited for.
    out.drain();
    err.drain();
    Ok(Output {
        stdout: out.kept,
        stderr: err.kept,
        code: i32::try_from(answer.exit_code).unwrap_or(i32::MAX),
    })
}

/// One stream of output: everything is read, what fits the limit is kept.
struct Stream {
    pipe: Option<Receiver>,
    kept: Vec<u8>,
    chunk: Vec<u8>,
}

impl Stream {
    fn new(pipe: OwnedFd) -> Result<Stream, Error> {
        let pipe = Receiver::from_owned_fd(pipe).map_err(Error::io("wait for", "a pipe"))?;
        Ok(Stream {
            pipe: Some(pipe),
            kept: Vec::new(),
            chunk: Vec::new(),
        })
    }

    /// Reads once; pending forever after the end.
    async fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else {
            return std::future::pending().await;
        };
        self.chunk.resize(CHUNK, 0);
        match pipe.read(&mut self.chunk).await {
            Ok(0) | Err(_) => self.pipe = None,
            Ok(length) => self.keep(length),
        }
    }

    /// Takes what is there without waiting for more.
    fn drain(&mut self) {
        self.chunk.resize(CHUNK, 0);
        // A child that writes faster than we read must not keep us here: a pipe holds a megabyte at most.
        for _ in 0..32 {
            let Some(pipe) = &self.pipe else { return };
            // Not by the runtime's idea of readiness, which may lag behind the kernel's.
            match rustix::io::read(pipe, &mut self.chunk) {
                Ok(0) | Err(_) => return,
                Ok(length) => self.keep(length),
            }
        }
    }

    fn keep(&mut self, length: usize) {
        let room = STREAM_LIMIT.saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&self.chunk[..length.min(room)]);
    }
}

/// As an error message shows it.
pub fn shown(cmd: &[String]) -> String {
    let mut text: String = cmd.join(" ").chars().take(80).collect();
    if text.len() < cmd.iter().map(|arg| arg.len() + 1).sum::<usize>() - 1 {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn output_beyond_the_limit_is_read_and_thrown_away() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut stream = Stream::new(reader).unwrap();
        stream.kept = vec![b'x'; STREAM_LIMIT - 2];
        std::fs::File::from(writer).write_all(b"abcdef").unwrap();
        stream.read().await;
        assert_eq!(stream.kept.len(), STREAM_LIMIT);
        assert!(stream.kept.ends_with(b"xab"));
    }

    #[tokio::test]
    async fn draining_takes_what_is_there_although_somebody_holds_the_pipe() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut writer = std::fs::File::from(writer);
        let mut stream = Stream::new(reader).unwrap();
        writer.write_all(b"first").unwrap();
        stream.read().await;
        writer.write_all(b" last").unwrap();
        stream.drain();
        assert_eq!(stream.kept, b"first last");
        drop(writer);
    }

    #[test]
    fn long_commands_are_shortened() {
        assert_eq!(shown(&["echo".into(), "hi".into()]), "echo hi");
        assert!(shown(&["x".repeat(200)]).ends_with('…'));
    }
}
