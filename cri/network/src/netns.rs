//! Network namespaces that plugins work on: made and pinned by `slipway_sys::ns`, with loopback up,
//! so that no loopback plugin is run.

pub use slipway_sys::ns::{in_netns, is_pinned, pin_new_net, unpin};
