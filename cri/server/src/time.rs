//! The clock the CRI tells times by: nanoseconds since 1970.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now.
pub fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}
