//! Terminal sizes: a stream of JSON objects from the client, of which only the newest matters.

use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use crate::mux::Input;

/// One size is some thirty bytes; what has not become one within this many never will.
const MAX_OBJECT: usize = 1024;

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    #[serde(rename = "Width", alias = "width")]
    pub width: u16,
    /// Rows.
    #[serde(rename = "Height", alias = "height")]
    pub height: u16,
}

/// The sizes a client's terminal takes. A size that was not fetched before the next one came is skipped.
#[derive(Debug)]
pub struct Resizes(watch::Receiver<Option<TerminalSize>>);

impl Resizes {
    /// The next size; `None` when there will be none.
    pub async fn next(&mut self) -> Option<TerminalSize> {
        self.0.changed().await.ok()?;
        *self.0.borrow_and_update()
    }
}

pub(crate) fn channel() -> (watch::Sender<Option<TerminalSize>>, Resizes) {
    let (sender, receiver) = watch::channel(None);
    (sender, Resizes(receiver))
}

/// Decodes sizes until the stream ends or is not one of sizes; what comes after that is discarded.
pub(crate) async fn pump(mut input: Input, sizes: watch::Sender<Option<TerminalSize>>) {
    let mut pending = Vec::new();
    let mut chunk = [0u8; MAX_OBJECT];
    loop {
        let Ok(read @ 1..) = input.read(&mut chunk).await else {
            return;
        };
        pending.extend_from_slice(&chunk[..read]);
        let Some(newest) = take_sizes(&mut pending) else {
            tracing::debug!("a client's resize stream is not one of terminal sizes");
            return;
        };
        if let Some(size) = newest {
            sizes.send_replace(Some(size));
        }
    }
}

/// Takes all whole sizes from the front and returns the last of them; `None` for bytes that are no sizes.
fn take_sizes(pending: &mut Vec<u8>) -> Option<Option<TerminalSize>> {
    let mut newest = None;
    let mut objects = serde_json::Deserializer::from_slice(pending).into_iter();
    loop {
        match objects.next() {
            Some(Ok(size)) => newest = Some(size),
            Some(Err(error)) if !error.is_eof() => return None,
            Some(Err(_)) | None => break,
        }
    }
    let taken = objects.byte_offset();
    pending.drain(..taken);
    (pending.len() <= MAX_OBJECT).then_some(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: u16, height: u16) -> TerminalSize {
        TerminalSize { width, height }
    }

    #[test]
    fn the_last_of_several_whole_sizes_counts_and_a_torn_one_waits() {
        let mut pending = br#"{"Width":80,"Height":24}{"Width":100,"Height":50}{"Wid"#.to_vec();
        assert_eq!(take_sizes(&mut pending), Some(Some(size(100, 50))));
        assert_eq!(pending, br#"{"Wid"#);
        pending.extend_from_slice(b"th\":1,\"Height\":2}\n");
        assert_eq!(take_sizes(&mut pending), Some(Some(size(1, 2))));
        assert_eq!(take_sizes(&mut pending), Some(None));
    }

    #[test]
    fn what_is_no_size_or_never_ends_is_refused() {
        for wrong in [
            r#"{"Width":70000,"Height":1}"#,
            "[1]",
            "nonsense",
            r#"{"Width":1}"#,
        ] {
            assert_eq!(take_sizes(&mut wrong.as_bytes().to_vec()), None, "{wrong}");
        }
        let mut endless = format!("{{\"{}", "x".repeat(MAX_OBJECT)).into_bytes();
        assert_eq!(take_sizes(&mut endless), None);
    }
}
