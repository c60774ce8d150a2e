//! Why networking failed: no network, a plugin's answer, a plugin's misbehaviour.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a CNI operation failed. Errors name the network, the plugin and the act, so that a pod's
/// event reads as a sentence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CniError {
    /// There is no usable network configuration.
    #[error("no network: {reason}")]
    NotReady {
        /// Why, as [`crate::Cni::status`] says it.
        reason: String,
    },
    /// An argument that CNI cannot carry.
    #[error("{what} {value:?} {reason}")]
    Argument {
        /// Which.
        what: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Collecting what nobody has was given up: it is done alone, and something else was always under way.
    #[error("GC {network}: other operations were under way for {waited:?}")]
    Busy {
        /// The network.
        network: String,
        /// For how long.
        waited: std::time::Duration,
    },
    /// A plugin's binary is not in any of the folders.
    #[error("{act} {network}: CNI plugin {plugin:?} is not in {dirs}")]
    PluginMissing {
        /// ADD, DEL …
        act: &'static str,
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
        /// Where it was looked for.
        dirs: String,
    },
    /// A plugin failed.
    #[error("{act} {network}: CNI plugin {plugin:?}")]
    Plugin {
        /// ADD, DEL …
        act: &'static str,
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
        /// How.
        #[source]
        source: PluginError,
    },
    /// No version of the protocol suits the configuration and all its plugins.
    #[error("network {network}: no CNI version of {wanted} is known to all of its plugins ({known})")]
    NoCommonVersion {
        /// The network.
        network: String,
        /// What the configuration offers.
        wanted: String,
        /// What the least able plugin knows.
        known: String,
    },
    /// A template of a network configuration that this program does not understand.
    #[error("fill in the template of the network configuration")]
    Template(#[from] crate::TemplateError),
    /// What a template came to is no network configuration.
    #[error("the filled-in template is no network configuration: {reason}")]
    Rendered {
        /// What is wrong with it.
        reason: String,
    },
    /// A network configuration cannot be written.
    #[error("write {}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Reservations of an earlier boot cannot be let go of.
    #[error("let go of addresses of an earlier boot: {}", path.display())]
    Reservation {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A result that is not one.
    #[error("{act} {network}: the result makes no sense: {reason}")]
    BadResult {
        /// ADD, DEL …
        act: &'static str,
        /// The network.
        network: String,
        /// What is wrong.
        reason: String,
    },
    /// An ADD that failed and could not be undone: its plan is to be given to `del` again.
    #[error("ADD failed, and undoing it too ({undo})")]
    NotUndone {
        /// What failed first.
        #[source]
        add: Box<CniError>,
        /// What DEL said, with its causes.
        undo: String,
    },
    /// A record of another version of this program.
    #[error("attachment record version {0} is not known (1 is)")]
    AttachmentVersion(u32),
}

impl CniError {
    /// Whether the plugin said "try again later" (code 11), or could not be found or run: things
    /// that pass.
    pub fn is_transient(&self) -> bool {
        match self {
            CniError::NotReady { .. } | CniError::PluginMissing { .. } => true,
            CniError::Plugin { source, .. } => match source {
                PluginError::Answer { code, .. } => *code == 11,
                PluginError::Timeout { .. } | PluginError::Run { .. } => true,
                _ => false,
            },
            _ => false,
        }
    }
}

/// How one plugin failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginError {
    /// It answered with an error of the protocol.
    #[error("{msg} (code {code}){}", if details.is_empty() { String::new() } else { format!(": {details}") })]
    Answer {
        /// Reserved below 100: see the CNI specification, section 5.
        code: u64,
        /// Short text.
        msg: String,
        /// Longer text.
        details: String,
    },
    /// It failed without a protocol error.
    #[error("{status}, without an error message{}", if stderr.is_empty() { String::new() } else { format!("; it wrote: {stderr}") })]
    Failed {
        /// "exit status 3", "signal 9".
        status: String,
        /// The tail of its standard error.
        stderr: String,
    },
    /// It could not be run.
    #[error("run {program}")]
    Run {
        /// Its binary.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It took too long and was killed with all it had started.
    #[error("no answer within {after:?}: killed{}", if stderr.is_empty() { String::new() } else { format!("; it wrote: {stderr}") })]
    Timeout {
        /// How long it was waited for.
        after: Duration,
        /// The tail of its standard error.
        stderr: String,
    },
    /// It wrote more than any result has.
    #[error("more than {limit} bytes of output")]
    TooMuchOutput {
        /// How much is taken.
        limit: usize,
    },
    /// It succeeded, but what it wrote is not a result.
    #[error("its output is not JSON")]
    NotJson(#[source] serde_json::Error),
}
