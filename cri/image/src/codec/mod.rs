//! Compression of layers: reading what others wrote, and encoders whose bytes depend on nothing but their input.
//!
//! Refuses to know digests and files: streams in, streams out.

mod blocks;
mod decode;
mod encode;

pub(crate) use decode::{Format, Window, WindowTooLarge, decoder};
pub(crate) use encode::{Encoder, encoder_name, encoder_named, encoder_names};
