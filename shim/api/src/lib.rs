//! The protocol between slipwayd (or containerd, or the builder) and the shim: messages, names of services and methods,
//! and ttrpc's frames. It knows nothing of sockets, processes or files; both ends bring their own.
#![forbid(unsafe_code)]

pub mod frame;
pub mod names;
pub mod status;

/// Messages generated from `proto/`; comments are in the `.proto` files.
#[allow(missing_docs, clippy::all)]
mod generated {
    pub mod ttrpc {
        include!(concat!(env!("OUT_DIR"), "/ttrpc.rs"));
    }
    pub mod containerd {
        pub mod types {
            include!(concat!(env!("OUT_DIR"), "/containerd.types.rs"));
        }
        pub mod v1 {
            pub mod types {
                include!(concat!(env!("OUT_DIR"), "/containerd.v1.types.rs"));
            }
        }
        pub mod events {
            include!(concat!(env!("OUT_DIR"), "/containerd.events.rs"));
        }
        pub mod task {
            pub mod v3 {
                include!(concat!(env!("OUT_DIR"), "/containerd.task.v3.rs"));
            }
        }
        pub mod services {
            pub mod events {
                pub mod ttrpc {
                    pub mod v1 {
                        include!(concat!(
                            env!("OUT_DIR"),
                            "/containerd.services.events.ttrpc.v1.rs"
                        ));
                    }
                }
            }
        }
        pub mod runc {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/containerd.runc.v1.rs"));
            }
        }
    }
    pub mod io {
        pub mod containerd {
            pub mod cgroups {
                pub mod v1 {
                    include!(concat!(env!("OUT_DIR"), "/io.containerd.cgroups.v1.rs"));
                }
                pub mod v2 {
                    include!(concat!(env!("OUT_DIR"), "/io.containerd.cgroups.v2.rs"));
                }
            }
        }
    }
    pub mod slipway {
        pub mod pod {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/slipway.pod.v1.rs"));
            }
        }
    }
}

pub use generated::containerd::events;
pub use generated::containerd::runc::v1 as runc_options;
pub use generated::containerd::services::events::ttrpc::v1 as forward;
pub use generated::containerd::task::v3 as task;
pub use generated::containerd::types;
pub use generated::containerd::v1::types as process;
pub use generated::io::containerd::cgroups::v1 as metrics_v1;
pub use generated::io::containerd::cgroups::v2 as metrics_v2;
pub use generated::slipway::pod::v1 as pod;
pub use generated::ttrpc;
pub use prost_types::{Any, Timestamp};

/// Nanoseconds since 1970 as protobuf's timestamp.
pub fn timestamp(ns: i64) -> Timestamp {
    Timestamp {
        seconds: ns.div_euclid(1_000_000_000),
        nanos: ns.rem_euclid(1_000_000_000) as i32,
    }
}

/// Protobuf's timestamp as nanoseconds since 1970; saturates.
pub fn nanoseconds(t: &Timestamp) -> i64 {
    t.seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(i64::from(t.nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_survives_the_round_trip_also_before_1970() {
        for ns in [0, 1, -1, 1_700_000_000_123_456_789, -1_500_000_000] {
            assert_eq!(nanoseconds(&timestamp(ns)), ns);
        }
        assert!(timestamp(-1).nanos >= 0);
    }
}
