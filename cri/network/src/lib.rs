//! slipway-network.
