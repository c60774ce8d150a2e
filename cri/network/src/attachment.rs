//! What is kept from ADD until DEL is proven: the configuration and arguments as they were, and the
//! result. Serialisable, with a version; its keeper stores it before the first plugin runs.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::CniError;
use crate::result::NetworkResult;

/// The version of [`Attachment`]'s serialised form.
pub(crate) const VERSION: u32 = 1;

/// A pod's connection to a network, wished for (before ADD) or made (after it).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    pub(crate) version: u32,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// The network's name.
    pub network: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// The pinned network namespace.
    pub netns: PathBuf,
    pub(crate) cni_version: String,
    #[serde(default)]
    pub(crate) disable_check: bool,
    /// CNI_ARGS.
    pub(crate) args: String,
    /// The plugins in the order of ADD, as configured.
    pub(crate) plugins: Vec<PluginConfig>,
    /// Arguments for plugins that declare the capability.
    pub(crate) capability_args: Map<String, Value>,
    /// The last plugin's result that is known; after a complete ADD the network's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) result: Option<Value>,
    /// Whether ADD has run through.
    #[serde(default)]
    pub complete: bool,
    /// Addresses of the pod's own interface, in the network's order; the first is the pod's IP.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
}

/// One plugin of a network: its type and its configuration, untouched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PluginConfig {
    /// The binary's name.
    #[serde(rename = "type")]
    pub kind: String,
    /// The whole configuration object.
    pub config: Map<String, Value>,
}

impl PluginConfig {
    /// Whether the configuration declares a capability.
    pub(crate) fn has_capability(&self, name: &str) -> bool {
        self.config
            .get("capabilities")
            .and_then(|c| c.get(name))
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }
}

impl Attachment {
    /// The result as the plugins gave it, for `crictl inspectp`; `None` before ADD.
    pub fn raw_result(&self) -> Option<&Value> {
        self.result.as_ref()
    }

    /// The result in one form, whatever version the plugins spoke; `None` before ADD.
    ///
    /// # Errors
    /// A result that makes no sense.
    pub fn result(&self) -> Result<Option<NetworkResult>, CniError> {
        let parsed = self.result.as_ref().map(NetworkResult::parse).transpose();
        parsed.map_err(|reason| CniError::BadResult {
            act: "ADD",
            network: self.network.clone(),
            reason,
        })
    }

    /// The version of the CNI protocol spoken.
    pub fn cni_version(&self) -> &str {
        &self.cni_version
    }

    pub(crate) fn known_version(&self) -> Result<(), CniError> {
        if self.version == VERSION {
            Ok(())
        } else {
            Err(CniError::AttachmentVersion(self.version))
        }
    }
}
