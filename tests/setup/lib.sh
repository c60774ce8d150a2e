# Shared by the set-up scripts: where things are cached, how a step is announced. Sourced, not run.
# Everything lives outside the checkout, so that a second run is quick and `git clean` costs nothing.
set -euo pipefail
SLIPWAY_CACHE=${SLIPWAY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/slipway}
SLIPWAY_TOOLS=$SLIPWAY_CACHE/tools
mkdir -p "$SLIPWAY_TOOLS/bin"

say() { if [ -t 2 ]; then printf '\033[1m==>\033[0m %s\n' "$*" >&2; else printf '==> %s\n' "$*" >&2; fi; }
die() { printf 'slipway set-up: %s\n' "$*" >&2; exit 1; }

# Packages that are missing, installed in one go. Needs root or sudo only when something is missing.
apt_install() {
  local missing=() p
  for p in "$@"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  command -v apt-get >/dev/null || die "these packages are missing and this is no Debian or Ubuntu: ${missing[*]}"
  local sudo=; [ "$(id -u)" -eq 0 ] || sudo=sudo
  say "installing ${missing[*]}"
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
}

# One build of a cached thing at a time, also across checkouts.
with_lock() { local name=$1; shift; ( flock 9; "$@" ) 9>"$SLIPWAY_CACHE/$name.lock"; }

# Where this machine's own packages come from, a file a line: what is made from packages here comes from there too.
package_sources() {
  local f
  for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list; do
    if [ -s "$f" ] && grep -qE '^(deb|Types:)' "$f"; then echo "$f"; fi
  done
}
