//! What keeps a store that builds from growing without end: the limits of the build cache, and how long a build that
//! is nowhere else counts as pinned. Refuses to know when it is called: after builds, and when images are removed.

use super::Store;
use super::cache::CachePrune;
use crate::error::Result;
use std::time::Duration;

/// The limits, the same for every program on the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upkeep {
    /// How long a build that was never pushed counts as pinned; `None`: for ever.
    pub pin_builds_for: Option<Duration>,
    /// Entries of the build cache that were not used for so long go; `None`: age is no reason.
    pub cache_unused_for: Option<Duration>,
    /// The layers that only the build cache holds take at most this part of the filesystem, in percent, and at most
    /// half of what is free on it.
    pub cache_percent: u8,
}

impl Default for Upkeep {
    fn default() -> Upkeep {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Upkeep {
            pin_builds_for: Some(DAY * 30),
            cache_unused_for: Some(DAY * 30),
            cache_percent: 10,
        }
    }
}

impl Upkeep {
    /// Bytes of layers that the cache may hold for itself on a filesystem like this. On one that is filling up it
    /// shrinks: whoever removes images to get space back does get it.
    fn keep_bytes(&self, capacity: u64, available: u64) -> u64 {
        let part = u128::from(capacity) * u128::from(self.cache_percent.min(100)) / 100;
        u64::try_from(part).unwrap_or(u64::MAX).min(available / 2)
    }
}

impl Store {
    /// Forgets of the build cache what is past the limits, and gives its space back: bytes.
    ///
    /// # Errors
    /// What the catalog or the filesystem answers.
    pub fn tidy_cache(&self, limits: &Upkeep) -> Result<u64> {
        let filesystem = self.fs_info()?;
        let entries = self.cache_prune(CachePrune {
            all: false,
            unused_for: limits.cache_unused_for,
            keep_bytes: Some(limits.keep_bytes(filesystem.capacity_bytes, filesystem.available_bytes)),
        })?;
        match entries {
            0 => Ok(0),
            _ => Ok(self.gc()?.bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_may_have_a_part_of_the_disk_and_half_of_what_is_free() {
        let limits = Upkeep::default();
        assert_eq!(limits.keep_bytes(1000, 900), 100);
        assert_eq!(limits.keep_bytes(1000, 100), 50);
        assert_eq!(limits.keep_bytes(1000, 0), 0);
        let all = Upkeep {
            cache_percent: 255,
            ..limits
        };
        assert_eq!(all.keep_bytes(u64::MAX, u64::MAX), u64::MAX / 2);
    }
}
