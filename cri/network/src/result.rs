//! Results of ADD in one form. Versions 0.3.0 to 0.4.0 tell each address's family, 1.0.0 dropped
//! that, 1.1.0 added detail to interfaces and routes; all of them are read by the same shapes,
//! fields that nobody here needs are passed over.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::pod::Dns;

/// More than any network has.
const MAX_ITEMS: usize = 4096;

/// What a network gave a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkResult {
    /// The version the plugin wrote.
    pub cni_version: String,
    /// Interfaces made, on the host and in the pod.
    #[serde(deserialize_with = "null_is_default")]
    pub interfaces: Vec<Interface>,
    /// Addresses given.
    #[serde(deserialize_with = "null_is_default")]
    pub ips: Vec<IpAddress>,
    /// Routes made.
    #[serde(deserialize_with = "null_is_default")]
    pub routes: Vec<Route>,
    /// Resolver settings.
    #[serde(deserialize_with = "null_is_default")]
    pub dns: Dns,
}

/// An interface that was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: String,
    /// Its MTU; 0: not told.
    pub mtu: u32,
    /// The network namespace it is in; empty: the host's.
    pub sandbox: String,
}

/// An address that was given.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct IpAddress {
    /// The address.
    #[serde(rename = "address", deserialize_with = "cidr")]
    pub net: (IpAddr, u8),
    /// The default gateway, when there is one.
    #[serde(default, deserialize_with = "optional_ip")]
    pub gateway: Option<IpAddr>,
    /// Which of the interfaces has it; `None`: not told.
    #[serde(default)]
    pub interface: Option<usize>,
}

/// A route that was made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Route {
    /// Where to.
    #[serde(deserialize_with = "cidr")]
    pub dst: (IpAddr, u8),
    /// Over whom.
    #[serde(default, deserialize_with = "optional_ip")]
    pub gw: Option<IpAddr>,
}

impl NetworkResult {
    /// Reads a result of any version from 0.3.0 on.
    ///
    /// # Errors
    /// What is wrong with it, as a sentence.
    pub fn parse(value: &Value) -> Result<NetworkResult, String> {
        if !value.is_object() {
            return Err("it is not an object".to_owned());
        }
        let result = NetworkResult::deserialize(value).map_err(|e| e.to_string())?;
        let sizes = [result.interfaces.len(), result.ips.len(), result.routes.len()];
        if sizes.into_iter().any(|n| n > MAX_ITEMS) {
            return Err(format!("it has more than {MAX_ITEMS} entries"));
        }
        let known = result.interfaces.len();
        if let Some(bad) = result
            .ips
            .iter()
            .filter_map(|ip| ip.interface)
            .find(|i| *i >= known)
        {
            return Err(format!("an address belongs to interface {bad} of {known}"));
        }
        Ok(result)
    }

    /// The addresses of the pod's interface, in the result's order. Addresses for which no interface
    /// is told count; those of host interfaces do not. A network that names its interface otherwise
    /// than asked is taken by the addresses of whatever is in the namespace.
    pub fn ips_of(&self, ifname: &str) -> Vec<IpAddr> {
        let in_pod = |i: usize| self.interfaces.get(i).filter(|x| !x.sandbox.is_empty());
        let pick = |wanted: &dyn Fn(usize) -> bool| {
            let mut found: Vec<IpAddr> = Vec::new();
            for ip in self.ips.iter().filter(|ip| ip.interface.is_none_or(wanted)) {
                if !found.contains(&ip.net.0) {
                    found.push(ip.net.0);
                }
            }
            found
        };
        let named = pick(&|i| in_pod(i).is_some_and(|x| x.name == ifname));
        if named.is_empty() {
            pick(&|i| in_pod(i).is_some())
        } else {
            named
        }
    }
}

fn null_is_default<'de, D, T>(d: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(d).map(Option::unwrap_or_default)
}

fn cidr<'de, D: serde::Deserializer<'de>>(d: D) -> Result<(IpAddr, u8), D::Error> {
    let text = String::deserialize(d)?;
    parse_cidr(&text)
        .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not an address with prefix length")))
}

/// "10.0.0.5/24"; a bare address is one host.
fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = match text.split_once('/') {
        Some((a, l)) => (a.parse::<IpAddr>().ok()?, Some(l.parse::<u8>().ok()?)),
        None => (text.parse::<IpAddr>().ok()?, None),
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    let length = length.unwrap_or(most);
    (length <= most).then_some((address, length))
}

fn optional_ip<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(d)? {
        None => Ok(None),
        Some(text) if text.is_empty() => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|_| serde::de::Error::custom(format!("{text:?} is not an address"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn results_of_every_version_read_the_same() {
        let old = json!({"cniVersion": "0.3.1",
            "interfaces": [{"name": "br0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [{"version": "4", "interface": 2, "address": "10.1.0.5/24", "gateway": "10.1.0.1"},
                    {"version": "6", "interface": 2, "address": "fd00::5/64", "gateway": ""}],
            "routes": [{"dst": "0.0.0.0/0"}], "dns": {}});
        let new = json!({"cniVersion": "1.1.0",
            "interfaces": [{"name": "br0", "mtu": 1500}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x", "pciID": "0"}],
            "ips": [{"interface": 2, "address": "10.1.0.5/24", "gateway": "10.1.0.1"}, {"interface": 2, "address": "fd00::5/64"}],
            "routes": [{"dst": "0.0.0.0/0", "mtu": 1400, "table": 5}], "dns": {"nameservers": ["10.1.0.1"]}});
        for value in [old, new] {
            let result = NetworkResult::parse(&value).unwrap();
            assert_eq!(result.ips_of("eth0"), [ip("10.1.0.5"), ip("fd00::5")]);
            assert_eq!(result.ips[0].gateway, Some(ip("10.1.0.1")));
            assert_eq!(result.ips[1].gateway, None);
            assert_eq!(result.routes[0].dst, (ip("0.0.0.0"), 0));
        }
    }

    #[test]
    fn addresses_of_host_interfaces_are_not_the_pods() {
        let value = json!({"interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/x"}],
            "ips": [{"interface": 0, "address": "10.1.0.1/24"}, {"interface": 1, "address": "10.1.0.5/24"}]});
        assert_eq!(
            NetworkResult::parse(&value).unwrap().ips_of("eth0"),
            [ip("10.1.0.5")]
        );
    }

    #[test]
    fn addresses_without_an_interface_are_the_pods() {
        let value =
            json!({"ips": [{"address": "10.1.0.5/32"}], "interfaces": null, "routes": null, "dns": null});
        assert_eq!(
            NetworkResult::parse(&value).unwrap().ips_of("eth0"),
            [ip("10.1.0.5")]
        );
    }

    #[test]
    fn an_interface_of_another_name_in_the_namespace_will_do() {
        let value = json!({"interfaces": [{"name": "net1", "sandbox": "/x"}], "ips": [{"interface": 0, "address": "10.1.0.5/24"}]});
        assert_eq!(
            NetworkResult::parse(&value).unwrap().ips_of("eth0"),
            [ip("10.1.0.5")]
        );
    }

    #[test]
    fn results_that_make_no_sense_are_refused() {
        for value in [
            json!({"ips": [{"address": "10.1.0.300/24"}]}),
            json!({"ips": [{"address": "10.1.0.3/64"}]}),
            json!({"ips": [{"address": "10.1.0.3/24", "interface": 1}], "interfaces": [{"name": "eth0"}]}),
            json!({"ips": "10.1.0.3/24"}),
            json!({"routes": [{"dst": "everywhere"}]}),
            json!([]),
        ] {
            assert!(NetworkResult::parse(&value).is_err(), "{value}");
        }
    }
}
