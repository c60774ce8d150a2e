//! The store as its users see it: on temporary roots, with several openings and processes that die.

mod crash;
pub(in crate::store) mod full;
mod images;
mod layers;
mod originals;
mod owners;
mod unpack;
