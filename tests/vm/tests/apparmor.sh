# AppArmor: the runtime's own profile for containers that name none, and those that containers name.

confined() { # confined CONTAINER LABEL: its init and an exec both run under it
  has "$(cat /proc/"$(init_of "$1")"/attr/apparmor/current)" "^$2"
  has "$(crictl exec -s "$1" cat /proc/self/attr/apparmor/current)" "^$2"
}

default_profile() { # confines, lets work what must work, and comes back when somebody unloads it
  local p c out
  p=$(pod armored)
  c=$(run armored "$p" plain "trap 'exit 9' TERM; while true; do sleep 0.5; done" '"security_context":{"capabilities":{"add_capabilities":["SYS_ADMIN"]}}')
  confined "$c" "slipway-default (enforce)"
  out=$(crictl exec -s "$c" sh -c '
    mkdir /m; mount -t tmpfs x /m && echo mounted
    syslogd -O /log; logger -t said over a unix socket
    sleep 100 & kill $! && wait $!; echo "killed $?"
    echo mine > /proc/$$/comm && cat /proc/$$/comm
    echo 1000000 > /proc/sys/kernel/shmmax && cat /proc/sys/kernel/shmmax
    sleep 1; cat /log' 2>&1 || true)
  has "$out" "Permission denied"
  has_not "$out" "^mounted"
  has "$out" "over a unix socket"
  has "$out" "killed 143"
  has "$out" "^mine$"
  has "$out" "^1000000$"
  out=$(crictl exec -s "$c" sh -c 'for f in sysrq-trigger sys/kernel/core_pattern sys/net/ipv4/ip_forward irq/default_smp_affinity; do echo x > /proc/$f; done; cat /proc/kcore' 2>&1 || true)
  [ "$(grep -o "Permission denied" <<< "$out" | wc -l)" = 5 ] || die "$out"
  crictl stop -t 20 "$c" > /dev/null
  [ "$(field "$c" exitCode)" = 9 ] || die "the signal did not reach it: $(field "$c" exitCode)"
  apparmor_parser --remove <(echo 'profile slipway-default {}')
  ! grep -q slipway-default /sys/kernel/security/apparmor/profiles
  c=$(run armored "$p" again "sleep 1000")
  confined "$c" "slipway-default (enforce)"
  c=$(run armored "$p" asked "sleep 1000" '"security_context":{"apparmor":{"profile_type":0}}')
  confined "$c" "slipway-default (enforce)"
  c=$(run armored "$p" free "sleep 1000" '"security_context":{"apparmor":{"profile_type":1},"capabilities":{"add_capabilities":["SYS_ADMIN"]}}')
  confined "$c" unconfined
  crictl exec -s "$c" mount -t tmpfs x /tmp
  # One that nobody loaded is refused, by its name.
  echo '{"metadata":{"name":"none"},"image":{"image":"'$IMAGE'"},"command":["true"],"linux":{"security_context":{"apparmor":{"profile_type":2,"localhost_ref":"localhost/nobodys"}}}}' > /tmp/none.json
  out=$(crictl create "$p" /tmp/none.json /tmp/pod-armored.json 2>&1) && die "created: $out"
  has "$out" 'nobodys.* is not loaded'
  remove "$p"
}
