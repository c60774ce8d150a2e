//! Units asked of systemd: a scope for each container, with its cgroup delegated to us, and slices for pods.
//!
//! systemd applies its own idea of a unit's limits to the cgroup whenever it reloads; so it is told the limits it knows, as
//! properties, before they are written. Devices are no property: our program is attached beside systemd's.

use super::dbus::{Body, CallError, Connection, Method, Value};
use super::resources::Resources;
use super::{CgroupError, Result, v2};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a start that is cancelled is asked for.
const STARTS: usize = 5;
/// How a job has ended that another one, or systemd itself, took back.
const CANCELLED: &str = "canceled";

/// systemd's own socket, for root; and the bus, where there is no such socket.
const SOCKETS: [(&str, bool); 2] = [
    ("/run/systemd/private", false),
    ("/run/dbus/system_bus_socket", true),
];
/// For everything on a connection. Whoever asks waits in line meanwhile, and asks again later what has to be done; a systemd
/// that reloads a loaded machine takes seconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// For a start, which nobody asks for again, and without which there is no pod or container.
const START_PATIENCE: Duration = Duration::from_secs(25);

/// For a turn alone: starts go on meanwhile, each for a moment.
const TURN_PATIENCE: Duration = Duration::from_secs(10);
/// What a turn is taken on.
const TURNS: &str = "/run/systemd";

/// The turn of whoever starts units (several may), or lets go of a slice that others may share (nobody else may): systemd
/// stops with a slice all that is in it, also what was started there a moment ago.
pub(super) struct Turn(#[expect(dead_code, reason = "held")] Option<OwnedFd>);

/// Waits for the turn to start units; after that time it is taken to have come.
pub(super) fn turn_to_start() -> Turn {
    turn(TURNS, FlockOperation::NonBlockingLockShared, START_PATIENCE).unwrap_or(Turn(None))
}

/// Waits for the turn to let go of a slice. `None`: it has not come.
pub(super) fn turn_to_let_go() -> Option<Turn> {
    turn(TURNS, FlockOperation::NonBlockingLockExclusive, TURN_PATIENCE)
}

fn turn(on: &str, operation: FlockOperation, patience: Duration) -> Option<Turn> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(on) = rustix::fs::open(on, flags, Mode::empty()) else {
        return Some(Turn(None));
    };
    let until = Instant::now() + patience;
    while rustix::fs::flock(&on, operation).is_err() {
        if Instant::now() >= until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Some(Turn(Some(on)))
}

/// A connection to systemd.
pub(super) struct Systemd {
    connection: Connection,
    bus: bool,
}

fn failed(act: &str) -> impl FnOnce(CallError) -> CgroupError {
    let act = act.to_string();
    move |e| CgroupError::Systemd {
        act,
        reason: match e {
            CallError::Remote { name, text } => format!("{text} ({name})"),
            CallError::Io(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                "no answer in time".to_owned()
            }
            CallError::Io(e) => e.to_string(),
        },
    }
}

impl Systemd {
    /// Connects.
    pub(super) fn connect() -> Result<Systemd> {
        Systemd::connect_for(PATIENCE)
    }

    /// Connects, to start units.
    pub(super) fn connect_to_start() -> Result<Systemd> {
        Systemd::connect_for(START_PATIENCE)
    }

    fn connect_for(patience: Duration) -> Result<Systemd> {
        let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
        for (socket, bus) in SOCKETS {
            match Systemd::connect_to(Path::new(socket), bus, patience) {
                Ok(systemd) => return Ok(systemd),
                Err(CallError::Io(e)) => last = e,
                Err(e) => return Err(failed("connect")(e)),
            }
        }
        Err(failed("connect: is it running?")(last.into()))
    }

    fn connect_to(socket: &Path, bus: bool, patience: Duration) -> std::result::Result<Systemd, CallError> {
        let mut systemd = Systemd {
            connection: Connection::open(socket, patience)?,
            bus,
        };
        if bus {
            let hello = Method {
                destination: Some("org.freedesktop.DBus"),
                path: "/org/freedesktop/DBus",
                interface: "org.freedesktop.DBus",
                member: "Hello",
            };
            systemd.connection.call(hello, &Body::default())?;
            let rule = "type='signal',sender='org.freedesktop.systemd1',member='JobRemoved'";
            systemd.connection.call(
                Method {
                    member: "AddMatch",
                    ..hello
                },
                &Body::default().string(rule),
            )?;
            systemd.manager("Subscribe", &Body::default())?;
        }
        Ok(systemd)
    }

    fn manager(&mut self, member: &str, body: &Body) -> std::result::Result<super::dbus::Message, CallError> {
        let method = Method {
            destination: self.bus.then_some("org.freedesktop.systemd1"),
            path: "/org/freedesktop/systemd1",
            interface: "org.freedesktop.systemd1.Manager",
            member,
        };
        self.connection.call(method, body)
    }

    /// Starts a scope `unit` in `slice` around the process `pid`, and waits until it stands. One of that name that is
    /// left from before is stopped first.
    pub(super) fn start_scope(&mut self, unit: &str, slice: &str, pid: u32) -> Result<()> {
        let properties = [
            ("Description", Value::Str(format!("container {unit}"))),
            ("Slice", Value::Str(slice.to_string())),
            ("Delegate", Value::Bool(true)),
            ("MemoryAccounting", Value::Bool(true)),
            ("CPUAccounting", Value::Bool(true)),
            ("TasksAccounting", Value::Bool(true)),
            ("IOAccounting", Value::Bool(true)),
            ("DefaultDependencies", Value::Bool(false)),
            ("PIDs", Value::U32s(vec![pid])),
        ];
        self.start(unit, &properties)
    }

    /// Starts a slice, and waits until it stands. One that stands is fine.
    pub(super) fn start_slice(&mut self, unit: &str) -> Result<()> {
        let properties = [
            ("Description", Value::Str(format!("pod {unit}"))),
            ("MemoryAccounting", Value::Bool(true)),
            ("CPUAccounting", Value::Bool(true)),
            ("TasksAccounting", Value::Bool(true)),
            ("IOAccounting", Value::Bool(true)),
            ("DefaultDependencies", Value::Bool(false)),
        ];
        self.start(unit, &properties)
    }

    /// A start is cancelled when its slice is being stopped at that moment, for the last of what was in it: it is asked for
    /// again then.
    fn start(&mut self, unit: &str, properties: &[(&str, Value)]) -> Result<()> {
        let act = format!("start unit {unit}");
        for _ in 1..STARTS {
            if self.start_once(&act, unit, properties)? != CANCELLED {
                return Ok(());
            }
        }
        match self.start_once(&act, unit, properties)?.as_str() {
            CANCELLED => Err(ended_with(&act, CANCELLED)),
            _ => Ok(()),
        }
    }

    /// What became of one start: done, skipped or cancelled.
    fn start_once(&mut self, act: &str, unit: &str, properties: &[(&str, Value)]) -> Result<String> {
        let body = || {
            Body::default()
                .string(unit)
                .string("replace")
                .properties(properties)
                .no_units()
        };
        let reply = match self.manager("StartTransientUnit", &body()) {
            Err(CallError::Remote { name, .. }) if name.ends_with(".UnitExists") => {
                if unit.ends_with(".slice") {
                    return Ok("done".to_owned());
                }
                self.stop(unit)?;
                let _ = self.manager("ResetFailedUnit", &Body::default().string(unit));
                self.manager("StartTransientUnit", &body())
            }
            other => other,
        };
        match self.result(act, reply.map_err(failed(act))?)? {
            result if ["done", "skipped", CANCELLED].contains(&result.as_str()) => Ok(result),
            other => Err(ended_with(act, &other)),
        }
    }

    /// Waits for the job a reply names to be done.
    fn finish(&mut self, act: &str, reply: super::dbus::Message) -> Result<()> {
        match self.result(act, reply)?.as_str() {
            "done" | "skipped" => Ok(()),
            other => Err(ended_with(act, other)),
        }
    }

    /// Waits for the end of the job a reply names, and says what became of it.
    fn result(&mut self, act: &str, reply: super::dbus::Message) -> Result<String> {
        let job = reply.strings().into_iter().next().unwrap_or_default();
        // JobRemoved(u id, o job, s unit, s result)
        let result = self.connection.signal("JobRemoved", |m| match &m.strings()[..] {
            [path, _, result] if *path == job => Some(result.clone()),
            _ => None,
        });
        result.map_err(|e| failed(act)(e.into()))
    }

    /// Stops a unit, and waits until it is gone; not there is fine.
    pub(super) fn stop(&mut self, unit: &str) -> Result<()> {
        let act = format!("stop unit {unit}");
        match self.manager("StopUnit", &Body::default().string(unit).string("replace")) {
            Err(CallError::Remote { name, .. }) if name.ends_with(".NoSuchUnit") => Ok(()),
            other => self.finish(&act, other.map_err(failed(&act))?),
        }
    }

    /// Tells it the limits it knows, for as long as the unit lives. `memory` is the limit of memory in force, bytes; `bfq`: the
    /// weight of block IO is the BFQ scheduler's.
    pub(super) fn set_limits(
        &mut self,
        unit: &str,
        resources: &Resources,
        memory: Option<u64>,
        bfq: bool,
    ) -> Result<()> {
        let properties = limits(resources, memory, bfq);
        if properties.is_empty() {
            return Ok(());
        }
        let mut set = |properties: &[_]| {
            let body = Body::default().string(unit).boolean(true).properties(properties);
            self.manager("SetUnitProperties", &body).map(drop)
        };
        let told = match set(&properties) {
            // Before 252 it knows of no idle units: then it is not told of it.
            Err(CallError::Remote { name, .. })
                if name.ends_with(".InvalidArgs") && properties.contains(&IDLE) =>
            {
                let rest: Vec<_> = properties.into_iter().filter(|p| *p != IDLE).collect();
                if rest.is_empty() { Ok(()) } else { set(&rest) }
            }
            other => other,
        };
        told.map_err(failed(&format!("set limits of unit {unit}")))
    }
}

/// A unit property.
type Property = (&'static str, Value);

/// cpu.idle, for systemd.
const IDLE: Property = ("CPUWeight", Value::U64(0));

/// All limits as unit properties, each once: files of cgroup v2 that are named themselves win over what OCI has a word for, as
/// when they are written.
fn limits(r: &Resources, memory: Option<u64>, bfq: bool) -> Vec<Property> {
    let mut out = translated(r, memory, bfq);
    for (name, value) in r
        .unified
        .iter()
        .flatten()
        .flat_map(|(file, value)| unified(file, value.trim()))
    {
        match out.iter_mut().find(|(known, _)| *known == name) {
            Some(known) if known.1 == IDLE.1 && name == IDLE.0 => {}
            Some(known) => known.1 = value,
            None => out.push((name, value)),
        }
    }
    out
}

/// A file of cgroup v2 as unit properties; none for what systemd has none for, and for values about which the kernel will have
/// its say when they are written.
///
/// `memory.oom.group` is among those: `OOMPolicy=kill`, which sets it, can only be given to a scope as it starts, not at all
/// before systemd 253, and has systemd end the whole scope when a cgroup that the container has made inside runs out of its
/// own memory. [`super::OomWatch`] puts it back instead.
fn unified(file: &str, value: &str) -> Vec<Property> {
    let amount = |name| {
        let n = if value == "max" {
            Some(u64::MAX)
        } else {
            value.parse().ok()
        };
        n.map(|n| (name, Value::U64(n))).into_iter().collect()
    };
    let set = |name| {
        bit_mask(value)
            .map(|bytes| (name, Value::Bytes(bytes)))
            .into_iter()
            .collect()
    };
    match file {
        "memory.min" => amount("MemoryMin"),
        "memory.low" => amount("MemoryLow"),
        "memory.high" => amount("MemoryHigh"),
        "memory.max" => amount("MemoryMax"),
        "memory.swap.max" => amount("MemorySwapMax"),
        "pids.max" => amount("TasksMax"),
        "cpu.weight" => amount("CPUWeight"),
        "cpu.idle" if value == "1" => vec![IDLE],
        "cpu.idle" if value == "0" => vec![("CPUWeight", Value::U64(u64::MAX))],
        "cpu.max" => {
            let (quota, period) = value.split_once(' ').unwrap_or((value, "100000"));
            let quota = if quota == "max" {
                Some(None)
            } else {
                quota.parse().ok().map(Some)
            };
            match (quota, period.trim().parse()) {
                (Some(quota), Ok(period)) if period > 0 => cpu_quota(quota, period).into(),
                _ => Vec::new(),
            }
        }
        "cpuset.cpus" => set("AllowedCPUs"),
        "cpuset.mems" => set("AllowedMemoryNodes"),
        "io.weight" => io_weight(value, 10_000, |n| n),
        "io.bfq.weight" => io_weight(value, 1000, of_bfq),
        _ => Vec::new(),
    }
}

/// "N" or "default N", up to `most`; a device's own weight is left alone by systemd.
fn io_weight(value: &str, most: u64, to: impl Fn(u64) -> u64) -> Vec<Property> {
    let n = value.strip_prefix("default ").unwrap_or(value).trim().parse();
    let n = n.ok().filter(|n| (1..=most).contains(n));
    n.map(|n| ("IOWeight", Value::U64(to(n)))).into_iter().collect()
}

/// The weight, 1 … 10000, of which systemd makes this one of BFQ's, 1 … 1000: the same up to 100, which is the default of both.
fn of_bfq(weight: u64) -> u64 {
    weight + weight.saturating_sub(100) * 10
}

/// Microseconds of CPU a second (no quota: as many as there are), in steps of ten milliseconds, rounded up as systemd does.
fn cpu_quota(quota: Option<u64>, period: u64) -> [Property; 2] {
    let a_second = quota.map_or(u64::MAX, |q| {
        let exact = (u128::from(q) * 1_000_000).div_ceil(u128::from(period));
        u64::try_from(exact.next_multiple_of(10_000)).unwrap_or(u64::MAX)
    });
    [
        ("CPUQuotaPerSecUSec", Value::U64(a_second)),
        ("CPUQuotaPeriodUSec", Value::U64(period)),
    ]
}

/// OCI's limits as unit properties (systemd.resource-control(5)); what has none is only written to the cgroup.
fn translated(r: &Resources, memory: Option<u64>, bfq: bool) -> Vec<Property> {
    let mut out = Vec::new();
    let amount = |n: i64| Value::U64(u64::try_from(n).unwrap_or(u64::MAX));
    if let Some(m) = &r.memory {
        let limit = m.limit.filter(|n| *n != 0);
        out.extend(limit.map(|n| ("MemoryMax", amount(n))));
        out.extend(
            m.reservation
                .filter(|n| *n != 0)
                .map(|n| ("MemoryLow", amount(n))),
        );
        // OCI's swap is memory and swap.
        let memory = limit.or(memory.and_then(|n| i64::try_from(n).ok()));
        match (m.swap.filter(|n| *n != 0), memory) {
            (Some(swap), Some(limit)) if swap > 0 && limit > 0 => {
                out.push(("MemorySwapMax", amount((swap - limit).max(0))));
            }
            (Some(swap), _) if swap < 0 => out.push(("MemorySwapMax", amount(-1))),
            _ => {}
        }
    }
    if let Some(c) = &r.cpu {
        match (c.idle, c.shares.filter(|n| *n != 0)) {
            // An idle group has no weight.
            (Some(1), _) => out.push(IDLE),
            (_, Some(n)) => out.push(("CPUWeight", Value::U64(v2::weight(n)))),
            (Some(_), None) => out.push(("CPUWeight", Value::U64(u64::MAX))),
            (None, None) => {}
        }
        if let Some(quota) = c.quota.filter(|n| *n != 0) {
            let period = c.period.filter(|n| *n != 0).unwrap_or(100_000);
            out.extend(cpu_quota(u64::try_from(quota).ok(), period));
        }
        for (name, set) in [("AllowedCPUs", &c.cpus), ("AllowedMemoryNodes", &c.mems)] {
            out.extend(
                set.as_deref()
                    .and_then(bit_mask)
                    .map(|bytes| (name, Value::Bytes(bytes))),
            );
        }
    }
    out.extend(
        r.pids
            .as_ref()
            .filter(|p| p.limit != 0)
            .map(|p| ("TasksMax", amount(p.limit))),
    );
    let weight = r.block_io.as_ref().and_then(|b| b.weight).filter(|n| *n != 0);
    out.extend(weight.into_iter().flat_map(|n| match bfq {
        true => unified("io.bfq.weight", &n.to_string()),
        false => unified("io.weight", &v2::io_weight(n).to_string()),
    }));
    out
}

/// "0-2,8" as bits, the first byte's lowest first; `None` for an empty or senseless one, about which the kernel will
/// have its say.
fn bit_mask(set: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for part in set.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
        if from > to || to > 8191 {
            return None;
        }
        for n in from..=to {
            if out.len() <= n / 8 {
                out.resize(n / 8 + 1, 0);
            }
            out[n / 8] |= 1 << (n % 8);
        }
    }
    (!out.is_empty()).then_some(out)
}

/// The slice a scope lies in, from its directory.
pub(super) fn slice_of(dir: &Path) -> String {
    let parent = dir.parent().and_then(Path::file_name);
    parent.map_or("-.slice".to_string(), |name| name.to_string_lossy().into_owned())
}

/// Where systemd put a process.
pub(super) fn cgroup_of(pid: u32) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    text.lines()
        .find_map(|l| l.strip_prefix("0::"))
        .map(PathBuf::from)
}

fn ended_with(act: &str, result: &str) -> CgroupError {
    CgroupError::Systemd {
        act: act.to_owned(),
        reason: format!("the job ended with {result}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::dbus::tests::message;
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// Plays systemd: answers each call by what `answers` says for its member, with a job that ends at once.
    fn play(
        listener: UnixListener,
        answers: Vec<(&'static str, Vec<u8>)>,
    ) -> std::thread::JoinHandle<Vec<String>> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            authenticate(&mut stream);
            let mut seen = Vec::new();
            for (member, answer) in answers {
                let call = read_call(&mut stream);
                assert!(call.contains(member), "{member} is not in {call}");
                seen.push(call);
                stream.write_all(&answer).unwrap();
            }
            seen
        })
    }

    fn authenticate(stream: &mut UnixStream) {
        let mut some = [0u8; 256];
        let n = stream.read(&mut some).unwrap();
        assert!(some[..n].starts_with(b"\0AUTH EXTERNAL 3"), "{:?}", &some[..n]);
        assert!(some[..n].ends_with(b"\r\nBEGIN\r\n"), "{:?}", &some[..n]);
        stream.write_all(b"OK 1234\r\n").unwrap();
    }

    fn read_call(stream: &mut UnixStream) -> String {
        let mut head = [0u8; 16];
        stream.read_exact(&mut head).unwrap();
        let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()) as usize;
        let mut rest = vec![0u8; (16 + number(12)).next_multiple_of(8) - 16 + number(4)];
        stream.read_exact(&mut rest).unwrap();
        String::from_utf8_lossy(&rest).into_owned()
    }

    fn job(serial: u32, result: &str) -> Vec<u8> {
        // The signal may come before the reply: both orders are met here.
        let mut bytes = message(4, 0, "JobRemoved", &["/job/other", "x", "failed"]);
        if serial.is_multiple_of(2) {
            bytes.extend(message(4, 0, "JobRemoved", &["/job/1", "x", result]));
            bytes.extend(message(2, serial, "", &["/job/1"]));
        } else {
            bytes.extend(message(2, serial, "", &["/job/1"]));
            bytes.extend(message(4, 0, "JobRemoved", &["/job/1", "x", result]));
        }
        bytes
    }

    fn with_systemd<T>(
        answers: Vec<(&'static str, Vec<u8>)>,
        f: impl FnOnce(&mut Systemd) -> T,
    ) -> (T, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = play(UnixListener::bind(&path).unwrap(), answers);
        let mut systemd = match Systemd::connect_to(&path, false, PATIENCE) {
            Ok(s) => s,
            Err(_) => panic!("no connection"),
        };
        let result = f(&mut systemd);
        drop(systemd);
        (result, server.join().unwrap())
    }

    #[test]
    fn a_scope_is_started_in_its_slice_with_its_process_and_delegated() {
        let answers = vec![("StartTransientUnit", job(1, "done"))];
        let (result, seen) = with_systemd(answers, |s| s.start_scope("slipway-c.scope", "pod.slice", 4711));
        result.unwrap();
        for word in ["slipway-c.scope", "pod.slice", "Delegate", "PIDs"] {
            assert!(seen[0].contains(word), "{word}");
        }
    }

    #[test]
    fn a_scope_left_from_before_is_stopped_first() {
        let exists = message(
            3,
            1,
            "org.freedesktop.systemd1.UnitExists",
            &["Unit x.scope already exists."],
        );
        let answers = vec![
            ("StartTransientUnit", exists),
            ("StopUnit", job(2, "done")),
            ("ResetFailedUnit", message(2, 3, "", &[])),
            ("StartTransientUnit", job(4, "done")),
        ];
        let (result, _) = with_systemd(answers, |s| s.start_scope("x.scope", "a.slice", 1));
        result.unwrap();
    }

    #[test]
    fn a_start_that_is_cancelled_is_asked_for_again_and_not_for_ever() {
        let answers = vec![
            ("StartTransientUnit", job(1, "canceled")),
            ("StartTransientUnit", job(2, "done")),
        ];
        let (result, seen) = with_systemd(answers, |s| s.start_scope("x.scope", "a.slice", 1));
        result.unwrap();
        assert_eq!(seen.len(), 2);
        let never = (1..=5)
            .map(|n| ("StartTransientUnit", job(n, "canceled")))
            .collect();
        let (result, _) = with_systemd(never, |s| s.start_scope("x.scope", "a.slice", 1));
        assert!(result.unwrap_err().to_string().contains("ended with canceled"));
    }

    #[test]
    fn units_are_started_side_by_side_and_never_while_a_slice_is_let_go_of() {
        let dir = tempfile::tempdir().unwrap();
        let take = |operation| turn(dir.path().to_str().unwrap(), operation, Duration::from_millis(20));
        let (share, alone) = (
            FlockOperation::NonBlockingLockShared,
            FlockOperation::NonBlockingLockExclusive,
        );
        let starts = [take(share).unwrap(), take(share).unwrap()];
        assert!(take(alone).is_none());
        drop(starts);
        let letting_go = take(alone).unwrap();
        assert!(take(share).is_none() && take(alone).is_none());
        drop(letting_go);
        assert!(take(share).is_some());
        assert!(turn("/no/such", alone, Duration::ZERO).is_some(), "no systemd");
    }

    #[test]
    fn failures_say_what_systemd_said() {
        let (result, _) = with_systemd(vec![("StartTransientUnit", job(1, "failed"))], |s| {
            s.start_slice("a.slice")
        });
        assert!(result.unwrap_err().to_string().contains("failed"));
        let no = message(3, 1, "org.freedesktop.DBus.Error.AccessDenied", &["Go away."]);
        let (result, _) = with_systemd(vec![("StopUnit", no)], |s| s.stop("x.scope"));
        let text = result.unwrap_err().to_string();
        assert!(text.contains("Go away.") && text.contains("x.scope"), "{text}");
        let gone = message(3, 1, "org.freedesktop.systemd1.NoSuchUnit", &["Unit not loaded."]);
        with_systemd(vec![("StopUnit", gone)], |s| s.stop("x.scope"))
            .0
            .unwrap();
    }

    #[test]
    fn limits_become_properties() {
        let r = Resources::from_json(
            r#"{"memory":{"limit":1000,"swap":1500},"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0,9"},
                "pids":{"limit":-1}}"#,
        );
        let expected = [
            ("MemoryMax", Value::U64(1000)),
            ("MemorySwapMax", Value::U64(500)),
            ("CPUWeight", Value::U64(100)),
            ("CPUQuotaPerSecUSec", Value::U64(500_000)),
            ("CPUQuotaPeriodUSec", Value::U64(100_000)),
            ("AllowedCPUs", Value::Bytes(vec![1, 2])),
            ("TasksMax", Value::U64(u64::MAX)),
        ];
        assert_eq!(limits(&r.unwrap(), None, false), expected);
        let r = Resources::from_json(r#"{"memory":{"swap":1500},"cpu":{"idle":1,"shares":9}}"#).unwrap();
        let expected = [("MemorySwapMax", Value::U64(1100)), IDLE];
        assert_eq!(limits(&r, Some(400), false), expected);
        assert_eq!(bit_mask("0-2,8"), Some(vec![7, 1]));
        assert_eq!((bit_mask(""), bit_mask("5-2"), bit_mask("x")), (None, None, None));
        assert_eq!(slice_of(Path::new("/a.slice/a-b.slice/x.scope")), "a-b.slice");
        assert_eq!(slice_of(Path::new("/x.scope")), "-.slice");
    }
    #[test]
    fn limits_by_the_names_of_cgroup_files_become_properties_and_win() {
        let r = Resources::from_json(
            r#"{"memory":{"limit":1000,"swap":1500},"cpu":{"shares":1024},"unified":{
                "memory.swap.max":"7","memory.high":"900","memory.min":"10","memory.low":"max","memory.max":"800",
                "memory.oom.group":"1","pids.max":"max","cpu.max":"max 50000","cpu.weight":"59",
                "cpuset.cpus":"0-1","cpuset.mems":"","io.max":"8:0 rbps=1"}}"#,
        );
        let mut expected = vec![
            ("MemoryMax", Value::U64(800)),
            ("MemorySwapMax", Value::U64(7)),
            ("CPUWeight", Value::U64(59)),
            ("CPUQuotaPerSecUSec", Value::U64(u64::MAX)),
            ("CPUQuotaPeriodUSec", Value::U64(50_000)),
            ("AllowedCPUs", Value::Bytes(vec![3])),
            ("MemoryHigh", Value::U64(900)),
            ("MemoryLow", Value::U64(u64::MAX)),
            ("MemoryMin", Value::U64(10)),
            ("TasksMax", Value::U64(u64::MAX)),
        ];
        let mut told = limits(&r.unwrap(), None, false);
        let by_name = |list: &mut Vec<Property>| list.sort_by_key(|(name, _)| *name);
        by_name(&mut expected);
        by_name(&mut told);
        assert_eq!(told, expected);
        assert_eq!(unified("cpu.max", "25000"), cpu_quota(Some(25_000), 100_000));
        assert_eq!(unified("cpu.max", "25000 0"), []);
        assert_eq!(unified("memory.high", "much"), []);
        assert_eq!(unified("cpu.idle", "1"), [IDLE]);
        // An idle group's weight is refused by the kernel, whichever comes first.
        let r = Resources::from_json(r#"{"unified":{"cpu.idle":"1","cpu.weight":"9"}}"#);
        assert_eq!(limits(&r.unwrap(), None, false), [IDLE]);
    }

    #[test]
    fn the_weight_of_block_io_is_one_of_which_systemd_makes_what_is_written() {
        let told = |json: &str, bfq| limits(&Resources::from_json(json).unwrap(), None, bfq);
        let weight = |n| [("IOWeight", Value::U64(n))];
        let class = r#"{"blockIO":{"weight":500}}"#;
        assert_eq!(told(class, false), weight(v2::io_weight(500)));
        assert_eq!(told(class, true), weight(4500));
        for (file, value, expected) in [
            ("io.weight", "default 59", 59),
            ("io.weight", "59", 59),
            ("io.bfq.weight", "59", 59),
            ("io.bfq.weight", "default 1000", 10_000),
        ] {
            let json = format!(r#"{{"blockIO":{{"weight":500}},"unified":{{"{file}":"{value}"}}}}"#);
            assert_eq!(told(&json, false), weight(expected), "{file} {value}");
        }
        for (file, value) in [
            ("io.weight", "8:0 59"),
            ("io.weight", "0"),
            ("io.bfq.weight", "1001"),
        ] {
            assert_eq!(unified(file, value), [], "{file} {value}");
        }
        // As systemd has it: BFQ_WEIGHT.
        let made = |n: u64| if n <= 100 { n } else { 100 + (n - 100) * 900 / 9900 };
        assert!((1..=1000).all(|n| made(of_bfq(n)) == n));
    }

    #[test]
    fn a_systemd_that_knows_no_idle_units_is_told_the_rest() {
        let r = Resources::from_json(r#"{"unified":{"cpu.idle":"1","memory.high":"900"}}"#).unwrap();
        let no = message(3, 1, "org.freedesktop.DBus.Error.InvalidArgs", &["CPUWeight"]);
        let answers = vec![
            ("SetUnitProperties", no),
            ("SetUnitProperties", message(2, 2, "", &[])),
        ];
        let (result, seen) = with_systemd(answers, |s| s.set_limits("x.scope", &r, None, false));
        result.unwrap();
        assert!(seen[0].contains("CPUWeight") && seen[0].contains("MemoryHigh"));
        assert!(!seen[1].contains("CPUWeight") && seen[1].contains("MemoryHigh"));
    }
}
