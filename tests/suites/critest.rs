//! critest of cri-tools, the CRI's conformance suite, over both streaming transports.
#![forbid(unsafe_code)]

use anyhow::Result;
use harness::critest::{self, Spec, Transport};
use harness::registry::Registry;
use harness::{Daemon, Lab, Setup};

/// What cannot pass on such a machine: AppArmor is not in its kernel, benchmarks are not conformance, and one spec pins the
/// digest of an image that only its own registry has.
fn cannot_pass_here(s: &Spec) -> bool {
    ["AppArmor", "benchmark", "Benchmark"]
        .iter()
        .any(|w| s.name.contains(w))
        || s.name.contains(PINNED)
}

const PINNED: &str = "with digest";

/// 122 specs, less 9 AppArmor, 5 benchmarks and the pinned digest.
const PASSING: usize = 107;

#[tokio::test(flavor = "multi_thread")]
async fn every_spec_that_can_pass_here_passes_over_spdy_and_over_websocket() -> Result<()> {
    let lab = Lab::new("critest")?;
    let registry = Registry::start(&lab, None)?;
    critest::push_images(&lab, &registry)?;
    let certs = registry.mirror(&lab, critest::HOSTS)?;
    let setup = Setup {
        config: format!(
            "[runtime]\ncgroup_root = \"{}\"\n[images]\ncerts_dir = \"{}\"\n",
            lab.cgroup(),
            certs.display()
        ),
        ..Default::default()
    };
    let mut daemon = Daemon::start(&lab, &setup).await?;
    let focus = std::env::var("CRITEST_FOCUS").ok();
    let mut wrong = Vec::new();
    for transport in [Transport::Spdy, Transport::WebSocket] {
        let specs = critest::run(&lab, &daemon.socket(), transport, focus.as_deref())?;
        harness::tell(&critest::table(transport, &specs));
        wrong.extend(
            specs
                .iter()
                .filter(|s| s.state != "passed" && !cannot_pass_here(s))
                .filter(|s| focus.is_none() || s.state != "skipped")
                .map(|s| format!("{transport:?}: {} {}: {}", s.state, s.name, s.why)),
        );
        let passed = specs.iter().filter(|s| s.state == "passed").count();
        if focus.is_none() && passed < PASSING {
            wrong.push(format!("{transport:?}: {passed} specs passed, of {PASSING}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    daemon.drain().await?;
    drop(registry);
    lab.finish()
}
