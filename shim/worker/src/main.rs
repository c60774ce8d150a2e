//! slipway-runc.

fn main() {}
