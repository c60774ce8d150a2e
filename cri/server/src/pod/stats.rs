//! What a pod's interfaces have carried, read in its network namespace.

use super::{Pod, network};
use crate::error::Error;
use crate::model::Scope;

/// Counters of one interface since it came up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// The pod's interfaces without loopback. Empty: it uses the host's network, or has none any more.
pub async fn interfaces(pod: &Pod) -> Vec<Interface> {
    if pod.record().config.namespaces.network == Scope::Node {
        return Vec::new();
    }
    // By the namespace, which stays the pod's: a process's number may be another's by the time it is read.
    let netns = network::netns(pod);
    let read = crate::blocking::run(move || {
        let own = || std::fs::read_to_string("/proc/thread-self/net/dev");
        slipway_network::netns::in_netns(&netns, own)
            .and_then(|text| text)
            .map_err(Error::io("read the interfaces in", &netns))
    });
    read.await.map(|text| parse(&text)).unwrap_or_default()
}

fn parse(text: &str) -> Vec<Interface> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let numbers: Vec<u64> = counters
                .split_whitespace()
                .filter_map(|n| n.parse().ok())
                .collect();
            let name = name.trim();
            (numbers.len() >= 16 && name != "lo").then(|| Interface {
                name: name.to_owned(),
                rx_bytes: numbers[0],
                rx_packets: numbers[1],
                rx_errors: numbers[2],
                rx_dropped: numbers[3],
                tx_bytes: numbers[8],
                tx_packets: numbers[9],
                tx_errors: numbers[10],
                tx_dropped: numbers[11],
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_column_and_loopback_is_left_out() {
        let text = "Inter-|   Receive    |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes\n\
                    \x20   lo:     100 1 0 0 0 0 0 0 100 1 0 0 0 0 0 0\n\
                    \x20 eth0: 1234567 12 3 5 0 0 0 0 7654321 21 4 6 0 0 0 0\n";
        let expected = Interface {
            name: "eth0".into(),
            rx_bytes: 1_234_567,
            rx_packets: 12,
            rx_errors: 3,
            rx_dropped: 5,
            tx_bytes: 7_654_321,
            tx_packets: 21,
            tx_errors: 4,
            tx_dropped: 6,
        };
        assert_eq!(parse(text), [expected]);
    }
}
