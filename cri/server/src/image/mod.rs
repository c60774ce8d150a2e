//! The image verbs: thin, because the store and the puller do the work.

pub mod fs_info;
pub mod list;
pub mod pull;
pub mod remove;
