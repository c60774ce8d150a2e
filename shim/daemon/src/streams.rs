//! A container's streams while it lives: its output into the log and to whoever is attached, its stdin from there, its
//! terminal to containerd's fifos. Knows lines and buffers only as `log` and `pump` offer them.

use crate::diag::{debug, warning};
use crate::fault::Fault;
use crate::log::{Loss, Source as From, Splitter};
use crate::pump::{Flow, Pump, Sink};
use crate::reactor::{Interest, Ready, Source, Timer};
use crate::shim::Shim;
use crate::task::Stream;
use rustix::io::Errno;
use slipway_shim_api::pod;
use slipway_shim_api::status::Code;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// How long a terminal is let alone that nobody has open.
const HUNG_UP: Duration = Duration::from_millis(200);
/// Bytes of one stream that are read before the others have their turn.
const TURN: usize = 1 << 20;
/// Lines are written out when they are this many bytes, and always when the stream pauses.
const BATCH: usize = 64 * 1024;
/// The buffer of a stream that fills the ordinary one: as much as a pipe holds, and large enough that the allocator gives
/// it back to the system at once.
const HOT: usize = 132 * 1024;

/// Streams attached in one pod at once. Each keeps a bounded number of bytes for a side that does not keep up, so this bounds
/// what all of them keep: 4 MiB.
const MAX_ATTACHED: usize = 64;

/// Whose a pump is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// An attached stdin of a container.
    Stdin(u32),
    /// A container's terminal.
    Terminal(u32),
    /// An exec's terminal: container and serial number.
    Exec(u32, u32),
}

/// A pump and whose it is.
#[derive(Debug)]
pub struct PumpEntry {
    pump: Pump,
    owner: Owner,
    watched: Option<Flow>,
}

/// An attached reader and what it reads.
#[derive(Debug)]
pub struct SinkEntry {
    sink: Sink,
    container: u32,
    from: From,
}

/// How far reading an output stream came.
enum Copied {
    /// All there is for now, or as much as is its turn.
    All,
    /// Nobody has the terminal open.
    HungUp,
    /// Its end.
    End,
}

impl Shim {
    /// Begins to read a container's output stream.
    pub fn read_output(&mut self, key: u32, from: From, fd: OwnedFd) {
        let source = match from {
            From::Stdout => Source::Stdout(key),
            From::Stderr => Source::Stderr(key),
        };
        if let Err(e) = self.reactor.watch(&fd, source, Interest::Read) {
            return warning!("watch the output of a container: {e}");
        }
        if let Some(container) = self.containers.get_mut(&key) {
            let stream = Stream {
                fd,
                splitter: Splitter::new(from),
                sinks: Vec::new(),
            };
            match from {
                From::Stdout => container.streams.stdout = Some(stream),
                From::Stderr => container.streams.stderr = Some(stream),
            }
        }
    }

    /// A container's output has something, or its end.
    pub fn on_output(&mut self, key: u32, from: From) {
        let mut loss = None;
        let copied = self.copy_output(key, from, &mut loss);
        if let Some(Loss { bytes, reason }) = loss {
            self.log_lost(key, bytes, reason);
        }
        match copied {
            Copied::All => {}
            Copied::HungUp => {
                if let Some(stream) = self.containers.get(&key).and_then(|c| c.streams.stdout.as_ref()) {
                    self.reactor.forget(&stream.fd);
                    self.reactor.look_again(HUNG_UP, Timer::Terminal(key));
                }
            }
            Copied::End => {
                self.end_output(key, from);
                self.look_at_ending(key);
            }
        }
    }

    /// Watches a terminal again that nobody had open.
    pub fn read_terminal_again(&mut self, key: u32) {
        if let Some(stream) = self.containers.get(&key).and_then(|c| c.streams.stdout.as_ref())
            && let Err(e) = self
                .reactor
                .watch(&stream.fd, Source::Stdout(key), Interest::Read)
        {
            warning!("watch the terminal of a container: {e}");
            self.reactor.look_again(HUNG_UP, Timer::Terminal(key));
        }
    }

    /// Copies what is there into the log and to the sinks.
    fn copy_output(&mut self, key: u32, from: From, loss: &mut Option<Loss>) -> Copied {
        let Some(container) = self.containers.get_mut(&key) else {
            return Copied::All;
        };
        let lives = container.phase.init().is_some();
        let streams = &mut container.streams;
        let stream = match from {
            From::Stdout => &mut streams.stdout,
            From::Stderr => &mut streams.stderr,
        };
        let Some(stream) = stream else {
            return Copied::All;
        };
        let mut hot = Vec::new();
        let mut lines = Vec::new();
        let mut began = false;
        let mut read = 0;
        let mut gone = Vec::new();
        let copied = loop {
            let buffer = if hot.is_empty() {
                &mut self.scratch[..]
            } else {
                &mut hot[..]
            };
            let full = buffer.len();
            let n = match rustix::io::read(&stream.fd, &mut *buffer) {
                Ok(0) => break Copied::End,
                Ok(n) => n,
                Err(Errno::AGAIN) => break Copied::All,
                Err(Errno::INTR) => continue,
                // The terminal's last user has closed it. Init may open it again, as systemd does.
                Err(Errno::IO) if lives => break Copied::HungUp,
                Err(_) => break Copied::End,
            };
            let bytes = &buffer[..n];
            if streams.log.is_some() {
                stream.splitter.feed(bytes, crate::clock::now(), &mut lines);
            }
            for id in &stream.sinks {
                if let Some(entry) = self.sinks.get_mut(id) {
                    let was_behind = entry.sink.is_behind();
                    if !entry.sink.push(bytes) {
                        gone.push(*id);
                    } else if entry.sink.is_behind() && !was_behind {
                        self.reactor
                            .change(entry.sink.fd(), Source::Sink(*id), Interest::Write);
                    }
                }
            }
            if lines.len() >= BATCH
                && let Some(log) = &mut streams.log
            {
                began |= log.write(&lines);
                lines.clear();
            }
            read += n;
            if read >= TURN {
                break Copied::All;
            }
            if n == full && hot.is_empty() {
                hot = vec![0; HOT];
                lines.reserve(HOT);
            }
        };
        if matches!(copied, Copied::End) {
            stream.splitter.finish(crate::clock::now(), &mut lines);
        }
        if let Some(log) = &mut streams.log {
            let was_lossy = log.is_losing();
            began |= log.write(&lines);
            if began || (was_lossy && !log.is_losing()) {
                *loss = log.take_loss();
            }
        }
        for id in gone {
            self.drop_sink(id);
        }
        copied
    }

    fn log_lost(&mut self, key: u32, bytes: u64, reason: String) {
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        let id = container.id.clone();
        warning!("the log of container {id} lost {bytes} bytes: {reason}");
        self.happened(&id, pod::event::What::LogLoss(pod::LogLoss { bytes, reason }));
    }

    /// Closes an output stream and those attached to it.
    fn end_output(&mut self, key: u32, from: From) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let stream = match from {
            From::Stdout => container.streams.stdout.take(),
            From::Stderr => container.streams.stderr.take(),
        };
        let Some(stream) = stream else { return };
        self.reactor.forget(&stream.fd);
        for id in stream.sinks {
            // What a slow reader has not read yet goes on; the last of it closes the descriptor.
            if self.sinks.get(&id).is_some_and(|entry| !entry.sink.is_behind()) {
                self.drop_sink(id);
            }
        }
    }

    /// Reads what is left of a container's output, then closes all its streams.
    pub fn close_streams(&mut self, key: u32) {
        for from in [From::Stdout, From::Stderr] {
            let mut loss = None;
            self.copy_output(key, from, &mut loss);
            if let Some(Loss { bytes, reason }) = loss {
                self.log_lost(key, bytes, reason);
            }
            self.finish_lines(key, from);
            self.end_output(key, from);
        }
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let mut streams = std::mem::take(&mut container.streams);
        let mut loss = None;
        if let Some(log) = &mut streams.log {
            log.finish();
            loss = log.take_loss();
            container.streams.log_lost = log.lost();
            container.streams.log_path = Some(log.path().to_owned());
        }
        for id in streams.pumps {
            self.drop_pump(id);
        }
        if let Some(Loss { bytes, reason }) = loss {
            self.log_lost(key, bytes, reason);
        }
    }

    /// A stream is closed before its end: the line it is in the middle of is written.
    fn finish_lines(&mut self, key: u32, from: From) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let streams = &mut container.streams;
        let stream = match from {
            From::Stdout => &mut streams.stdout,
            From::Stderr => &mut streams.stderr,
        };
        if let (Some(stream), Some(log)) = (stream, &mut streams.log) {
            let mut lines = Vec::new();
            stream.splitter.finish(crate::clock::now(), &mut lines);
            log.write(&lines);
        }
    }

    /// Whether a container's output has ended on all its streams.
    pub fn is_drained(&self, key: u32) -> bool {
        let Some(container) = self.containers.get(&key) else {
            return true;
        };
        let streams = &container.streams;
        let terminal = |id: &u32| {
            self.pumps
                .get(id)
                .is_some_and(|p| p.owner == Owner::Terminal(key) && p.pump.is_output())
        };
        streams.stdout.is_none() && streams.stderr.is_none() && !streams.pumps.iter().any(terminal)
    }

    /// Starts copying from one descriptor to another.
    pub fn start_pump(&mut self, from: OwnedFd, to: OwnedFd, owner: Owner, output: bool) -> u32 {
        let id = self.add_pump(from, to, owner, output);
        self.run_pump(id);
        id
    }

    /// Starts copying from a fifo whose client may not have come yet: until then reading it would find its end.
    pub fn start_pump_from_fifo(&mut self, fifo: OwnedFd, to: OwnedFd, owner: Owner) -> u32 {
        let id = self.add_pump(fifo, to, owner, false);
        if let Some(entry) = self.pumps.get_mut(&id) {
            match self
                .reactor
                .watch(entry.pump.from(), Source::PumpFrom(id), Interest::Read)
            {
                Ok(_) => entry.watched = Some(Flow::NeedsInput),
                Err(e) => warning!("watch a fifo: {e}"),
            }
        }
        id
    }

    fn add_pump(&mut self, from: OwnedFd, to: OwnedFd, owner: Owner, output: bool) -> u32 {
        let id = self.number();
        let entry = PumpEntry {
            pump: Pump::new(from, to, output),
            owner,
            watched: None,
        };
        self.pumps.insert(id, entry);
        id
    }

    /// CloseIO: what an owner's stdin holds now is the last of it.
    pub fn finish_stdin(&mut self, is_owner: impl Fn(Owner) -> bool) {
        let mut finished = Vec::new();
        for (id, entry) in &mut self.pumps {
            if is_owner(entry.owner) && !entry.pump.is_output() {
                entry.pump.finish();
                finished.push(*id);
            }
        }
        for id in finished {
            self.run_pump(id);
        }
    }

    /// Copies what can be copied now, and watches for what is needed to go on.
    pub fn run_pump(&mut self, id: u32) {
        let Some(entry) = self.pumps.get_mut(&id) else {
            return;
        };
        let flow = entry.pump.run(&mut self.scratch);
        if entry.watched == Some(flow) {
            return;
        }
        match entry.watched.take() {
            Some(Flow::NeedsInput) => self.reactor.forget(entry.pump.from()),
            Some(Flow::NeedsRoom) => self.reactor.forget(entry.pump.to()),
            _ => {}
        }
        let watched = match flow {
            Flow::NeedsInput => self
                .reactor
                .watch(entry.pump.from(), Source::PumpFrom(id), Interest::Read),
            Flow::NeedsRoom => self
                .reactor
                .watch(entry.pump.to(), Source::PumpTo(id), Interest::Write),
            Flow::Ended | Flow::Broken => return self.pump_ended(id, flow),
        };
        match watched {
            Ok(true) => entry.watched = Some(flow),
            // A file: there is always more, until there is not.
            Ok(false) => drop(self.reactor.after(Duration::ZERO, Timer::Pump(id))),
            Err(e) => {
                debug!("watch a pump: {e}");
                self.pump_ended(id, Flow::Broken);
            }
        }
    }

    fn pump_ended(&mut self, id: u32, flow: Flow) {
        let Some(owner) = self.drop_pump(id) else { return };
        let (Owner::Stdin(key) | Owner::Terminal(key) | Owner::Exec(key, _)) = owner;
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        container.streams.pumps.retain(|pump| *pump != id);
        if matches!(owner, Owner::Stdin(_)) && flow == Flow::Ended && container.streams.stdin_once {
            container.streams.stdin = None;
        }
        if matches!(owner, Owner::Terminal(_)) {
            self.look_at_ending(key);
        }
    }

    /// Stops copying.
    pub fn drop_pump(&mut self, id: u32) -> Option<Owner> {
        let entry = self.pumps.remove(&id)?;
        self.reactor.forget(entry.pump.from());
        self.reactor.forget(entry.pump.to());
        Some(entry.owner)
    }

    /// An attached reader has room, or is gone.
    pub fn on_sink(&mut self, id: u32, ready: Ready) {
        let Some(entry) = self.sinks.get_mut(&id) else {
            return;
        };
        let stays = !ready.hang_up && entry.sink.drain();
        let (behind, key, from) = (entry.sink.is_behind(), entry.container, entry.from);
        let ended = self.containers.get(&key).is_none_or(|container| {
            let stream = match from {
                From::Stdout => &container.streams.stdout,
                From::Stderr => &container.streams.stderr,
            };
            stream.is_none()
        });
        if !stays || (ended && !behind) {
            self.drop_sink(id);
        } else if !behind {
            self.reactor
                .change(entry.sink.fd(), Source::Sink(id), Interest::HangUp);
        }
    }

    fn drop_sink(&mut self, id: u32) {
        let Some(entry) = self.sinks.remove(&id) else {
            return;
        };
        self.reactor.forget(entry.sink.fd());
        if let Some(container) = self.containers.get_mut(&entry.container) {
            let streams = &mut container.streams;
            for stream in [&mut streams.stdout, &mut streams.stderr].into_iter().flatten() {
                stream.sinks.retain(|sink| *sink != id);
            }
        }
    }

    /// Joins a container's streams.
    ///
    /// # Errors
    /// When it has none of those asked for, or does not run.
    pub fn attach(&mut self, request: &pod::AttachRequest, fds: Vec<OwnedFd>) -> Result<bool, Fault> {
        let stdins = self.pumps.values().filter(|p| matches!(p.owner, Owner::Stdin(_)));
        if self.sinks.len() + stdins.count() + fds.len() > MAX_ATTACHED {
            return Err(Fault::new(
                Code::ResourceExhausted,
                format_args!(
                    "attach to container {}: {MAX_ATTACHED} streams of the pod are attached already",
                    request.container_id
                ),
            ));
        }
        let (key, container) = self.find_mut(&request.container_id)?;
        container.init("attach to")?;
        let terminal = container.asked.terminal;
        let stdin = container
            .streams
            .stdin
            .as_ref()
            .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3));
        let wanted = [request.stdin, request.stdout, request.stderr];
        let need = wanted.iter().filter(|w| **w).count();
        if fds.len() != need {
            return Err(Fault::invalid(format_args!(
                "attach to container {}: {} descriptors came for {need} streams",
                request.container_id,
                fds.len()
            )));
        }
        for fd in &fds {
            slipway_sys::fd::set_nonblocking(fd, true)
                .map_err(|e| Fault::failed("attach to a container's streams", &e))?;
        }
        let mut fds = fds.into_iter();
        if request.stdin
            && let Some(from) = fds.next()
        {
            let to = stdin
                .ok_or_else(|| {
                    Fault::precondition(format_args!("container {} has no stdin", request.container_id))
                })?
                .map_err(|e| Fault::failed("duplicate stdin", &std::io::Error::from(e)))?;
            let id = self.start_pump(from, to, Owner::Stdin(key), false);
            if self.pumps.contains_key(&id)
                && let Some(container) = self.containers.get_mut(&key)
            {
                container.streams.pumps.push(id);
            }
        }
        for (wanted, from) in [(request.stdout, From::Stdout), (request.stderr, From::Stderr)] {
            if wanted && let Some(to) = fds.next() {
                self.add_sink(key, from, to);
            }
        }
        Ok(terminal)
    }

    fn add_sink(&mut self, key: u32, from: From, to: OwnedFd) {
        let id = self.number();
        let watched = self.reactor.watch(&to, Source::Sink(id), Interest::HangUp);
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let stream = match from {
            From::Stdout => &mut container.streams.stdout,
            From::Stderr => &mut container.streams.stderr,
        };
        // Without such a stream (a terminal has no stderr) the descriptor is closed: its other end sees the end.
        if let (Some(stream), Ok(_)) = (stream, watched) {
            stream.sinks.push(id);
            self.sinks.insert(
                id,
                SinkEntry {
                    sink: Sink::new(to),
                    container: key,
                    from,
                },
            );
        }
    }

    /// A container's terminal has come: its output is read, its input kept.
    ///
    /// # Errors
    /// When it cannot be duplicated.
    pub fn use_terminal(&mut self, key: u32, master: OwnedFd) -> std::io::Result<()> {
        slipway_sys::fd::set_nonblocking(&master, true)?;
        let dup = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 3);
        let (read, write) = (dup(&master)?, dup(&master)?);
        let Some(container) = self.containers.get_mut(&key) else {
            return Ok(());
        };
        container.streams.terminal = Some(master);
        let asked_fifo = container.streams.stdin_fifo.take();
        let fifo = container.streams.fifos.pop();
        if container.streams.log.is_some() || container.streams.discards {
            container.streams.stdin = Some(write);
            self.read_output(key, From::Stdout, read);
            return Ok(());
        }
        if let Some(to) = fifo {
            let id = self.start_pump(read, to, Owner::Terminal(key), true);
            self.keep_pump(key, id);
        }
        match asked_fifo {
            Some(from) => {
                let id = self.start_pump_from_fifo(from, write, Owner::Terminal(key));
                self.keep_pump(key, id);
            }
            None => {
                if let Some(container) = self.containers.get_mut(&key) {
                    container.streams.stdin = Some(write);
                }
            }
        }
        Ok(())
    }

    /// Begins to copy a container's stdin from its fifo.
    pub fn use_stdin_fifo(&mut self, key: u32) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let streams = &mut container.streams;
        if let Some(fifo) = streams.stdin_fifo.take()
            && let Some(to) = streams.stdin.take()
        {
            let id = self.start_pump_from_fifo(fifo, to, Owner::Stdin(key));
            self.keep_pump(key, id);
        }
    }

    fn keep_pump(&mut self, key: u32, id: u32) {
        if self.pumps.contains_key(&id)
            && let Some(container) = self.containers.get_mut(&key)
        {
            container.streams.pumps.push(id);
        }
    }
}
