#!/bin/bash
# Runs in the guest, from the suite's disk: installs what `make install` made, runs the functions that the phase lists, and says on
# the console what became of each: "SUITE ok NAME", or "SUITE failed NAME" after what it said.
cd /suite || exit 1
grep -q slipway-vm /etc/hosts || echo 127.0.1.1 slipway-vm >> /etc/hosts   # sudo, which critest calls, looks it up
phase=$(grep -o 'suite.phase=[a-z]*' /proc/cmdline | cut -d= -f2)
phase=${phase:-$(cat /suite/phase)}
(while sleep 3; do echo "SUITE alive"; done) &
echo "SUITE phase $phase: kernel $(uname -r), systemd $(systemctl --version | awk 'NR==1 {print $2}'), up $(cut -d' ' -f1 /proc/uptime) s; longest: $(systemd-analyze blame | head -4 | awk '{print $2, $1}' | xargs)"
for name in $(cat "/suite/phases/$phase"); do
  began=$(cut -d. -f1 /proc/uptime)
  # A process of its own: -e means nothing in a function that `if` asks for its success.
  if bash -euo pipefail -c 'for f in ./lib.sh ./tests/*.sh; do . "$f"; done; "$1"' - "$name" > "/tmp/$name.out" 2>&1 < /dev/null; then
    echo "SUITE ok $name $(($(cut -d. -f1 /proc/uptime) - began)) s"
  else
    sed 's/^/  | /' "/tmp/$name.out" | tail -60
    [ "$name" = install ] || journalctl -u slipwayd --no-pager -n 25 | sed 's/^/  > /'
    echo "SUITE failed $name $(($(cut -d. -f1 /proc/uptime) - began)) s"
  fi
done
echo "SUITE end"
