//! slipway-snapshot.
