//! What a container's processes hold and do, read from /proc: descriptors, sockets, states, the limit of the first.

/// More processes than this are not looked into: statistics must not take the node's time.
const MOST: usize = 4096;
/// Nor more threads than this, all together.
const MOST_THREADS: usize = 4096;
/// Nor more descriptors than this, all together.
const MOST_DESCRIPTORS: u64 = 100_000;

/// The processes of a container, together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Processes {
    pub descriptors: u64,
    pub sockets: u64,
    /// RLIMIT_NOFILE of its init, soft; `None`: unlimited, or it is gone.
    pub open_files_limit: Option<u64>,
    /// `None`: too many to look at.
    pub tasks: Option<Tasks>,
}

/// Threads by what they do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tasks {
    pub running: u64,
    pub sleeping: u64,
    pub stopped: u64,
    pub uninterruptible: u64,
}

/// Looks into processes by pid; those that end meanwhile hold nothing.
pub fn look(init: u32, pids: &[u32]) -> Processes {
    let mut all = Processes {
        open_files_limit: open_files_limit(init),
        tasks: tasks(pids),
        ..Processes::default()
    };
    for pid in pids.iter().take(MOST) {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.flatten() {
            if all.descriptors == MOST_DESCRIPTORS {
                return all;
            }
            all.descriptors += 1;
            let target = std::fs::read_link(entry.path());
            all.sockets += u64::from(target.is_ok_and(|to| to.to_string_lossy().starts_with("socket:")));
        }
    }
    all
}

fn tasks(pids: &[u32]) -> Option<Tasks> {
    let (mut all, mut looked_at) = (Tasks::default(), 0);
    for pid in pids {
        for entry in std::fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            looked_at += 1;
            if looked_at > MOST_THREADS {
                return None;
            }
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            // proc_pid_stat(5): the state stands behind the name, which may have anything in it.
            match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
                Some('R') => all.running += 1,
                Some('S') => all.sleeping += 1,
                Some('D') => all.uninterruptible += 1,
                Some('T' | 't') => all.stopped += 1,
                _ => {}
            }
        }
    }
    Some(all)
}

fn open_files_limit(pid: u32) -> Option<u64> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_and_sockets_of_a_process_are_counted() {
        let pid = std::process::id();
        let before = look(pid, &[pid]);
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let after = look(pid, &[pid]);
        assert!(
            after.sockets >= 2
                && after.descriptors >= before.descriptors.min(3)
                && after.open_files_limit > Some(0)
        );
        let nothing = Processes {
            tasks: Some(Tasks::default()),
            ..Processes::default()
        };
        assert_eq!(look(u32::MAX, &[u32::MAX]), nothing);
        let tasks = after.tasks.unwrap();
        assert!(tasks.running >= 1, "this thread runs: {tasks:?}");
    }
}
