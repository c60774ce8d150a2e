#!/bin/sh
# set-up.sh ROOT: what the DaemonSet slipway-node-setup does on a node whose root directory is mounted at ROOT, in the node's PID
# namespace: puts in place what `make install` does but for a network, which is the cluster's, and starts slipwayd. Done again it
# changes nothing; with other programs it replaces them and restarts slipwayd under its pods. A node that could not run them is left as it is.
set -eu
root=$1
here=$(cd "$(dirname "$0")" && pwd)
programs=${here%/*}/bin
bin=/usr/local/bin units=/etc/systemd/system

refuse() { echo "this node is left as it is: $*" >&2; exit 1; }
on_node() { nsenter -t 1 -m -u -i -n "$@"; }

[ -d "$root/run/systemd/system" ] || refuse "its init is not systemd, of which slipwayd is a unit"
# What does not run there, or cannot read what is configured there, does not take the place of what does.
mkdir -p "$root$bin"
trap 'rm -f "$root$bin/slipwayd.try"' EXIT
cp "$programs/slipwayd" "$root$bin/slipwayd.try"
said=$(chroot "$root" "$bin/slipwayd.try" config check 2>&1) || refuse "the new slipwayd cannot run with its configuration: $said"
rm -f "$root$bin/slipwayd.try"
config=$root/etc/slipway/config.toml
[ -e "$config" ] || [ -L "$config" ] || said=$(cat "$here/config.toml")
if [ ! -e "$root/sys/fs/cgroup/cgroup.controllers" ] && printf '%s\n' "$said" | grep -q '^ *cgroup_driver *= *"systemd"'; then
  refuse "its cgroups are version 1, which Slipway does not share with systemd; with runtime.cgroup_driver = \"cgroupfs\" in /etc/slipway/config.toml, and the same for kubelet, it runs there"
fi

CNI=no sh "$here/install.sh" "$programs" "$root" /usr/local /etc "$units"
on_node systemctl daemon-reload
on_node systemctl enable slipwayd.service
# What runs is restarted when it is another, and that is noted only once it was.
noted=$root/var/lib/slipway-node-setup
mkdir -p "${noted%/*}"
new=$(cat "$root$bin/slipwayd" "$root$units/slipwayd.service" | sha256sum)
verb=restart
[ "$(cat "$noted" 2>/dev/null)" != "$new" ] || verb=start
on_node systemctl "$verb" slipwayd.service || {
  on_node journalctl -u slipwayd.service -n 20 --no-pager >&2
  echo "slipwayd is installed, but does not start on this node; its last words are above" >&2
  exit 1
}
echo "$new" > "$noted"
echo "slipwayd is installed and runs ($verb)"
