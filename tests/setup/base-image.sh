#!/usr/bin/env bash
# The file tree of slipway.local/python:3, a Python base image from the distribution's own packages, and its Dockerfile:
# a build context in the cache, for `make run` and for the suites that train.
. "$(dirname "$0")/lib.sh"
work=$SLIPWAY_CACHE/demo
mkdir -p "$work"

# The packages come from where this machine's own packages come from.
make_base() {
  local dir=$work/base
  [ -s "$dir/rootfs.tar" ] && return
  . /etc/os-release
  say "making a Python base image from ${PRETTY_NAME:-this distribution}'s packages (once)"
  rm -rf "$dir"; mkdir -p "$dir"
  local sources; mapfile -t sources < <(package_sources)
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
with_lock demo-base make_base
