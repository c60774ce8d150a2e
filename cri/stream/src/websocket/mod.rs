//! WebSocket (RFC 6455) as a server speaks it, without I/O: [`Channels`] for exec and attach, [`Tunnel`] for port-forward.

mod channels;
mod frame;
mod tunnel;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest as _, Sha1};

pub(crate) use channels::{Channel, Channels};
pub(crate) use tunnel::Tunnel;

/// The answer to a `Sec-WebSocket-Key` (RFC 6455, 4.2.2); `None` if it is not sixteen bytes in base64.
pub(crate) fn accept_key(key: &str) -> Option<String> {
    let nonce = STANDARD.decode(key).ok()?;
    if nonce.len() != 16 {
        return None;
    }
    let mut hash = Sha1::new();
    hash.update(key);
    hash.update("258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    Some(STANDARD.encode(hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_the_rfc_gets_its_answer() {
        let accept = accept_key("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept.as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert_eq!(accept_key("c2hvcnQ="), None);
        assert_eq!(accept_key("!"), None);
    }
}
