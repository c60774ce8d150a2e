//! When to try again, and after which pause. Refuses to know what is tried.

use reqwest::header::{HeaderMap, RETRY_AFTER};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

/// No pause is longer; who asks for a longer one is not waited for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Doubling pauses with jitter.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    attempts: u32,
    first: Duration,
    failed: u32,
    /// Failures that may still come, however much progress there is in between.
    left: u32,
}

/// So many times the attempts in a row fail at most altogether, before [`Backoff::earned`] adds to it.
const ALTOGETHER: u32 = 20;

impl Backoff {
    /// At most this many attempts in a row.
    pub fn new(attempts: u32, first: Duration) -> Backoff {
        Backoff {
            attempts: attempts.max(1),
            first,
            failed: 0,
            left: attempts.max(1).saturating_mul(ALTOGETHER),
        }
    }

    /// An attempt failed: how long to pause before the next one; `None` when it was the last, or the server asks
    /// for more patience than we have.
    pub fn failed(&mut self, asked: Option<Duration>) -> Option<Duration> {
        self.failed += 1;
        self.left = self.left.saturating_sub(1);
        if self.failed >= self.attempts || self.left == 0 || asked.is_some_and(|asked| asked > LONGEST_PAUSE)
        {
            return None;
        }
        let doubled = self.first.saturating_mul(1 << (self.failed - 1).min(16));
        let jittered = doubled.mul_f64(0.75 + 0.5 * random());
        Some(jittered.max(asked.unwrap_or_default()).min(LONGEST_PAUSE))
    }

    /// Something got through: the attempts count from the start.
    pub fn progressed(&mut self) {
        self.failed = 0;
    }

    /// So much got through that the next failure is as the first one ever.
    pub fn earned(&mut self) {
        self.left = self.left.saturating_add(1);
    }

    /// How often it failed in a row.
    pub fn failures(&self) -> u32 {
        self.failed
    }
}

/// From 0 to 1, good enough to keep clients apart.
fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// The pause a server asks for: seconds or a date.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = OffsetDateTime::parse(text, &Rfc2822).ok()?;
    Some(
        SystemTime::from(at)
            .duration_since(SystemTime::now())
            .unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_end() {
        let first = Duration::from_millis(100);
        let mut backoff = Backoff::new(4, first);
        let pauses: Vec<Duration> = std::iter::from_fn(|| backoff.failed(None)).collect();
        assert_eq!(pauses.len(), 3);
        for (n, pause) in pauses.iter().enumerate() {
            let middle = first.mul_f64(f64::from(1 << n));
            assert!(
                *pause >= middle.mul_f64(0.75) && *pause <= middle.mul_f64(1.25),
                "{n}: {pause:?}"
            );
        }
        backoff.progressed();
        assert!(backoff.failed(None).is_some());
    }

    #[test]
    fn a_little_progress_each_time_does_not_go_on_for_ever() {
        let mut backoff = Backoff::new(4, Duration::from_millis(1));
        let mut tried = 0;
        while backoff.failed(None).is_some() {
            backoff.progressed();
            tried += 1;
            assert!(tried < 1000);
        }
        assert!(tried > 20);
        let mut backoff = Backoff::new(4, Duration::from_millis(1));
        for _ in 0..1000 {
            assert!(backoff.failed(None).is_some(), "much progress each time");
            backoff.progressed();
            backoff.earned();
        }
    }

    #[test]
    fn a_server_may_ask_for_a_longer_pause_but_not_for_any() {
        let mut backoff = Backoff::new(9, Duration::from_millis(1));
        assert_eq!(
            backoff.failed(Some(Duration::from_secs(3))),
            Some(Duration::from_secs(3))
        );
        assert_eq!(backoff.failed(Some(Duration::from_secs(3600))), None);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let parse = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(parse("7"), Some(Duration::from_secs(7)));
        assert_eq!(parse("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert!(parse("Wed, 21 Oct 2095 07:28:00 GMT").unwrap() > Duration::from_secs(1_000_000));
        assert_eq!(parse("soon"), None);
    }
}
