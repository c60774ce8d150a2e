//! Containers made by the worker, as root.
#![allow(clippy::unwrap_used)] // a failure is a failed test

mod common;

use common::Bundle;
use serde_json::json;

#[test]
fn root_a_container_is_created_started_and_ends() {
    if !common::root() {
        return;
    }
    let mut b = Bundle::new("echo pid $$ home $HOME a $A host $(cat /proc/sys/kernel/hostname); exit 7");
    let (code, out) = b.run();
    assert_eq!((code, out.trim()), (7, "pid 1 home /root a 1 host c"));
}
