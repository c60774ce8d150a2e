#!/usr/bin/env bash
# The file tree that the tests' small images are made of: a dynamic busybox, nginx, ipcs, pgrep and a set-uid program, from the
# distribution's packages, unpacked and not configured. Left in the cache as a build context with the Dockerfile of all of them.
. "$(dirname "$0")/lib.sh"
here=$(cd "$(dirname "$0")/.." && pwd)
dir=$SLIPWAY_CACHE/lab-images

make_rootfs() {
  local want; want=$(cat "$0" "$here"/images/* | sha256sum)
  [ "$(cat "$dir/made" 2>/dev/null)" = "$want" ] && return
  . /etc/os-release
  say "making the tests' small images from ${PRETTY_NAME:-this distribution}'s packages (once)"
  local sources; mapfile -t sources < <(package_sources)
  [ ${#sources[@]} -gt 0 ] || die "no package sources found in /etc/apt"
  rm -rf "$dir"; mkdir -p "$dir"
  # The shell must run `ls` from the file system, as a dynamic busybox does and the static one does not.
  mmdebstrap --quiet --variant=extract --include=base-files,busybox,util-linux,procps,nginx \
    --dpkgopt='path-exclude=/usr/share/*' "${VERSION_CODENAME:?}" "$dir/rootfs" "${sources[@]}" > "$dir/log" 2>&1 ||
    { tail -20 "$dir/log" >&2; die "unpacking packages for the tests' images failed"; }
  ( cd "$dir/rootfs"
    rm -rf usr/share var/cache var/lib/apt usr/lib/systemd lib/systemd etc/nginx lib/udev usr/lib/udev {,usr/}lib/*/perl* {,usr/}lib/*/gconv
    # Of the packages' programs only what busybox lacks: its `top` runs without a terminal, for one.
    local keep='busybox|ipcs|pgrep|nginx' d applet
    for d in bin sbin usr/bin usr/sbin; do
      [ -L $d ] || find $d -mindepth 1 | grep -vE "/($keep)\$" | xargs -r rm -rf
    done
    for applet in $(find . -type f -name busybox -exec {} --list ';'); do
      [ -e usr/bin/$applet ] || [ -e bin/$applet ] || ln -s busybox bin/$applet
    done
    mkdir -p etc tmp root var/run var/log/nginx var/lib/nginx var/www home/default-user run
    chmod 1777 tmp
    printf '%s\n' root:x:0:0:root:/root:/bin/sh www-data:x:33:33:www-data:/var/www:/bin/false \
      default-user:x:1000:1000::/home/default-user:/bin/sh nobody:x:65534:65534:nobody:/:/bin/false > etc/passwd
    printf '%s\n' root:x:0: www-data:x:33: default-user:x:1000: group-defined-in-image:x:50000:default-user nogroup:x:65534: > etc/group
    echo '<h1>It works</h1>' > var/www/index.html )
  gcc -static -Os -s -o "$dir/nonewprivs" "$here/images/nonewprivs.c"
  tar -C "$dir/rootfs" --numeric-owner --owner=0 --group=0 -cf "$dir/rootfs.tar" . && rm -rf "$dir/rootfs"
  cp "$here"/images/* "$(command -v docker-registry)" "$dir/"
  echo "$want" > "$dir/made"
}
with_lock lab-images make_rootfs
