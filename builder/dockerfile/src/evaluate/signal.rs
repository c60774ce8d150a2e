//! STOPSIGNAL: names and numbers of Linux signals.

use crate::error::Problem;

const NAMES: [&str; 35] = [
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE",
    "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU",
    "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ", "RTMIN",
];

/// Refuses what is no signal: 1 to 64, a name with or without SIG, RTMIN+1 to +15, RTMAX-14 to RTMAX.
pub(super) fn check(signal: &str) -> Result<(), Problem> {
    let name = signal.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let within = |text: &str, limit| {
        text.parse::<u32>()
            .is_ok_and(|n| (1..=limit).contains(&n) && !text.starts_with(['0', '+']))
    };
    let known = NAMES.contains(&name)
        || name == "RTMAX"
        || name.strip_prefix("RTMIN+").is_some_and(|n| within(n, 15))
        || name.strip_prefix("RTMAX-").is_some_and(|n| within(n, 14))
        || signal.parse::<u32>().is_ok_and(|n| (1..=64).contains(&n));
    if known {
        Ok(())
    } else {
        Err(Problem::UnknownSignal {
            signal: signal.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for signal in [
            "SIGTERM", "term", "9", "64", "SIGRTMIN", "RTMIN+15", "rtmax-1", "SIGRTMAX",
        ] {
            assert!(check(signal).is_ok(), "{signal}");
        }
        for signal in [
            "", "0", "65", "-9", "SIGFOO", "RTMIN+16", "RTMAX-15", "RTMIN+", "TERM ",
        ] {
            assert!(check(signal).is_err(), "{signal}");
        }
    }
}
