//! Exits that came before anybody knew of the process. Refuses to know who will ask.

use slipway_sys::process::Status;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// How many are kept. Who is reaped without being known is mostly what a container has orphaned: nobody asks for those, and
/// there may be any number of them.
const MAX: usize = 1024;
/// How long one is kept: whoever comes to know of a process has heard of it by then, or has been given up.
const KEPT: Duration = Duration::from_secs(60);

/// The latest exits of unknown processes.
#[derive(Debug, Default)]
pub struct Early {
    exits: BTreeMap<u32, (Status, i64)>,
    /// In the order in which they came. One whose exit was asked for, or whose pid came again since, is in vain.
    order: VecDeque<(u32, i64, Instant)>,
}

impl Early {
    /// Keeps one: how it ended, and when (nanoseconds since 1970).
    pub fn insert(&mut self, pid: u32, status: Status, at_ns: i64) {
        self.insert_at(pid, status, at_ns, Instant::now());
    }

    fn insert_at(&mut self, pid: u32, status: Status, at_ns: i64, now: Instant) {
        while let Some((oldest, its_ns, since)) = self.order.front().copied() {
            if self.order.len() < MAX && now.saturating_duration_since(since) < KEPT {
                break;
            }
            self.order.pop_front();
            if self.exits.get(&oldest).is_some_and(|(_, at)| *at == its_ns) {
                self.exits.remove(&oldest);
            }
        }
        self.exits.insert(pid, (status, at_ns));
        self.order.push_back((pid, at_ns, now));
    }

    /// How a process ended, and when; once.
    pub fn remove(&mut self, pid: u32) -> Option<(Status, i64)> {
        self.exits.remove(&pid)
    }

    /// Nobody will ask for any.
    pub fn clear(&mut self) {
        *self = Early::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept_and_none_for_longer_than_anybody_asks() {
        let mut early = Early::default();
        let begin = Instant::now();
        let all = MAX as u32 * 3;
        for pid in 1..=all {
            early.insert_at(pid, Status::Code(0), i64::from(pid), begin);
        }
        assert_eq!((early.exits.len(), early.order.len()), (MAX, MAX));
        assert_eq!(early.remove(1), None);
        assert_eq!(early.remove(all), Some((Status::Code(0), i64::from(all))));
        assert_eq!(early.remove(all), None);
        let later = begin + KEPT;
        early.insert_at(7, Status::Code(7), 1, later - Duration::from_secs(1));
        early.insert_at(8, Status::Code(8), 2, later);
        assert_eq!(early.exits.len(), 2, "the others are too old");
        // A pid that comes again is another process.
        early.insert_at(7, Status::Code(9), 3, later + KEPT - Duration::from_secs(1));
        early.insert_at(9, Status::Code(0), 4, later + KEPT);
        assert_eq!(early.remove(7), Some((Status::Code(9), 3)));
        assert_eq!(early.remove(8), None);
        early.clear();
        assert!(early.exits.is_empty() && early.order.is_empty());
    }
}
