//! Which values cannot be.

use super::{Config, ConfigError, HOOK_PROGRAMS};

impl Config {
    /// Checks every value that its type allows too much for.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let bad = |key, value: &dyn std::fmt::Display, reason| {
            Err(ConfigError::Value {
                key,
                value: value.to_string(),
                reason,
            })
        };
        for (key, path) in [
            ("driver.root", &self.driver.root),
            ("paths.proc", &self.paths.proc),
            ("paths.sys", &self.paths.sys),
            ("paths.state", &self.paths.state),
            ("paths.kubelet", &self.paths.kubelet),
            ("paths.cdi", &self.paths.cdi),
            ("paths.pod_resources", &self.paths.pod_resources),
            ("paths.pods", &self.paths.pods),
            ("paths.kmsg", &self.paths.kmsg),
            ("faults.socket", &self.faults.socket),
        ] {
            if !path.is_absolute() {
                return bad(key, &path.display(), "it is not an absolute path");
            }
        }
        for (key, path) in [
            ("driver.dev", &self.driver.dev),
            ("driver.library", &self.driver.library),
        ] {
            if !path.as_os_str().is_empty() && !path.is_absolute() {
                return bad(key, &path.display(), "it is neither empty nor an absolute path");
            }
        }
        let domain = self
            .resources
            .gpu
            .split_once('/')
            .filter(|(d, n)| !d.is_empty() && !n.is_empty());
        if domain.is_none() || self.resources.gpu.len() > 253 {
            return bad(
                "resources.gpu",
                &self.resources.gpu,
                "it is not of the form domain/name",
            );
        }
        let probe: Result<slipway_cdi::QualifiedName, _> = format!("{}=all", self.cdi.kind).parse();
        if probe.is_err() {
            return bad("cdi.kind", &self.cdi.kind, "it is not of the form vendor/class");
        }
        let hook = &self.cdi.hook;
        let known = hook
            .file_name()
            .is_some_and(|n| HOOK_PROGRAMS.iter().any(|known| n == *known));
        let usable = hook.as_os_str().is_empty() || hook.is_absolute() && known;
        if !usable {
            return bad(
                "cdi.hook",
                &hook.display().to_string(),
                "it is no absolute path of slipway-agent, nvidia-cdi-hook or nvidia-ctk",
            );
        }
        if !(1..=128).contains(&self.resources.replicas) {
            return bad(
                "resources.replicas",
                &self.resources.replicas,
                "it is not from 1 to 128",
            );
        }
        if !(1..=3600).contains(&self.health.probe_seconds) {
            return bad(
                "health.probe_seconds",
                &self.health.probe_seconds,
                "it is not from 1 to 3600",
            );
        }
        if !(1..=1000).contains(&self.health.well_after) {
            return bad(
                "health.well_after",
                &self.health.well_after,
                "it is not from 1 to 1000",
            );
        }
        if !(100..=600_000).contains(&self.driver.deadline_ms) {
            return bad(
                "driver.deadline_ms",
                &self.driver.deadline_ms,
                "it is not from 100 to 600000",
            );
        }
        for (key, seconds, most, reason) in [
            (
                "faults.wait_seconds",
                self.faults.wait_seconds,
                600,
                "it is more than 600",
            ),
            (
                "faults.lost_seconds",
                self.faults.lost_seconds,
                86_400,
                "it is more than 86400",
            ),
            (
                "faults.evict_seconds",
                self.faults.evict_seconds,
                86_400,
                "it is more than 86400",
            ),
        ] {
            if seconds > most {
                return bad(key, &seconds, reason);
            }
        }
        let api = self.kubernetes.api.as_str();
        if !["auto", "in-cluster", "none"].contains(&api) && !api.starts_with('/') {
            return bad(
                "kubernetes.api",
                &api,
                "it is none of auto, in-cluster and none, nor an absolute path",
            );
        }
        if !self.kubernetes.nfd_file.is_absolute() {
            let path = self.kubernetes.nfd_file.display();
            return bad("kubernetes.nfd_file", &path, "it is not an absolute path");
        }
        if self.log.level.parse::<tracing::Level>().is_err() {
            return bad(
                "log.level",
                &self.log.level,
                "it is none of error, warn, info, debug, trace",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DEFAULT_TOML;
    use slipway_gpu::signs::Sign;
    use std::path::Path;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("agent.toml"))
    }

    #[test]
    fn the_file_that_is_printed_says_what_holds_without_one() {
        let mut printed = parse(DEFAULT_TOML).expect("the default file is valid");
        let signs = std::mem::take(&mut printed.health.signs);
        let usual = Sign::ALL.map(|sign| (sign, sign.usual()));
        assert_eq!(signs, usual.into(), "every sign, with what is usually done");
        assert_eq!(format!("{printed:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn unknown_keys_and_values_that_cannot_be_are_refused_by_name() {
        for (text, said) in [
            ("[driver]\nrooot = \"/\"\n", "rooot"),
            ("[driver]\nroot = \"driver\"\n", "driver.root"),
            ("[resources]\ngpu = \"gpu\"\n", "resources.gpu"),
            ("[resources]\nmig_strategy = \"both\"\n", "both"),
            ("[resources]\nreplicas = 0\n", "resources.replicas"),
            ("[cdi]\nkind = \"gpu\"\n", "cdi.kind"),
            ("[kubernetes]\napi = \"yes\"\n", "kubernetes.api"),
            ("[http]\nlisten = \"9400\"\n", "listen"),
            ("[cdi]\nhook = \"/bin/true\"\n", "cdi.hook"),
            ("[cdi]\nhook = \"slipway-agent\"\n", "cdi.hook"),
            ("[faults]\naction = \"kill\"\n", "kill"),
            ("[faults]\nsocket = \"fault.sock\"\n", "faults.socket"),
            ("[faults]\nwait_seconds = 601\n", "faults.wait_seconds"),
            ("[log]\nlevel = \"loud\"\n", "log.level"),
            ("[health]\nwell_after = 0\n", "health.well_after"),
            ("[health.signs]\nheat = \"warn\"\n", "heat"),
            ("[health.signs]\nslowdown = \"kill\"\n", "kill"),
            ("[health.limits]\npages = 1\n", "pages"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
