//! A DNS server for headless Services: answers from the cluster's EndpointSlices, and passes every other name on.
//!
//! It knows A records of `service.namespace.svc.cluster.local` and `hostname.service.namespace.svc.cluster.local`
//! (the DNS-Based Service Discovery of Kubernetes, 2.4), no cluster addresses, over UDP.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

const ZONE: &str = ".svc.cluster.local";

type Records = HashMap<String, Vec<Ipv4Addr>>;

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: Slice,
}

#[derive(Deserialize)]
struct Slice {
    metadata: Metadata,
    #[serde(default)]
    endpoints: Option<Vec<Endpoint>>,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: String,
    #[serde(default)]
    labels: HashMap<String, String>,
}

#[derive(Deserialize)]
struct Endpoint {
    #[serde(default)]
    addresses: Vec<String>,
    hostname: Option<String>,
    #[serde(default)]
    conditions: Conditions,
}

#[derive(Deserialize, Default)]
struct Conditions {
    ready: Option<bool>,
}

/// Serves on `listen` until it is killed, watching the API server through `kubectl` with `kubeconfig`; names outside the
/// cluster are asked of `upstream`.
///
/// # Errors
/// The address is taken.
pub fn serve(
    listen: SocketAddr,
    kubectl: &Path,
    kubeconfig: &Path,
    upstream: Option<SocketAddr>,
) -> Result<()> {
    let socket = UdpSocket::bind(listen).with_context(|| format!("listening on {listen}"))?;
    let records = Arc::new(Mutex::new(Records::new()));
    let (kubectl, kubeconfig, known) = (kubectl.to_owned(), kubeconfig.to_owned(), records.clone());
    std::thread::spawn(move || {
        loop {
            if let Err(e) = watch(&kubectl, &kubeconfig, &known) {
                eprintln!("watching endpoint slices: {e:#}; again");
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    });
    let mut buffer = [0_u8; 4096];
    loop {
        let (n, from) = socket.recv_from(&mut buffer)?;
        let query = buffer[..n].to_vec();
        let local = {
            let records = records.lock().expect("nobody panics holding it");
            answer(&query, &records)
        };
        match (local, upstream) {
            (Some(a), _) => {
                let _ = socket.send_to(&a, from);
            }
            (None, Some(up)) => {
                let socket = socket.try_clone()?;
                std::thread::spawn(move || {
                    if let Ok(a) = ask(&query, up) {
                        let _ = socket.send_to(&a, from);
                    }
                });
            }
            (None, None) => {}
        }
    }
}

/// The first name server of this machine's resolv.conf.
pub fn upstream() -> Option<SocketAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").ok()?;
    text.lines()
        .filter_map(|l| l.strip_prefix("nameserver "))
        .find_map(|a| Some(SocketAddr::new(a.trim().parse().ok()?, 53)))
}

fn ask(query: &[u8], upstream: SocketAddr) -> Result<Vec<u8>> {
    let s = UdpSocket::bind("0.0.0.0:0")?;
    s.set_read_timeout(Some(Duration::from_secs(5)))?;
    s.send_to(query, upstream)?;
    let mut buffer = vec![0_u8; 4096];
    let n = s.recv(&mut buffer)?;
    buffer.truncate(n);
    Ok(buffer)
}

/// Follows every EndpointSlice until the connection ends.
fn watch(kubectl: &Path, kubeconfig: &Path, records: &Mutex<Records>) -> Result<()> {
    let mut child = Command::new(kubectl)
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .args([
            "get",
            "endpointslices",
            "-A",
            "-o",
            "json",
            "--watch",
            "--output-watch-events",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().context("piped")?;
    let mut slices: HashMap<(String, String), Slice> = HashMap::new();
    for event in serde_json::Deserializer::from_reader(std::io::BufReader::new(out)).into_iter::<Event>() {
        let Ok(e) = event else { break };
        let key = (
            e.object.metadata.namespace.clone(),
            e.object.metadata.name.clone(),
        );
        if e.kind == "DELETED" {
            slices.remove(&key);
        } else {
            slices.insert(key, e.object);
        }
        *records.lock().expect("nobody panics holding it") = records_of(slices.values());
    }
    let _ = child.kill();
    child.wait()?;
    Ok(())
}

fn records_of<'a>(slices: impl Iterator<Item = &'a Slice>) -> Records {
    let mut r = Records::new();
    for s in slices {
        let Some(service) = s.metadata.labels.get("kubernetes.io/service-name") else {
            continue;
        };
        let base = format!("{service}.{}{ZONE}", s.metadata.namespace);
        r.entry(base.clone()).or_default();
        for e in s.endpoints.iter().flatten() {
            if e.conditions.ready == Some(false) {
                continue;
            }
            let addresses = e.addresses.iter().filter_map(|a| a.parse::<Ipv4Addr>().ok());
            for a in addresses {
                r.entry(base.clone()).or_default().push(a);
                if let Some(h) = &e.hostname {
                    r.entry(format!("{h}.{base}")).or_default().push(a);
                }
            }
        }
    }
    r
}

/// The answer to a query for a name of the cluster (RFC 1035, 4.1); `None` for any other name.
fn answer(query: &[u8], records: &Records) -> Option<Vec<u8>> {
    let (name, end) = question(query)?;
    let name = name.to_ascii_lowercase();
    if !name.ends_with(".cluster.local") {
        return None;
    }
    let kind = u16::from_be_bytes(query.get(end..end + 2)?.try_into().ok()?);
    let found = records.get(&name);
    let addresses: &[Ipv4Addr] = if kind == 1 {
        found.map_or(&[], Vec::as_slice)
    } else {
        &[]
    };
    let count = u16::try_from(addresses.len().min(30)).ok()?;
    let mut a = query.get(..2)?.to_vec();
    // A response, authoritative, with recursion; a name that is not there is NXDOMAIN.
    a.extend([0x85, if found.is_some() { 0x80 } else { 0x83 }, 0, 1]);
    a.extend(count.to_be_bytes());
    a.extend([0, 0, 0, 0]);
    a.extend(query.get(12..end + 4)?);
    for ip in addresses.iter().take(30) {
        a.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 2, 0, 4]);
        a.extend(ip.octets());
    }
    Some(a)
}

/// The name of the one question, and where it ends.
fn question(query: &[u8]) -> Option<(String, usize)> {
    if query.get(4..6)? != [0, 1] {
        return None;
    }
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let len = usize::from(*query.get(at)?);
        at += 1;
        if len == 0 {
            return Some((labels.join("."), at));
        }
        if len > 63 {
            return None;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + len)?).into_owned());
        at += len;
    }
}
