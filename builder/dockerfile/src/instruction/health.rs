//! HEALTHCHECK, and durations in Go's notation, which its flags and its history entry use.

use super::flags::{Flags, Kind};
use crate::ast::Node;
use crate::error::Problem;
use crate::image::Healthcheck;

const MILLISECOND: i64 = 1_000_000;

pub(super) fn decode(node: &Node, words: &[String]) -> Result<Healthcheck, Problem> {
    const KNOWN: [(&str, Kind); 5] = [
        ("interval", Kind::Text),
        ("timeout", Kind::Text),
        ("start-period", Kind::Text),
        ("start-interval", Kind::Text),
        ("retries", Kind::Text),
    ];
    let mut flags = Flags::read(node, "HEALTHCHECK", &KNOWN)?;
    let Some((kind, command)) = words.split_first() else {
        return Err(Problem::NoArguments {
            instruction: "HEALTHCHECK",
        });
    };
    let test = match kind.to_ascii_uppercase().as_str() {
        "NONE" if !command.is_empty() || !node.flags.is_empty() => return Err(Problem::HealthcheckNone),
        "NONE" => vec!["NONE".to_owned()],
        "CMD" if command.is_empty() => return Err(Problem::HealthcheckWithoutCommand),
        "CMD" => {
            let kind = if node.json { "CMD" } else { "CMD-SHELL" };
            std::iter::once(kind.to_owned())
                .chain(command.iter().cloned())
                .collect()
        }
        _ => return Err(Problem::HealthcheckKind { kind: kind.clone() }),
    };
    Ok(Healthcheck {
        test,
        interval: duration(&mut flags, "interval")?,
        timeout: duration(&mut flags, "timeout")?,
        start_period: duration(&mut flags, "start-period")?,
        start_interval: duration(&mut flags, "start-interval")?,
        retries: match flags.text("retries") {
            None => 0,
            Some(value) => match value.parse::<i32>() {
                Ok(retries @ 0..) => i64::from(retries),
                _ => return Err(bad("retries", value, "it is a number that is not negative")),
            },
        },
    })
}

fn bad(flag: &str, value: String, reason: &str) -> Problem {
    Problem::BadFlagValue {
        flag: flag.to_owned(),
        value,
        reason: reason.to_owned(),
    }
}

fn duration(flags: &mut Flags, flag: &'static str) -> Result<i64, Problem> {
    let Some(value) = flags.text(flag) else {
        return Ok(0);
    };
    match parse_duration(&value) {
        None => Err(bad(flag, value, "it is a duration like 1m30s")),
        Some(0) => Ok(0),
        Some(nanos) if nanos < MILLISECOND => Err(bad(flag, value, "it is at least 1ms")),
        Some(nanos) => Ok(nanos),
    }
}

/// Nanoseconds of `1h15m30.5s`; units h, m, s, ms, us (µs), ns. `0` needs none.
fn parse_duration(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let number = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (digits, after) = rest.split_at(number);
        let unit_end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let unit: i128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if whole.len() + fraction.len() == 0 || fraction.contains('.') || whole.len() > 19 {
            return None;
        }
        let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        total = total.checked_add(whole.checked_mul(unit)?)?;
        // Digits beyond the fifteenth say nothing in nanoseconds.
        let fraction = &fraction[..fraction.len().min(15)];
        if !fraction.is_empty() {
            total += fraction.parse::<i128>().ok()? * unit / 10_i128.pow(fraction.len() as u32);
        }
        rest = after;
    }
    i64::try_from(if negative { -total } else { total }).ok()
}

/// A duration as Go prints it: `0s`, `1.5ms`, `1m30s`, `1h0m0s`.
pub(crate) fn format_duration(nanos: i64) -> String {
    if nanos == 0 {
        return "0s".to_owned();
    }
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let decimal = |unit: u64, name: &str| {
        let (whole, rest) = (nanos / unit, nanos % unit);
        let width = unit.ilog10() as usize;
        let text = match rest {
            0 => whole.to_string(),
            rest => format!("{whole}.{rest:0width$}").trim_end_matches('0').to_owned(),
        };
        format!("{text}{name}")
    };
    let short = match nanos {
        0..1_000 => Some(format!("{nanos}ns")),
        1_000..1_000_000 => Some(decimal(1_000, "µs")),
        1_000_000..1_000_000_000 => Some(decimal(1_000_000, "ms")),
        _ => None,
    };
    if let Some(short) = short {
        return format!("{sign}{short}");
    }
    let minutes = nanos / 60_000_000_000;
    let rest = nanos % 60_000_000_000;
    let fraction = match rest % 1_000_000_000 {
        0 => String::new(),
        nanos => format!(".{nanos:09}").trim_end_matches('0').to_owned(),
    };
    let seconds = format!("{}{fraction}s", rest / 1_000_000_000);
    match (minutes / 60, minutes % 60) {
        (0, 0) => format!("{sign}{seconds}"),
        (0, minutes) => format!("{sign}{minutes}m{seconds}"),
        (hours, minutes) => format!("{sign}{hours}h{minutes}m{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_printed_as_go_does() {
        for (text, printed) in [
            ("5s", "5s"),
            ("1m30s", "1m30s"),
            ("90s", "1m30s"),
            ("1h", "1h0m0s"),
            ("1.5s", "1.5s"),
            ("1500us", "1.5ms"),
            ("0.000001s", "1µs"),
            ("100ms", "100ms"),
            (".5m", "30s"),
            ("0", "0s"),
            ("-2s", "-2s"),
            ("1h15m30.918s", "1h15m30.918s"),
        ] {
            assert_eq!(
                parse_duration(text).map(format_duration).as_deref(),
                Some(printed),
                "{text}"
            );
        }
        for text in ["", "5", "s", "5x", "1..5s", ".s", "99999999999h", "1m s"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
