//! See `slipway_stream::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| slipway_stream::fuzzing::spdy(input));
