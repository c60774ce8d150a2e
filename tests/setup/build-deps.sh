#!/usr/bin/env bash
# What building Slipway needs: a C compiler and libseccomp for the worker, and Rust's musl target for the shim.
. "$(dirname "$0")/lib.sh"
apt_install gcc libc6-dev libseccomp-dev make ca-certificates
command -v cargo >/dev/null || die "Rust is missing: install it with rustup (https://rustup.rs), 1.95 or newer"
sysroot=$(rustc --print sysroot)
target=$(uname -m)-unknown-linux-musl
if [ ! -d "$sysroot/lib/rustlib/$target" ]; then
  command -v rustup >/dev/null || die "the Rust target $target is missing and there is no rustup to add it"
  say "adding the Rust target $target"
  rustup target add "$target"
fi
