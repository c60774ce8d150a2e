#!/usr/bin/env bash
# `make run`: makes the base image's file tree from the distribution's own packages where no registry is asked for, then
# hands over to the demo program, which builds, runs, shows and removes.
. "$(dirname "$0")/../setup/lib.sh"
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" -eq 0 ] || exec sudo --preserve-env=SLIPWAY_CACHE,SLIPWAY_BIN,CARGO_TARGET_DIR,BASE,HOME,PATH "$0" "$@"
work=$SLIPWAY_CACHE/demo
mkdir -p "$work"

[ -n "${BASE:-}" ] || "$here/../setup/base-image.sh"
cd "$here/../.."
cargo build --release -q -p slipway-tests --bin demo
exec "$CARGO_TARGET_DIR/release/demo" "$work"
