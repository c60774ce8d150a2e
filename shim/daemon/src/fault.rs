//! The one place where errors become the codes a ttrpc response can carry.

use crate::diag::Chain;
use crate::record::RecordError;
use crate::spec::SpecError;
use crate::stdio::StdioError;
use crate::task::Illegal;
use crate::worker::WorkerError;
use slipway_shim_api::status::Code;
use slipway_shim_api::ttrpc;
use slipway_sys::cgroup::CgroupError;
use slipway_sys::exec::ExecError;
use slipway_sys::init::InitError;
use slipway_sys::ns::NsError;
use std::fmt;

/// The error of a call: what was attempted, on what, and why it failed, for another process to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind of failure.
    pub code: Code,
    /// The whole story.
    pub message: String,
}

impl Fault {
    /// A failure of a kind.
    pub fn new(code: Code, message: impl fmt::Display) -> Fault {
        Fault {
            code,
            message: message.to_string(),
        }
    }

    /// The object does not exist.
    pub fn not_found(what: impl fmt::Display) -> Fault {
        Fault::new(Code::NotFound, what)
    }

    /// The request is wrong.
    pub fn invalid(what: impl fmt::Display) -> Fault {
        Fault::new(Code::InvalidArgument, what)
    }

    /// The object's state does not allow it.
    pub fn precondition(what: impl fmt::Display) -> Fault {
        Fault::new(Code::FailedPrecondition, what)
    }

    /// An act failed, with the act and its object in front.
    pub fn failed(what: impl fmt::Display, why: &(dyn std::error::Error + 'static)) -> Fault {
        Fault::new(Code::Internal, format_args!("{what}: {}", Chain(why)))
    }

    /// The same failure, with the act and its object in front.
    pub fn during(self, what: impl fmt::Display) -> Fault {
        Fault {
            code: self.code,
            message: format!("{what}: {}", self.message),
        }
    }

    /// As it goes over the wire, where a text without end has no room.
    pub fn status(&self) -> ttrpc::Status {
        ttrpc::Status {
            code: self.code as i32,
            message: cut(&self.message),
        }
    }
}

/// The longest text of an error: beginning and end of a longer one say what and why.
const MAX_TEXT: usize = 16 * 1024;

fn cut(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.to_owned();
    }
    let head = text.floor_char_boundary(MAX_TEXT / 2);
    let tail = text.ceil_char_boundary(text.len() - MAX_TEXT / 2);
    format!("{} […] {}", &text[..head], &text[tail..])
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

fn with(code: Code, error: &(dyn std::error::Error + 'static)) -> Fault {
    Fault::new(code, Chain(error))
}

impl From<SpecError> for Fault {
    fn from(e: SpecError) -> Fault {
        let code = match &e {
            SpecError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Code::NotFound,
            SpecError::Read { .. } => Code::Internal,
            SpecError::Decode { .. } | SpecError::Lacks { .. } => Code::InvalidArgument,
            SpecError::Seccomp { .. } => Code::FailedPrecondition,
        };
        with(code, &e)
    }
}

impl From<CgroupError> for Fault {
    fn from(e: CgroupError) -> Fault {
        let code = match &e {
            CgroupError::Path { .. } | CgroupError::Unsupported { .. } | CgroupError::Write { .. } => {
                Code::InvalidArgument
            }
            CgroupError::SystemdOnV1 | CgroupError::NotEmpty { .. } => Code::FailedPrecondition,
            CgroupError::Systemd { .. } | CgroupError::Io { .. } => Code::Internal,
        };
        with(code, &e)
    }
}

impl From<ExecError> for Fault {
    fn from(e: ExecError) -> Fault {
        let code = match &e {
            ExecError::NotFound { .. } => Code::NotFound,
            ExecError::NotExecutable { .. } | ExecError::CwdOutside { .. } | ExecError::Invalid { .. } => {
                Code::InvalidArgument
            }
            ExecError::Gone => Code::FailedPrecondition,
            ExecError::Timeout { .. } => Code::DeadlineExceeded,
            ExecError::Io { .. } => Code::Internal,
        };
        with(code, &e)
    }
}

impl From<NsError> for Fault {
    fn from(e: NsError) -> Fault {
        let code = match &e {
            NsError::Sysctl { .. } | NsError::SetSysctl { .. } => Code::InvalidArgument,
            _ => Code::Internal,
        };
        with(code, &e)
    }
}

impl From<InitError> for Fault {
    fn from(e: InitError) -> Fault {
        with(Code::Internal, &e)
    }
}

impl From<StdioError> for Fault {
    fn from(e: StdioError) -> Fault {
        let code = match &e {
            StdioError::Open { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Code::NotFound
            }
            StdioError::Open { .. } | StdioError::Pipe { .. } => Code::Internal,
            StdioError::Unknown { .. } | StdioError::Descriptors { .. } => Code::InvalidArgument,
        };
        with(code, &e)
    }
}

impl From<WorkerError> for Fault {
    fn from(e: WorkerError) -> Fault {
        let code = match &e {
            WorkerError::Deadline { .. } => Code::DeadlineExceeded,
            WorkerError::Reported { not_found: true, .. } => Code::NotFound,
            _ => Code::Internal,
        };
        with(code, &e)
    }
}

impl From<RecordError> for Fault {
    fn from(e: RecordError) -> Fault {
        with(Code::Internal, &e)
    }
}

impl From<Illegal> for Fault {
    fn from(e: Illegal) -> Fault {
        with(Code::FailedPrecondition, &e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_without_end_is_cut_in_its_middle() {
        let name = "ä".repeat(3 << 20);
        let fault = Fault::invalid("no such program").during(format_args!("run {name:?}"));
        let status = fault.status();
        assert!(status.message.len() <= MAX_TEXT + 16, "{}", status.message.len());
        assert!(status.message.starts_with("run \"ää"), "what was attempted");
        assert!(status.message.ends_with("ä\": no such program"), "and why not");
        assert_eq!(Fault::invalid("short").status().message, "short");
    }
}
