//! The time of day: as nanoseconds since 1970, and as the timestamps of CRI logs.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Appends `2026-01-02T03:04:05.000000006Z`, RFC 3339 with all nine digits, so that lines sort as text.
pub fn stamp(ns: i64, out: &mut Vec<u8>) {
    let seconds = ns.div_euclid(1_000_000_000);
    let (year, month, day) = date(seconds.div_euclid(86_400));
    let second = seconds.rem_euclid(86_400);
    digits(year, 4, out);
    out.push(b'-');
    digits(month, 2, out);
    out.push(b'-');
    digits(day, 2, out);
    out.push(b'T');
    digits(second / 3600, 2, out);
    out.push(b':');
    digits(second / 60 % 60, 2, out);
    out.push(b':');
    digits(second % 60, 2, out);
    out.push(b'.');
    digits(ns.rem_euclid(1_000_000_000), 9, out);
    out.push(b'Z');
}

fn digits(mut value: i64, width: usize, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + width, b'0');
    for place in out[start..].iter_mut().rev() {
        *place = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Year, month and day of a day counted from 1970-01-01: the calendar's 400-year cycle, with years that begin in March so
/// that the leap day comes last.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    fn stamp(ns: i64) -> String {
        let mut out = Vec::new();
        super::stamp(ns, &mut out);
        String::from_utf8(out).expect("digits")
    }

    #[test]
    fn a_timestamp_has_nine_digits_and_knows_leap_years() {
        assert_eq!(stamp(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(stamp(1_767_225_600_000_000_007), "2026-01-01T00:00:00.000000007Z");
        assert_eq!(stamp(1_709_251_199_999_999_999), "2024-02-29T23:59:59.999999999Z");
        assert_eq!(stamp(1_709_251_200_000_000_000), "2024-03-01T00:00:00.000000000Z");
        assert_eq!(stamp(951_782_400_000_000_000), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(stamp(4_107_542_400_000_000_000), "2100-03-01T00:00:00.000000000Z");
    }
}
