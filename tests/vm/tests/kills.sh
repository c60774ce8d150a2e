# What must not harm a running pod, and what becomes of one whose shim is gone.
COUNT='i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done'

same() { # same CONTAINER INIT POD: still that process, alive, and not a line of its log is missing
  [ "$(init_of "$1")" = "$2" ] && kill -0 "$2" || die "the container's process was $2: $(crictl inspect "$1")"
  has "$(crictl exec -s "$1" echo alive)" alive
  [ "$(field "$1" state)" = CONTAINER_RUNNING ]
  awk '$4 != NR - 1 {print "a gap in the log at " NR ": " $0; exit 1}' "/var/log/pods/$3/main.log"
}
gone() { # gone CONTAINER INIT: neither processes nor cgroups
  ! kill -0 "$2" 2>/dev/null || die "the container lives on"
  local left; left=$(find /sys/fs/cgroup -name "*${1:0:12}*")
  [ -z "$left" ] || die "left: $left"
}
main_pid() { systemctl show -p MainPID --value slipwayd; }
another_main() { [ "$(main_pid)" != 0 ] && [ "$(main_pid)" != "$1" ] && up; }

daemon_killed() { # kill -9: systemd starts it again, and containers never notice
  local p c init before
  p=$(pod killed)
  c=$(run killed "$p" main "$COUNT")
  init=$(init_of "$c"); before=$(main_pid)
  systemctl kill --kill-whom=main -s KILL slipwayd
  until_true 30 eval "! kill -0 $before 2>/dev/null"
  crictl version # is not turned away: systemd has kept the socket
  until_true 30 another_main "$before"
  same "$c" "$init" killed
  remove "$p"
}

restarted() { # systemctl restart: the next slipwayd finds what the last one left; nobody is turned away, also once the socket's file was lost
  local p c init i round
  p=$(pod restarted)
  c=$(run restarted "$p" main "$COUNT")
  init=$(init_of "$c")
  for round in 1 2; do
    systemctl --no-block restart slipwayd
    for i in 1 2 3 4 5 6; do crictl version; sleep 0.3; done
    until_true 30 up
    [ "$(systemctl show -p NFileDescriptorStore --value slipwayd)" = 1 ] || die "$(systemctl status slipwayd)"
    [ $round = 2 ] || { rm /run/slipway/slipwayd.sock; systemctl restart slipwayd; }
  done
  has_not "$(journalctl -b --no-pager -o cat _PID=1)" "Cannot store more fds"
  same "$c" "$init" restarted
  remove "$p"
}

upgraded() { # another version's programs in place of these, as a package does it; then the older again, when the new one's pods are gone
  local p c init old quick ended program
  p=$(pod upgraded)
  c=$(run upgraded "$p" main "$COUNT")
  quick=$(run upgraded "$p" quick "until [ -e /stop ]; do sleep 0.2; done; exit 7")
  init=$(init_of "$c"); ended=$(init_of "$quick")
  old=$(crictl version)
  has_not "$old" 99.1.0
  systemctl stop slipwayd
  touch "/proc/$ended/root/stop"
  until_true 30 eval "! kill -0 $ended 2>/dev/null"
  for program in slipwayd slipway containerd-shim-slipway-v1 slipway-runc; do
    cp /usr/local/bin/$program /usr/local/bin/$program.new && mv /usr/local/bin/$program.new /usr/local/bin/$program
  done
  drop_in 'Environment="SLIPWAY_AS_VERSION=99.1.0/99"'
  systemctl start slipwayd
  until_true 30 up
  has "$(crictl version)" 99.1.0
  same "$c" "$init" upgraded
  until_true 10 exited "$quick"
  [ "$(field "$quick" exitCode)" = 7 ] || die "$(crictl inspect "$quick")"
  # The older one's pod takes the newer one's containers; pods of its own have the newer shim.
  has "$(crictl exec -s "$(run upgraded "$p" added "sleep 1000")" echo alive)" alive
  remove "$p"
  p=$(pod newer)
  has "$(crictl exec -s "$(run newer "$p" main "sleep 1000")" echo alive)" alive
  remove "$p"
  no_drop_in
  systemctl restart slipwayd
  until_true 30 up
  [ "$(crictl version)" = "$old" ] || die "$(crictl version)"
}

shim_killed() { # the container goes with its shim, is reported, and nothing is left of it
  local p c init
  p=$(pod orphan)
  c=$(run orphan "$p" main "sleep 1000")
  init=$(init_of "$c")
  kill -9 "$(shim_of "$init")"
  until_true 30 exited "$c"
  gone "$c" "$init"
  remove "$p"
  [ "$(systemctl is-active slipwayd)" = active ]
}

shim_out_of_memory() { # the kernel's OOM killer takes a shim: its pod is told of, other pods and slipwayd go on
  local p c q d init other shim before
  p=$(pod starved); c=$(run starved "$p" main "sleep 1000")
  q=$(pod spared); d=$(run spared "$q" main "$COUNT")
  init=$(init_of "$c"); other=$(init_of "$d"); shim=$(shim_of "$init"); before=$(main_pid)
  # The killer itself, told whom to prefer: what a node short of memory does, at a time of our choosing.
  echo 1000 > "/proc/$shim/oom_score_adj"
  echo f > /proc/sysrq-trigger
  until_true 30 exited "$c"
  has "$(dmesg)" "Out of memory: Killed process $shim "
  gone "$c" "$init"
  # systemd counts it as the unit's, which stays up all the same.
  [ "$(systemctl is-active slipwayd)" = active ] && [ "$(main_pid)" = "$before" ] || die "$(systemctl status slipwayd)"
  same "$d" "$other" spared
  remove "$p"; remove "$q"
}
