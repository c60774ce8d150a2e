//! Work that blocks (files, mounts, SQLite) runs on the runtime's blocking threads, and its panics become errors.

use crate::error::Error;

/// Runs `work` on a blocking thread.
pub async fn run<T, F>(work: F) -> Result<T, Error>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Error> + Send + 'static,
{
    let span = tracing::Span::current();
    let done = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    crate::memory::used();
    done.unwrap_or(Err(Error::Panicked))
}
