//! containerd-shim-slipway-v1.

fn main() {}
