//! What a client is answered whose deadline (`grpc-timeout`) is over: DEADLINE_EXCEEDED, as gRPC says. tonic's own answer
//! at that moment is CANCELLED, and whether a client saw that or its own verdict was a race.
//!
//! The timer here begins before tonic's, which is outside, and is looked at first, so that tonic's never speaks.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};

/// A service whose requests end at their deadline.
#[derive(Debug, Clone)]
pub struct Deadline<S>(S);

/// Puts the deadline around a service.
pub fn around<S>(inner: S) -> Deadline<S> {
    Deadline(inner)
}

impl<S, B> Service<http::Request<B>> for Deadline<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let limit = request
            .headers()
            .get("grpc-timeout")
            .and_then(|value| parse(value.to_str().ok()?));
        let answer = self.0.call(request);
        let Some(over) = limit.map(tokio::time::sleep) else {
            return Box::pin(answer);
        };
        Box::pin(async move {
            tokio::select! {
                biased;
                answer = answer => answer,
                () = over => Ok(Status::deadline_exceeded(
                    "the deadline that the client set is over; what it asked for goes on, and can be asked for again",
                )
                .into_http()),
            }
        })
    }
}

/// gRPC's `TimeoutValue TimeoutUnit`: at most eight digits and a letter.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Never;

    impl Service<http::Request<()>> for Never {
        type Response = http::Response<Body>;
        type Error = std::convert::Infallible;
        type Future = std::future::Pending<Result<Self::Response, Self::Error>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<()>) -> Self::Future {
            std::future::pending()
        }
    }

    #[tokio::test]
    async fn a_request_past_its_deadline_is_answered_so() {
        let request = http::Request::builder()
            .header("grpc-timeout", "20m")
            .body(())
            .unwrap();
        let response = around(Never).call(request).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4");
    }

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse("2M"), Some(Duration::from_secs(120)));
        assert_eq!(parse("10S"), Some(Duration::from_secs(10)));
        assert_eq!(parse("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(parse("7u"), Some(Duration::from_micros(7)));
        assert_eq!(parse("7n"), Some(Duration::from_nanos(7)));
        for bad in ["", "m", "10", "+1S", "123456789S", "1x", "1é"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
