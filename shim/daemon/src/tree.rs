//! Killing a process together with what it started. Knows processes by `/proc`, nothing of containers.

use slipway_sys::process::Child;
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::time::Duration;

const SIGKILL: i32 = 9;
const SIGSTOP: i32 = 19;
/// How many lists are read at most of one that keeps starting others, or sleeps in the kernel and does not stop.
const ROUNDS: u32 = 16;

/// Kills processes and what can be found of what they started, until nothing new is found.
///
/// All are stopped before the first is killed: one that runs may start another between the list and its end, and the
/// children of one that has ended are somebody else's. (The kernel lets nobody fork who has a signal to take.)
pub fn kill(roots: &[&Child], list: impl Fn() -> Vec<u32>) {
    for root in roots {
        let _ = slipway_sys::process::send_signal(root.pidfd.as_fd(), SIGSTOP);
    }
    let pids: BTreeSet<u32> = roots.iter().map(|root| root.pid).collect();
    let mut stopped: Vec<Relation> = Vec::new();
    let mut known = pids.clone();
    for _ in 0..ROUNDS {
        // One that was already about to fork when the signal came does so: a list counts only when all were still before it.
        let first: Vec<Relation> = pids.iter().filter_map(|pid| Relation::of(*pid)).collect();
        let still = settle(first.iter().chain(&stopped));
        let relations: Vec<Relation> = list().into_iter().filter_map(Relation::of).collect();
        let found = descendants(&pids, &relations, &known);
        let before = stopped.len();
        for relation in relations {
            if found.contains(&relation.pid) && known.insert(relation.pid) {
                relation.signal(SIGSTOP);
                stopped.push(relation);
            }
        }
        if stopped.len() == before && still {
            break;
        }
    }
    for relation in stopped {
        relation.signal(SIGKILL);
    }
    for root in roots {
        crate::create::kill(root);
    }
}

/// Whether it is an ended child of one of these, which waits to be reaped.
pub fn is_ended_child(pid: u32, parents: [u32; 2]) -> bool {
    Relation::of(pid)
        .is_some_and(|relation| matches!(relation.state, b'Z' | b'X') && parents.contains(&relation.parent))
}

/// Waits until none of them runs any more; whether it could be seen in time. One that sleeps in the kernel may take long.
fn settle<'a>(all: impl Iterator<Item = &'a Relation>) -> bool {
    let mut running: Vec<Relation> = all.copied().collect();
    for _ in 0..20 {
        running.retain(|relation| {
            Relation::of(relation.pid).is_some_and(|now| {
                now.start_time == relation.start_time && !matches!(now.state, b'T' | b't' | b'Z' | b'X')
            })
        });
        if running.is_empty() {
            return true;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    false
}

/// What `/proc/<pid>/stat` says of a process's relations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Relation {
    pid: u32,
    /// "T": stopped, "Z": ended, as ps shows it.
    state: u8,
    parent: u32,
    session: u32,
    /// With the pid, it names one process and no other.
    start_time: u64,
}

impl Relation {
    /// Signals the process, if it is still there.
    fn signal(self, signal: i32) {
        if let Ok(pidfd) = slipway_sys::process::pidfd_open(self.pid)
            && Relation::of(self.pid).is_some_and(|now| now.start_time == self.start_time)
        {
            let _ = slipway_sys::process::send_signal(pidfd.as_fd(), signal);
        }
    }

    fn of(pid: u32) -> Option<Relation> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the command in parentheses, which may itself hold anything.
        let end = stat.iter().rposition(|b| *b == b')')?;
        let mut fields = std::str::from_utf8(stat.get(end + 1..)?)
            .ok()?
            .split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let start_time = fields.nth(15)?.parse().ok()?;
        Some(Relation {
            pid,
            state,
            parent,
            session,
            start_time,
        })
    }
}

/// Processes, their sessions, and everything below those; `known` were found before and may be gone by now.
fn descendants(roots: &BTreeSet<u32>, relations: &[Relation], known: &BTreeSet<u32>) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = known | roots;
    loop {
        let before = found.len();
        for relation in relations {
            if roots.contains(&relation.session) || found.contains(&relation.parent) {
                found.insert(relation.pid);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_exec_started_is_found_by_session_and_by_descent() {
        let relation = |pid, parent, session| Relation {
            pid,
            state: b'S',
            parent,
            session,
            start_time: 0,
        };
        let relations = [
            relation(1, 0, 1),    // init
            relation(10, 0, 10),  // the exec
            relation(11, 10, 10), // its child
            relation(12, 1, 10),  // a grandchild whose parent is gone
            relation(13, 11, 13), // one that left the session
            relation(14, 13, 13), // its child
            relation(20, 1, 1),   // init's
        ];
        let found = descendants(&BTreeSet::from([10]), &relations, &BTreeSet::new());
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [10, 11, 12, 13, 14]);
    }

    #[test]
    fn a_process_knows_its_relations() {
        let own = Relation::of(std::process::id()).expect("we run");
        assert_eq!(own.parent, std::os::unix::process::parent_id());
        assert_eq!(
            own.start_time,
            slipway_sys::process::start_time(own.pid).expect("we run")
        );
    }
}
