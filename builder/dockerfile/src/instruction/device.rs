//! `RUN --device=name[,required]`: a CDI device.

use serde::Serialize;

/// A CDI device that a RUN asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// `vendor.com/class=name`, or a class alone.
    pub name: String,
    /// Fail where the machine has no such device.
    pub required: bool,
}
