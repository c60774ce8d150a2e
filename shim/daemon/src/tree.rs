//! Killing a process together with what it started. Knows processes by `/proc`, nothing of containers.

use slipway_sys::process::Child;
use std::collections::BTreeSet;
use std::os::fd::AsFd;

const SIGKILL: i32 = 9;

/// Kills a process and what can be found of what it started, until nothing new is found.
pub fn kill(root: &Child, procs: Vec<u32>, list_again: impl Fn() -> Vec<u32>) {
    let mut killed = BTreeSet::new();
    let mut procs = procs;
    for _ in 0..16 {
        let relations: Vec<Relation> = procs.iter().filter_map(|pid| Relation::of(*pid)).collect();
        let found = descendants(root.pid, &relations, &killed);
        let fresh: Vec<u32> = found.difference(&killed).copied().collect();
        if fresh.is_empty() {
            break;
        }
        for pid in fresh {
            let before = relations.iter().find(|r| r.pid == pid).map(|r| r.start_time);
            if let Ok(pidfd) = slipway_sys::process::pidfd_open(pid)
                && Relation::of(pid).map(|now| now.start_time) == before
            {
                let _ = slipway_sys::process::send_signal(pidfd.as_fd(), SIGKILL);
            }
            killed.insert(pid);
        }
        procs = list_again();
    }
    crate::create::kill(root);
}

/// What `/proc/<pid>/stat` says of a process's relations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Relation {
    pid: u32,
    parent: u32,
    session: u32,
    /// With the pid, it names one process and no other.
    start_time: u64,
}

impl Relation {
    fn of(pid: u32) -> Option<Relation> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the command in parentheses, which may itself hold anything.
        let end = stat.iter().rposition(|b| *b == b')')?;
        let mut fields = std::str::from_utf8(stat.get(end + 1..)?)
            .ok()?
            .split_ascii_whitespace();
        let parent = fields.nth(1)?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        let start_time = fields.nth(15)?.parse().ok()?;
        Some(Relation {
            pid,
            parent,
            session,
            start_time,
        })
    }
}

/// A process, its session, and everything below those; `known` were found before and may be gone by now.
fn descendants(root: u32, relations: &[Relation], known: &BTreeSet<u32>) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = known.clone();
    found.insert(root);
    loop {
        let before = found.len();
        for relation in relations {
            if relation.session == root || found.contains(&relation.parent) {
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
        let found = descendants(10, &relations, &BTreeSet::new());
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
