//! Container Device Interface: files in /etc/cdi and /var/run/cdi say what a container needs to
//! use a vendor's device; a container names devices as `vendor.com/class=name`.
//!
//! The pure part knows the files' shapes ([`Spec`]), which of them are valid ([`Spec::validate`])
//! and how edits change an OCI specification ([`ContainerEdits::apply`]). Two modules touch the
//! host: `cache` reads the folders, [`host`] looks device nodes up. The files are written by
//! vendors' tools and are checked like anything else from outside.

#![forbid(unsafe_code)]

mod annotations;
mod cache;
mod edits;
pub mod host;
mod name;
mod parse;
mod types;
mod validate;

pub use annotations::{ANNOTATION_PREFIX, AnnotationError, devices_in_annotations};
pub use cache::{Cache, DEFAULT_DIRS, FileError, ListedDevice, ResolveError};
pub use edits::EditError;
pub use name::{NameError, QualifiedName};
pub use parse::{ParseError, yaml};
pub use types::{
    ContainerEdits, Device, DeviceEdit, DeviceKind, DeviceNode, Hook, IntelRdt, Mount, NetDevice, Spec,
};
pub use validate::ValidationError;
