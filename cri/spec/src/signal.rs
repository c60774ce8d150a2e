//! Stop signals: names and numbers, as Dockerfiles, OCI images and CRI spell them.

/// A signal by name and number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    /// Canonical name: `SIGTERM`, `SIGRTMIN+3`.
    pub name: String,
    /// Its number on this architecture (x86 and ARM agree).
    pub number: u32,
}

impl Signal {
    /// SIGTERM, what stops a container that says nothing.
    pub fn term() -> Signal {
        Signal {
            name: "SIGTERM".to_owned(),
            number: 15,
        }
    }
}

/// glibc's first real-time signal; 32 and 33 are its own.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

const NAMES: [(&str, u32); 36] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", 15),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("UNUSED", 31),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("INFO", 29),
];

/// Parses a signal: `15`, `TERM`, `SIGTERM`, `sigterm`, `RTMIN+3`, `SIGRTMAX-1`, and CRI's
/// `SIGRTMINPLUS3` and `SIGNAL_SIGTERM`. `None` when it is none.
pub fn parse(text: &str) -> Option<Signal> {
    let upper = text.trim().to_ascii_uppercase();
    if upper.bytes().all(|b| b.is_ascii_digit()) {
        let number: u32 = upper.parse().ok()?;
        return (1..=RTMAX).contains(&number).then(|| Signal {
            name: name_of(number),
            number,
        });
    }
    let bare = upper.strip_prefix("SIGNAL_").unwrap_or(&upper);
    let bare = bare.strip_prefix("SIG").unwrap_or(bare);
    if let Some(number) = real_time(bare) {
        return (RTMIN..=RTMAX).contains(&number).then(|| Signal {
            name: name_of(number),
            number,
        });
    }
    NAMES.iter().find(|(n, _)| *n == bare).map(|(n, number)| Signal {
        name: format!("SIG{n}"),
        number: *number,
    })
}

fn real_time(bare: &str) -> Option<u32> {
    let offset = |rest: &str| -> Option<u32> {
        if rest.is_empty() || rest.len() > 2 || !rest.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        rest.parse().ok()
    };
    if let Some(rest) = bare.strip_prefix("RTMIN") {
        return match rest.strip_prefix('+').or_else(|| rest.strip_prefix("PLUS")) {
            Some(n) => Some(RTMIN + offset(n)?),
            None => rest.is_empty().then_some(RTMIN),
        };
    }
    let rest = bare.strip_prefix("RTMAX")?;
    match rest.strip_prefix('-').or_else(|| rest.strip_prefix("MINUS")) {
        Some(n) => RTMAX.checked_sub(offset(n)?),
        None => rest.is_empty().then_some(RTMAX),
    }
}

fn name_of(number: u32) -> String {
    match number {
        RTMIN => "SIGRTMIN".to_owned(),
        RTMAX => "SIGRTMAX".to_owned(),
        n if n > RTMIN && n <= RTMIN + 15 => format!("SIGRTMIN+{}", n - RTMIN),
        n if n > RTMIN => format!("SIGRTMAX-{}", RTMAX - n),
        n => NAMES
            .iter()
            .find(|(_, m)| *m == n)
            .map_or_else(|| n.to_string(), |(name, _)| format!("SIG{name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(text: &str, name: &str, number: u32) {
        assert_eq!(
            parse(text),
            Some(Signal {
                name: name.to_owned(),
                number
            }),
            "{text}"
        );
    }

    #[test]
    fn names_and_numbers_mean_the_same_signal() {
        is("SIGTERM", "SIGTERM", 15);
        is("term", "SIGTERM", 15);
        is("15", "SIGTERM", 15);
        is(" 9 ", "SIGKILL", 9);
        is("SIGNAL_SIGUSR1", "SIGUSR1", 10);
        is("SIGWINCH", "SIGWINCH", 28);
    }

    #[test]
    fn real_time_signals_count_from_either_end() {
        is("RTMIN", "SIGRTMIN", 34);
        is("SIGRTMIN+3", "SIGRTMIN+3", 37);
        is("SIGRTMINPLUS15", "SIGRTMIN+15", 49);
        is("SIGRTMAX-14", "SIGRTMAX-14", 50);
        is("SIGNAL_SIGRTMAXMINUS1", "SIGRTMAX-1", 63);
        is("SIGRTMAX", "SIGRTMAX", 64);
        is("37", "SIGRTMIN+3", 37);
    }

    #[test]
    fn what_is_no_signal_is_none() {
        for text in [
            "",
            "SIG",
            "0",
            "65",
            "-1",
            "SIGFOO",
            "RTMIN+31",
            "RTMIN+",
            "RTMAX-31",
            "99999999999",
            "RTMIN+-1",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
