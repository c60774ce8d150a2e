//! The ways in which a client can break the protocol it speaks. Each ends the connection, with the answer the protocol has
//! for it.

/// What a client did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    /// SPDY: a control frame of another version.
    #[error("a SPDY control frame of version {0}")]
    SpdyVersion(u16),
    /// SPDY: a control frame of a size its type cannot have.
    #[error("a SPDY control frame of type {kind} with {length} bytes")]
    SpdyFrameSize {
        /// The type.
        kind: u16,
        /// The size.
        length: usize,
    },
    /// SPDY: a header block that cannot be decompressed.
    #[error("a SPDY header block that cannot be decompressed")]
    SpdyCompression,
    /// SPDY: a header block beyond all bounds.
    #[error("a SPDY header block of more than {0} bytes")]
    SpdyHeaderBomb(usize),
    /// SPDY: a stream number that was passed already, is even, or is 0.
    #[error("SPDY stream {0} out of order")]
    SpdyStreamOrder(u32),
    /// SPDY: more data than the connection's window allows.
    #[error("more SPDY data than the connection's window allows")]
    SpdySessionWindow,
    /// SPDY: a window beyond 2^31-1.
    #[error("a SPDY window beyond its limit")]
    SpdyWindowOverflow,
    /// WebSocket: bits nobody agreed on.
    #[error("a WebSocket frame with reserved bits")]
    WebSocketReserved,
    /// WebSocket: an opcode that does not exist.
    #[error("a WebSocket frame with the unknown opcode {0}")]
    WebSocketOpcode(u8),
    /// WebSocket: a frame that is not masked.
    #[error("a WebSocket frame that is not masked")]
    WebSocketUnmasked,
    /// WebSocket: a length that is not written as it must be.
    #[error("a WebSocket frame whose length is not minimal")]
    WebSocketLength,
    /// WebSocket: a control frame that is fragmented or too long.
    #[error("a WebSocket control frame that is fragmented or too long")]
    WebSocketControl,
    /// WebSocket: a continuation of nothing, or a new message within one.
    #[error("a WebSocket message that is not whole")]
    WebSocketFragment,
    /// WebSocket: a text message.
    #[error("a WebSocket text message")]
    WebSocketText,
    /// WebSocket: a message for a channel that does not exist.
    #[error("a message for channel {0}")]
    Channel(u8),
    /// WebSocket: a close signal that is not one channel's number.
    #[error("a malformed close signal")]
    ChannelClose,
}
