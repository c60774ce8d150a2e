#!/bin/sh
# install.sh PROGRAMS DESTDIR PREFIX SYSCONFDIR UNITDIR: programs, systemd units, CNI and kubelet snippets to where a node has
# them. Files below SYSCONFDIR that are there already are the administrator's: the new one is put beside as NAME.new.
# With CNI=no no network is put in place: the cluster has one.
# Needs no more than busybox has, since it also runs in a container that sets up the node below it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
programs=$1 dest=$2 prefix=$3 etc=$4 units=$5

put() { # put FILE TO MODE, by rename: a running program's file cannot be written to
  cp "$1" "$2.part"
  chmod "$3" "$2.part"
  mv -f "$2.part" "$2"
}

mkdir -p "$dest$prefix/bin" "$dest$units"
for p in slipwayd slipway slipway-agent containerd-shim-slipway-v1 slipway-runc; do
  put "$programs/$p" "$dest$prefix/bin/$p" 755
done
for unit in slipwayd.service slipway-agent.service; do
  sed "s#@PREFIX@#$prefix#" "$here/$unit" > "$dest$units/$unit"
  chmod 644 "$dest$units/$unit"
done

config() { # config FILE TARGET [NOTE]: NOTE is what a file that is kept has to agree with; a link is the administrator's too, and below DESTDIR it may not lead to where it does on the node
  to=$dest$etc/$2
  mkdir -p "$(dirname "$to")"
  if [ -L "$to" ] || { [ -e "$to" ] && ! cmp -s "$here/$1" "$to"; }; then
    to=$to.new
    echo "$etc/$2 is kept${3:+: $3}; the new one is $etc/$2.new"
  fi
  put "$here/$1" "$to" 644
}
config config.toml slipway/config.toml \
  "its cgroup_driver (cgroupfs where it does not say) has to be the cgroupDriver of $etc/kubernetes/kubelet.conf.d/20-slipway.conf"
[ "${CNI:-yes}" = no ] || config 10-slipway.conflist cni/net.d/10-slipway.conflist
config kubelet.conf kubernetes/kubelet.conf.d/20-slipway.conf \
  "it has to name slipwayd's socket, and its cgroupDriver has to be the cgroup_driver of $etc/slipway/config.toml"
mkdir -p "$dest$etc/slipway/certs.d"

echo "installed${dest:+ below $dest}: programs in $prefix/bin, units in $units, configuration in $etc/slipway, kubelet's drop-in in $etc/kubernetes/kubelet.conf.d"
# What follows is for a node of one's own; below DESTDIR somebody else goes on.
[ -z "$dest" ] || exit 0
if [ "${CNI:-yes}" != no ]; then
  echo "pods' network: $etc/cni/net.d/10-slipway.conflist, 10.88.0.0/16 on this node alone (CNI=no where the cluster has a network)"
fi
[ -e /opt/cni/bin/bridge ] || [ -e /usr/lib/cni/bridge ] ||
  echo "neither /opt/cni/bin nor /usr/lib/cni has CNI plugins, which pods need: install containernetworking-plugins"
echo "next: systemctl daemon-reload && systemctl enable --now slipwayd"
