#!/usr/bin/env bash
# Every test: the house's own rules, unit tests, then the suites against real components. Run through `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || exec sudo --preserve-env=SLIPWAY_CACHE,SLIPWAY_BIN,CARGO_TARGET_DIR,HOME,PATH,CI "$PWD/tests/run.sh" "$@"
export PATH=$SLIPWAY_CACHE/tools/bin:$PATH
failed=()
shaky=()
limited() { timeout -k 10 "${LIMIT:-1200}" "$@"; } # a test that hangs must not hold everything up
part() { # part NAME COMMAND...: goes on after a failure, so that one run tells everything
  local name=$1 began=$SECONDS; shift
  printf '\n\033[1m==> %s\033[0m\n' "$name"
  if limited "$@"; then printf '==> %s: passed in %d s\n' "$name" $((SECONDS - began)); return; fi
  printf '==> %s: failed after %d s; once more\n' "$name" $((SECONDS - began))
  if limited "$@"; then shaky+=("$name"); else failed+=("$name"); printf '==> %s: FAILED twice\n' "$name"; fi
}
part "unit tests" cargo test -q --workspace --lib --bins
part "arrows" cargo test -q -p slipway-tests --test arrows
for suite in pods containers confinement crash creation images durability hostile build seeds containerd gpu_cdi gpu_hooks gpu; do
  part "suite: $suite" cargo test -q -p slipway-tests --test "$suite" -- --test-threads=3
done
part "suite: streaming" cargo test -q -p slipway-tests --test streaming -- --test-threads=3
# A real kubelet, API server and etcd on slipwayd: two nodes, and the examples end to end.
part "suite: kubelet" cargo test -q -p slipway-tests --test kubelet -- --test-threads=4
# `make cluster` and `make cluster-down` as they are typed.
part "suite: cluster" cargo test -q -p slipway-tests --test cluster
# Conformance, over SPDY and over WebSocket.
part "critest" cargo test -q -p slipway-tests --test critest
# The same where nodes are otherwise: unified cgroups, systemd, AppArmor, power cuts. Three guests, each of one processor; a busy
# machine makes them slow and nothing else.
LIMIT=2700 part "suite: vm" cargo test -q -p slipway-tests --test vm -- --test-threads=3 --nocapture
# Tests of single crates that need root or real programs.
part "crate tests" cargo test -q --no-fail-fast --workspace --exclude slipway-tests --test '*'
[ ${#shaky[@]} -eq 0 ] || printf '\nPASSED ONLY THE SECOND TIME, which is a defect: %s\n' "${shaky[*]}"
if [ ${#failed[@]} -gt 0 ]; then printf '\nFAILED: %s\n' "${failed[*]}"; exit 1; fi
printf '\nall parts passed\n'
