//! The store as its users see it: on temporary roots, with several openings and processes that die.

mod crash;
mod full;
mod images;
mod layers;
mod owners;
mod unpack;
