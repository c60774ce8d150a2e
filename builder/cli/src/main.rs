//! slipway-cli.

fn main() {}
