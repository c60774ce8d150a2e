//! slipwayd.

fn main() {}
