//! Want of memory: hearing of what the kernel kills in containers, and not being killed oneself.

use crate::diag::{Chain, info, warning};
use crate::reactor::Timer;
use crate::shim::Shim;
use crate::task::{Ending, Outcome, Phase};
use slipway_shim_api::names::topic;
use slipway_shim_api::{events, pod};
use slipway_sys::cgroup::OomWatch;
use std::io;
use std::time::Duration;

/// How often, and in which distance, is looked for a killing that was announced.
const OOM_LOOKS: u32 = 10;
const OOM_PAUSE: Duration = Duration::from_millis(20);
/// The exit code of what SIGKILL ended.
const KILLED: u32 = 128 + 9;
/// Wanted for the shim, given where the kernel permits.
const WANTED: i32 = -998;

/// The shim's own oom_score_adj: it must outlive its containers, which must not inherit that.
#[derive(Debug, Clone, Copy)]
pub struct OomScore {
    inherited: i32,
    wanted: i32,
}

impl OomScore {
    /// As near to what is wanted as the kernel permits from now on.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn take() -> io::Result<OomScore> {
        let inherited = slipway_sys::process::oom_score_adj(None)?;
        let wanted = slipway_sys::process::set_oom_score_adj(WANTED.min(inherited))?;
        Ok(OomScore { inherited, wanted })
    }

    /// For the moment of a fork: as it was.
    pub fn as_inherited(self) {
        self.set(self.inherited);
    }

    /// And back.
    pub fn as_wanted(self) {
        self.set(self.wanted);
    }

    fn set(self, value: i32) {
        if self.inherited != self.wanted
            && let Err(e) = slipway_sys::process::set_oom_score_adj(value)
        {
            warning!("{}", Chain(&e));
        }
    }
}

/// Looks for a killing that was announced: so many after each announcement, and one timer however many of those come.
#[derive(Debug, Default)]
pub struct Looks {
    taken: u32,
    awaited: bool,
}

impl Looks {
    /// The kernel has announced one, or it was seen.
    fn anew(&mut self) {
        self.taken = 0;
    }

    /// The timer has come.
    fn come(&mut self) {
        self.awaited = false;
    }

    /// Nothing was seen: whether a timer has to be set for another look.
    fn again(&mut self) -> bool {
        if self.awaited || self.taken >= OOM_LOOKS {
            return false;
        }
        self.taken += 1;
        self.awaited = true;
        true
    }
}

impl Shim {
    /// A container wants memory, or its cgroup is going.
    pub fn on_oom_event(&mut self, key: u32) {
        if let Some(container) = self.containers.get_mut(&key) {
            container.oom_looks.anew();
        }
        self.on_oom(key);
    }

    /// Another look at a container that wanted memory.
    pub fn on_oom_timer(&mut self, key: u32) {
        if let Some(container) = self.containers.get_mut(&key) {
            container.oom_looks.come();
        }
        self.on_oom(key);
    }

    /// A container has ended: the last look.
    pub fn finish_oom(&mut self, key: u32) {
        self.on_oom(key);
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        // Its cgroup may be gone before it could be asked.
        let killed = matches!(
            &container.phase,
            Phase::Ending(Ending { outcome: Outcome::Exited(exit), .. }) if exit.code == KILLED
        );
        let gone = container.oom.as_ref().is_some_and(OomWatch::is_gone);
        let unasked = killed && gone && !container.oom_killed;
        if unasked {
            // What its neighbours lost is known first, so that it is not taken for this one's.
            let others: Vec<u32> = self.containers.keys().copied().filter(|k| *k != key).collect();
            others.into_iter().for_each(|other| self.on_oom(other));
        }
        let watch = self.containers.get_mut(&key).and_then(|c| c.oom.take());
        let Some(watch) = watch else { return };
        let lost = if unasked { watch.lost() } else { 0 };
        self.reactor.forget(watch);
        if lost > 0 {
            self.tell_oom(key, lost);
        }
    }

    /// Looks whether the kernel has killed something of a container since the last look.
    fn on_oom(&mut self, key: u32) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let Some(watch) = &mut container.oom else { return };
        let killed = watch.take(&container.cgroup).unwrap_or(0);
        if killed == 0 {
            // v1 tells of the want of memory before the killing; v2 counts the killing itself.
            if watch.is_early() && container.oom_looks.again() {
                self.reactor.after(OOM_PAUSE, Timer::Oom(key));
            }
            return;
        }
        container.oom_looks.anew();
        self.tell_oom(key, killed);
    }

    fn tell_oom(&mut self, key: u32, killed: u64) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        container.oom_killed = true;
        let container_id = container.id.clone();
        let parent = container.cgroup.v2_parent();
        for (_, other) in self.containers.iter_mut().filter(|(other, _)| **other != key) {
            if let Some(watch) = &mut other.oom {
                watch.neighbour_lost(parent.as_deref(), killed);
            }
        }
        info!("the kernel killed {killed} processes of container {container_id} for want of memory");
        self.happened(&container_id, pod::event::What::Oom(pod::Oom {}));
        self.publish(
            topic::OOM,
            "containerd.events.TaskOOM",
            &events::TaskOom { container_id },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_often_memory_is_wanted_one_timer_waits_and_it_ends() {
        let mut looks = Looks::default();
        let mut timers = 0;
        for _ in 0..1000 {
            looks.anew();
            timers += u32::from(looks.again());
        }
        assert_eq!(timers, 1);
        looks.anew();
        looks.come();
        let mut more = 0;
        while looks.again() {
            more += 1;
            looks.come();
        }
        assert_eq!(more, OOM_LOOKS);
    }
}
