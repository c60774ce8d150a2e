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

    /// As it goes over the wire.
    pub fn status(&self) -> ttrpc::Status {
        ttrpc::Status {
            code: self.code as i32,
            message: self.message.clone(),
        }
    }
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
