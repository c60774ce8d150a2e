//! What happened in the pod, kept until it is acknowledged. Knows nobody who asks.
//!
//! Every event has the next number. Asking for the events after a number forgets those up to it. There are at most
//! [`KEPT`]: beyond that the oldest goes, which is told by a gap in the numbers; what a container's exit was can still be
//! asked of the container itself.

use slipway_shim_api::pod::{self, event::What};
use std::collections::VecDeque;

/// Events kept unacknowledged.
pub const KEPT: usize = 1024;

/// The events, oldest first.
#[derive(Debug, Default)]
pub struct Events {
    kept: VecDeque<pod::Event>,
    last: u64,
}

impl Events {
    /// Notes that something happened now.
    pub fn push(&mut self, container: &str, what: What) {
        self.last += 1;
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(pod::Event {
            seq: self.last,
            time_ns: crate::clock::now(),
            container_id: container.to_owned(),
            what: Some(what),
        });
    }

    /// The number of the newest event; 0: there was none.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Forgets the events up to a number and answers those after it.
    pub fn after(&mut self, seen: u64) -> Vec<pod::Event> {
        while self.kept.front().is_some_and(|event| event.seq <= seen) {
            self.kept.pop_front();
        }
        if self.kept.is_empty() {
            self.kept = VecDeque::new();
        }
        self.kept.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(events: &[pod::Event]) -> Vec<u64> {
        events.iter().map(|e| e.seq).collect()
    }

    #[test]
    fn an_event_is_kept_until_it_is_acknowledged() {
        let mut events = Events::default();
        for _ in 0..3 {
            events.push("c", What::Oom(pod::Oom {}));
        }
        assert_eq!(numbers(&events.after(0)), [1, 2, 3]);
        assert_eq!(
            numbers(&events.after(0)),
            [1, 2, 3],
            "asking alone acknowledges nothing"
        );
        assert_eq!(numbers(&events.after(2)), [3]);
        assert_eq!(numbers(&events.after(0)), [3]);
        assert!(events.after(3).is_empty());
        events.push("c", What::Oom(pod::Oom {}));
        assert_eq!(numbers(&events.after(3)), [4], "numbers go on");
    }

    #[test]
    fn unacknowledged_events_are_bounded_and_the_gap_shows() {
        let mut events = Events::default();
        for _ in 0..KEPT + 10 {
            events.push("c", What::Oom(pod::Oom {}));
        }
        let kept = events.after(0);
        assert_eq!((kept.len(), kept[0].seq), (KEPT, 11));
    }
}
