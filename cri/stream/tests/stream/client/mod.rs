//! A client of the streaming server that shares no code with it, but for SPDY's dictionary.

pub mod command;
pub mod http;
pub mod spdy;
pub mod websocket;
