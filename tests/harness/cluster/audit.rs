//! What pods ask of the API server with their accounts, and what they are told: the server's own record.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Cluster;

/// Accounts of the cluster's own controllers are not pods'.
const POLICY: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, userGroups: [\"system:serviceaccounts:kube-system\"]}
- {level: Metadata, userGroups: [\"system:serviceaccounts\"]}
- {level: None}
";

/// A kind of request, and its answer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    /// As RBAC names it: `nodes`, `nodes/status`.
    pub resource: String,
    /// As RBAC names it.
    pub verb: String,
    /// HTTP's.
    pub code: u64,
}

impl Cluster {
    /// Arguments of an API server that keeps the record.
    pub(super) fn audit(&self) -> Result<[String; 2]> {
        let policy = self.dir().join("audit.yaml");
        std::fs::write(&policy, POLICY).with_context(|| format!("writing {}", policy.display()))?;
        Ok([
            format!("--audit-policy-file={}", policy.display()),
            format!("--audit-log-path={}", self.audit_log().display()),
        ])
    }

    fn audit_log(&self) -> PathBuf {
        self.dir().join("audit.log")
    }

    /// What pods with the account `name` of `namespace` have asked, each kind of request and answer once.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn asked(&self, namespace: &str, name: &str) -> Result<BTreeSet<Asked>> {
        let log = std::fs::read_to_string(self.audit_log()).context("reading the API server's record")?;
        let user = format!("system:serviceaccount:{namespace}:{name}");
        let mut asked = BTreeSet::new();
        // The last line may be under way.
        for entry in log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()) {
            if entry["user"]["username"] != user.as_str() {
                continue;
            }
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            let mut resource = text(&entry["objectRef"]["resource"]);
            if let Some(sub) = entry["objectRef"]["subresource"].as_str() {
                resource = format!("{resource}/{sub}");
            }
            asked.insert(Asked {
                resource,
                verb: text(&entry["verb"]),
                code: entry["responseStatus"]["code"].as_u64().unwrap_or_default(),
            });
        }
        Ok(asked)
    }
}
