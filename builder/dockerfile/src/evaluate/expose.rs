//! EXPOSE: ports, ranges of them and protocols.

use super::{Evaluator, Outcome, StageState};
use crate::error::Problem;
use crate::image::Empty;
use crate::lint::Rule;
use crate::plan::Planned;
use crate::shell::process_words;
use std::net::IpAddr;

/// A port as it was written.
struct Port<'a> {
    /// `tcp` where none was written, else in the author's case.
    protocol: &'a str,
    first: u16,
    last: u16,
    /// An address or a host port was written, too, which EXPOSE has no use for.
    mapped: bool,
}

impl Evaluator<'_> {
    pub(super) fn expose(
        &mut self,
        state: &mut StageState,
        planned: &Planned,
        ports: &[String],
    ) -> Result<Outcome, Problem> {
        let mut exposed = Vec::new();
        for written in ports {
            // A variable may hold several.
            let words = process_words(written, self.outline.escape, &state.env).map_err(|reason| {
                Problem::Expansion {
                    word: written.clone(),
                    reason,
                }
            })?;
            for port in &words {
                let parsed = parse(port)?;
                let protocol = parsed.protocol.to_ascii_lowercase();
                if protocol != parsed.protocol {
                    let message = || format!("the protocol of '{port}' is not in lower case");
                    self.warn(planned, Rule::ExposeProtoCasing, message);
                }
                if parsed.mapped {
                    let message = || format!("'{port}' names an address or a host port");
                    self.warn(planned, Rule::ExposeInvalidFormat, message);
                }
                self.charge(64 * (1 + usize::from(parsed.last - parsed.first)))?;
                exposed.extend((parsed.first..=parsed.last).map(|port| format!("{port}/{protocol}")));
            }
        }
        state
            .config
            .exposed_ports
            .extend(exposed.iter().map(|port| (port.clone(), Empty {})));
        Ok(Outcome::config(format!("EXPOSE [{}]", exposed.join(" "))))
    }
}

/// `[[address:]host port:]port[-port][/protocol]`
fn parse(text: &str) -> Result<Port<'_>, Problem> {
    let bad = |reason| Problem::BadPort {
        port: text.to_owned(),
        reason,
    };
    let (mapping, port) = match text.rsplit_once(':') {
        Some((mapping, port)) => (Some(mapping), port),
        None => (None, text),
    };
    let (numbers, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
    let protocol = if protocol.is_empty() { "tcp" } else { protocol };
    if !["tcp", "udp", "sctp"].contains(&protocol.to_ascii_lowercase().as_str()) {
        return Err(bad("the protocol is tcp, udp or sctp"));
    }
    let (first, last) = range(numbers).ok_or_else(|| bad("a port is 0 to 65535, a range first-last"))?;
    let mut mapped = false;
    if let Some(mapping) = mapping {
        let (address, host) = mapping.rsplit_once(':').unwrap_or(("", mapping));
        let bare = address
            .strip_prefix('[')
            .and_then(|a| a.strip_suffix(']'))
            .unwrap_or(address);
        if !address.is_empty() && bare.parse::<IpAddr>().is_err() {
            return Err(bad("what stands before the ports is no address"));
        }
        if !host.is_empty() {
            let (start, end) = range(host).ok_or_else(|| bad("the host port is none"))?;
            if end - start != last - first && first != last {
                return Err(bad("the two ranges differ in length"));
            }
        }
        mapped = !address.is_empty() || !host.is_empty();
    }
    Ok(Port {
        protocol,
        first,
        last,
        mapped,
    })
}

fn range(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
        digits.then(|| text.parse::<u16>().ok()).flatten()
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_ranges_with_a_protocol() {
        let read = |text| {
            parse(text)
                .ok()
                .map(|p| (p.first, p.last, p.protocol.to_owned(), p.mapped))
        };
        assert_eq!(read("80"), Some((80, 80, "tcp".into(), false)));
        assert_eq!(read("8000-8010/udp"), Some((8000, 8010, "udp".into(), false)));
        assert_eq!(
            read("127.0.0.1:80:8080/TCP"),
            Some((8080, 8080, "TCP".into(), true))
        );
        assert_eq!(read("[::1]:8080:8080"), Some((8080, 8080, "tcp".into(), true)));
        assert_eq!(read("5000:5000"), Some((5000, 5000, "tcp".into(), true)));
        for text in [
            "",
            "x",
            "80/icmp",
            "65536",
            "9-8",
            "/tcp",
            "1.2.3:4:5",
            "1-2:3-5",
            "-1",
            "+1",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
