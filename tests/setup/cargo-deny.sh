#!/usr/bin/env bash
# Licences, sources and bans by deny.toml. The advisory database is fetched from the internet and is therefore asked
# only where it can be reached (SLIPWAY_ADVISORIES=1).
. "$(dirname "$0")/lib.sh"
deny=$SLIPWAY_TOOLS/bin/cargo-deny
build() {
  [ -x "$deny" ] && return
  say "building cargo-deny"
  CARGO_TARGET_DIR=$SLIPWAY_CACHE/src-cargo-deny cargo install -q --locked --root "$SLIPWAY_TOOLS" cargo-deny
  rm -rf "$SLIPWAY_CACHE/src-cargo-deny"
}
with_lock cargo-deny build
cd "$(dirname "$0")/../.."
for manifest in Cargo.toml cri/stream/fuzz/Cargo.toml; do
  check() { "$deny" --manifest-path $manifest --config deny.toml check -A license-not-encountered -A license-exception-not-encountered "$@"; }
  check licenses bans sources
  [ -z "${SLIPWAY_ADVISORIES:-}" ] || check advisories
done
