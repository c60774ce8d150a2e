#!/usr/bin/env bash
# `make run`: makes the base image's file tree from the distribution's own packages where no registry is asked for, then
# hands over to the demo program, which builds, runs, shows and removes.
. "$(dirname "$0")/../setup/lib.sh"
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" -eq 0 ] || exec sudo --preserve-env=SLIPWAY_CACHE,SLIPWAY_BIN,CARGO_TARGET_DIR,BASE,HOME,PATH "$0" "$@"
work=$SLIPWAY_CACHE/demo
mkdir -p "$work"

# The packages come from where this machine's own packages come from.
make_base() {
  local dir=$work/base
  [ -s "$dir/rootfs.tar" ] && return
  . /etc/os-release
  say "making a Python base image from ${PRETTY_NAME:-this distribution}'s packages (once)"
  rm -rf "$dir"; mkdir -p "$dir"
  local sources=(); local f
  for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list; do
    [ -s "$f" ] && grep -qE '^(deb|Types:)' "$f" && sources+=("$f")
  done
  [ ${#sources[@]} -gt 0 ] || die "no package sources found in /etc/apt"
  mmdebstrap --quiet --format=tar --variant=apt --include=python3,python3-pip,python-is-python3,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED' \
    --customize-hook='mkdir -p "$1"/etc/ssl/certs && cp /etc/ssl/certs/ca-certificates.crt "$1"/etc/ssl/certs/ca-certificates.crt' \
    "${VERSION_CODENAME:?}" "$dir/rootfs.tar.part" "${sources[@]}" > "$work/base.log" 2>&1 || { tail -20 "$work/base.log" >&2; die "making the base image failed"; }
  cat > "$dir/Dockerfile" <<'D'
FROM scratch
ADD rootfs.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
CMD ["python3"]
D
  mv "$dir/rootfs.tar.part" "$dir/rootfs.tar"
}
[ -n "${BASE:-}" ] || with_lock demo-base make_base
cd "$here/../.."
cargo build --release -q -p slipway-tests --bin demo
exec "$CARGO_TARGET_DIR/release/demo" "$work"
