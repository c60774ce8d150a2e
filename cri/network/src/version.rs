//! Which versions of the protocol a plugin knows, asked once for each binary.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use crate::error::PluginError;
use crate::plugin::{self, Call};

/// More binaries than any node has: the cache starts anew beyond it.
const MAX_CACHED: usize = 256;

/// A binary at one path and of one content.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Binary {
    path: PathBuf,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// What plugins have answered.
#[derive(Debug, Default)]
pub(crate) struct Versions {
    known: Mutex<HashMap<Binary, Vec<String>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(default)]
    supported_versions: Vec<String>,
}

impl Versions {
    /// The versions a plugin supports.
    pub(crate) async fn of(&self, program: &Path, deadline: Duration) -> Result<Vec<String>, PluginError> {
        let meta = fs::metadata(program).map_err(|source| PluginError::Run {
            program: program.to_owned(),
            source,
        })?;
        let binary = Binary {
            path: program.to_owned(),
            inode: meta.ino(),
            size: meta.len(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        };
        if let Some(known) = self
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&binary)
        {
            return Ok(known.clone());
        }
        // The library that plugins are built on wants the three placeholders to be set.
        let env = vec![
            ("CNI_CONTAINERID", "dummy".to_owned()),
            ("CNI_NETNS", "dummy".to_owned()),
            ("CNI_IFNAME", "dummy".to_owned()),
            ("CNI_PATH", "dummy".to_owned()),
        ];
        let stdin = br#"{"cniVersion":"1.1.0"}"#.to_vec();
        let output = plugin::run(Call {
            program,
            command: "VERSION",
            env,
            stdin,
            deadline,
        })
        .await?;
        let answer: Answer = serde_json::from_slice(&output).map_err(PluginError::NotJson)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_CACHED {
            known.clear();
        }
        known.insert(binary, answer.supported_versions.clone());
        Ok(answer.supported_versions)
    }
}
