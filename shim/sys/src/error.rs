//! How this crate's `io::Error`s carry what was attempted. Knows no operation.

use std::io;

/// An act that failed; the operating system's answer is the source.
#[derive(Debug, thiserror::Error)]
#[error("{act}")]
pub struct Failed {
    act: String,
    #[source]
    source: io::Error,
}

/// Puts the act in front of an error, keeping its kind.
pub(crate) fn failed<E: Into<io::Error>>(act: impl FnOnce() -> String) -> impl FnOnce(E) -> io::Error {
    move |e| {
        let source = e.into();
        io::Error::new(source.kind(), Failed { act: act(), source })
    }
}

/// The errno at the bottom of an error of this crate (`raw_os_error` sees only the outermost layer).
pub fn errno(e: &io::Error) -> Option<i32> {
    if let Some(n) = e.raw_os_error() {
        return Some(n);
    }
    let mut next: Option<&(dyn std::error::Error + 'static)> = e.get_ref().map(|i| i as _);
    while let Some(e) = next {
        if let Some(n) = e.downcast_ref::<io::Error>().and_then(errno) {
            return Some(n);
        }
        next = e.source();
    }
    None
}

/// `EINVAL` with a reason.
pub(crate) fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why.into())
}
