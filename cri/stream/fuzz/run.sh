#!/usr/bin/env bash
# Lets libFuzzer look for bytes that break a framing: each program for so many seconds, from what the tests' own encoders make.
# What it finds is in <target>/fuzz/found; give one such file to a program to see it again. Run through `make fuzz`.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-60}
target=${CARGO_TARGET_DIR:-../../../target}
mkdir -p "$target/fuzz/found" && target=$(cd "$target" && pwd)
corpus=$target/fuzz/corpus
(cd .. && CORPUS=$target/fuzz/seeds cargo test -q -p slipway-stream --lib -- --ignored a_corpus)
# Coverage for libFuzzer without cargo-fuzz or a nightly compiler: LLVM's own pass, over our code and what it depends on.
export CARGO_TARGET_DIR=$target/fuzz/build
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1" \
  cargo build -q --release --target x86_64-unknown-linux-gnu
for program in spdy channels tunnel; do
  mkdir -p "$corpus/$program"
  printf '\n==> %s for %s s\n' "$program" "$seconds"
  "$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release/$program" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=65536 \
    -print_final_stats=1 -verbosity=0 -artifact_prefix="$target/fuzz/found/$program-" "$corpus/$program" "$target/fuzz/seeds/$program"
done
