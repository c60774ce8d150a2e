#!/usr/bin/env bash
# install.sh PROGRAMS DESTDIR PREFIX SYSCONFDIR UNITDIR: programs, systemd units, CNI and kubelet snippets to where a node has
# them. Files below SYSCONFDIR that are there already are the administrator's: the new one is put beside as NAME.new.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
programs=$1 dest=$2 prefix=$3 etc=$4 units=$5

install -d "$dest$prefix/bin" "$dest$units"
for p in slipwayd slipway slipway-agent containerd-shim-slipway-v1 slipway-runc; do
  # By rename: a running program's file cannot be written to.
  install -m 755 "$programs/$p" "$dest$prefix/bin/$p.new"
  mv -f "$dest$prefix/bin/$p.new" "$dest$prefix/bin/$p"
done
for unit in slipwayd.service slipway-agent.service; do
  sed "s#@PREFIX@#$prefix#" "$here/$unit" > "$dest$units/$unit"
done

config() { # config FILE TARGET
  local to=$dest$etc/$2
  install -d "$(dirname "$to")"
  if [ -e "$to" ] && ! cmp -s "$here/$1" "$to"; then to=$to.new; echo "$etc/$2 is kept; the new one is $etc/$2.new"; fi
  install -m 644 "$here/$1" "$to"
}
config config.toml slipway/config.toml
config 10-slipway.conflist cni/net.d/10-slipway.conflist
config kubelet.conf kubernetes/kubelet.conf.d/20-slipway.conf
install -d "$dest$etc/slipway/certs.d"
