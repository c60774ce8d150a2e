//! Every error as a gRPC status, in one exhaustive match.

use slipway_image::{PullError, StoreError};
use slipway_shim_client::{Code as ShimCode, Error as ShimError};
use slipway_stream::RequestError;
use tonic::{Code, Status};

use crate::error::Error;

/// The status of an error, its causes in the message.
pub fn from(error: &Error) -> Status {
    Status::new(code(error), error.chain())
}

fn code(error: &Error) -> Code {
    match error {
        Error::Invalid(_)
        | Error::Ambiguous { .. }
        | Error::MountSourceMissing { .. }
        | Error::Spec { .. }
        | Error::Cdi { .. } => Code::InvalidArgument,
        Error::NotFound { .. } | Error::ImageMissing { .. } => Code::NotFound,
        Error::NameTaken { .. } => Code::AlreadyExists,
        Error::InProgress { .. }
        | Error::Busy { .. }
        | Error::Held { .. }
        | Error::NetworkNotReady { .. }
        | Error::ShuttingDown => Code::Unavailable,
        Error::State { .. }
        | Error::NotStarted { .. }
        | Error::Unreadable { .. }
        | Error::Apparmor { .. } => Code::FailedPrecondition,
        Error::Unimplemented { .. } => Code::Unimplemented,
        Error::TooMany { .. } => Code::ResourceExhausted,
        Error::ExecTimeout { .. } | Error::Timeout { .. } => Code::DeadlineExceeded,
        Error::Stream(source) => stream(source),
        Error::Pull { source, .. } => pull(source),
        Error::Store { source, .. } => store(source),
        Error::Snapshot { source, .. } => snapshot(source),
        Error::Shim { source, .. } => shim(source),
        Error::Io { source, .. } => io(source),
        Error::Network { .. }
        | Error::NetworkTemplate { .. }
        | Error::OldAddresses { .. }
        | Error::BlockIo { .. }
        | Error::Random { .. }
        | Error::Encode { .. }
        | Error::Injected(_)
        | Error::Panicked => Code::Internal,
    }
}

fn stream(error: &RequestError) -> Code {
    match error {
        RequestError::NoContainer
        | RequestError::NoPod
        | RequestError::NoCommand
        | RequestError::TtyWithStderr
        | RequestError::NoStream
        | RequestError::TooLarge { .. } => Code::InvalidArgument,
        RequestError::TooManyInFlight => Code::ResourceExhausted,
        RequestError::Random { .. } => Code::Internal,
    }
}

fn io(error: &std::io::Error) -> Code {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

fn snapshot(error: &slipway_snapshot::SnapshotError) -> Code {
    match error {
        slipway_snapshot::SnapshotError::DiskFull { .. } => Code::ResourceExhausted,
        slipway_snapshot::SnapshotError::Io { source, .. } => io(source),
        _ => Code::Internal,
    }
}

fn store(error: &StoreError) -> Code {
    match error {
        StoreError::DiskFull { .. } => Code::ResourceExhausted,
        StoreError::NoImage { .. } => Code::NotFound,
        StoreError::NoLayer { .. } => Code::FailedPrecondition,
        StoreError::Ambiguous { .. } | StoreError::BadName { .. } => Code::InvalidArgument,
        StoreError::NameTaken { .. } => Code::AlreadyExists,
        StoreError::Timeout { .. } => Code::DeadlineExceeded,
        StoreError::Io { source, .. } => io(source),
        StoreError::Snapshot { source, .. } => snapshot(source),
        _ => Code::Internal,
    }
}

fn pull(error: &PullError) -> Code {
    match error {
        PullError::NotFound { .. } | PullError::NoPlatform { .. } => Code::NotFound,
        PullError::Unauthorized { .. } => Code::PermissionDenied,
        PullError::Unreachable { .. } => Code::Unavailable,
        PullError::TooManyRequests { .. } => Code::ResourceExhausted,
        PullError::Registry { .. } => Code::Unknown,
        PullError::Corrupt { .. } => Code::DataLoss,
        PullError::Unusable { .. } | PullError::Schema1 { .. } | PullError::Config { .. } => {
            Code::FailedPrecondition
        }
        PullError::Cancelled { .. } => Code::Cancelled,
        PullError::Store(source) => store(source),
        _ => Code::Unknown,
    }
}

fn shim(error: &ShimError) -> Code {
    match error {
        ShimError::Gone => Code::Unavailable,
        ShimError::Timeout { .. } => Code::DeadlineExceeded,
        ShimError::Status { code, .. } => match *code {
            code if code == ShimCode::NotFound as i32 => Code::NotFound,
            code if code == ShimCode::InvalidArgument as i32 => Code::InvalidArgument,
            code if code == ShimCode::FailedPrecondition as i32 => Code::FailedPrecondition,
            code if code == ShimCode::AlreadyExists as i32 => Code::AlreadyExists,
            code if code == ShimCode::DeadlineExceeded as i32 => Code::DeadlineExceeded,
            code if code == ShimCode::Unavailable as i32 => Code::Unavailable,
            code if code == ShimCode::ResourceExhausted as i32 => Code::ResourceExhausted,
            code if code == ShimCode::Unimplemented as i32 => Code::Unimplemented,
            _ => Code::Internal,
        },
        ShimError::Io { source, .. } => io(source),
        ShimError::Decode { .. }
        | ShimError::TooLong { .. }
        | ShimError::NotInstalled { .. }
        | ShimError::Spawn { .. }
        | ShimError::Cleanup { .. } => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_has_the_causes() {
        let error = Error::Io {
            act: "write",
            path: "/x".into(),
            source: std::io::Error::from(std::io::ErrorKind::StorageFull),
        };
        let status = from(&error);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(
            status.message().starts_with("cannot write /x: "),
            "{}",
            status.message()
        );
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        assert_eq!(
            from(&Error::NotFound {
                kind: "pod",
                id: "x".into()
            })
            .code(),
            Code::NotFound
        );
        let gone = Error::Shim {
            act: "ask",
            id: "x".into(),
            source: ShimError::Gone,
        };
        assert_eq!(from(&gone).code(), Code::Unavailable);
    }
}
