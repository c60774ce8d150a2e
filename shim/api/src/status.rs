//! The codes of google.rpc.Code that a ttrpc response's status can carry.

/// A code of google.rpc.Code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    /// The call was abandoned.
    Cancelled = 1,
    /// Nothing better is known.
    Unknown = 2,
    /// The request itself is wrong.
    InvalidArgument = 3,
    /// It took too long.
    DeadlineExceeded = 4,
    /// The object does not exist.
    NotFound = 5,
    /// The object exists already.
    AlreadyExists = 6,
    /// A bound is reached.
    ResourceExhausted = 8,
    /// The object is in a state that does not allow the act.
    FailedPrecondition = 9,
    /// The method or option is not known here.
    Unimplemented = 12,
    /// The act failed.
    Internal = 13,
    /// The service is ending.
    Unavailable = 14,
}
