//! What is done about the containers that have a GPU on which work is over: an XID has condemned it, the driver asks for a reset,
//! or it has not answered for long. Kubelet does nothing: it only stops handing the GPU out, and a container that fails on it is
//! started on it again.
//!
//! ```text
//! an XID condemns ─▶ who has it ─▶ announced to slipwayd ─▶ the node's allocatable falls ─▶ evicted ─▶ killed
//!                    (on disk)      (an end that comes by      (else the replacement          unless     its status has
//!                                   itself has the reason,     could be put on the            it ends    the XID
//!                                   nothing starts anew)       same GPU)                      by itself
//! ```
//! A [`case::Case`] is one GPU that is sick since a moment; what is to be done about whom is on disk before it is done, by the id
//! of the container, so that an agent that is started in the middle goes on and meets nobody who came later. Every step can be
//! done again, and is until somebody says that it is done. A GPU that is well again before anything was announced is left alone
//! with whoever has it; after that a container that still lives has lost what it had on the GPU, and is ended.
//!
//! `act` is the story of a case, `end` that of one container of it; `case` is pure; `runtime` speaks to slipwayd, `evict` to
//! the API server.

mod act;
mod book;
mod case;
mod end;
mod evict;
mod runtime;

pub use act::Faults;

/// Most GPUs that are waiting to be heard of as refused.
pub const MAX_WAITING: usize = 64;
