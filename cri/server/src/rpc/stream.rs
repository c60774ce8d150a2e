//! The Stream* verbs: the unary lists in parts, so that no message is larger than a client takes.

use tokio_stream::Iter;
use tonic::{Response, Status};

/// Items in one message; a list of 16 MB has tens of thousands.
const PART: usize = 512;

/// What a Stream* verb answers with.
pub type Parts<M> = Iter<std::vec::IntoIter<Result<M, Status>>>;

/// Cuts a list into messages.
pub fn parts<T, M>(items: Vec<T>, message: impl Fn(Vec<T>) -> M) -> Response<Parts<M>> {
    parts_of(PART, items, message)
}

/// As [`parts`], for items larger than most.
pub fn parts_of<T, M>(part: usize, items: Vec<T>, message: impl Fn(Vec<T>) -> M) -> Response<Parts<M>> {
    let mut messages = Vec::with_capacity(items.len().div_ceil(part));
    let mut items = items.into_iter().peekable();
    while items.peek().is_some() {
        messages.push(Ok(message(items.by_ref().take(part).collect())));
    }
    Response::new(tokio_stream::iter(messages))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    #[tokio::test]
    async fn a_long_list_comes_in_parts_and_an_empty_one_in_none() {
        let all: Vec<Vec<u32>> = parts((0..1025).collect(), |p| p)
            .into_inner()
            .map(Result::unwrap)
            .collect()
            .await;
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [512, 512, 1]);
        assert_eq!(parts(Vec::<u32>::new(), |p| p).into_inner().count().await, 0);
    }
}
