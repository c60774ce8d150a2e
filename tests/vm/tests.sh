# The tests of the guest, a function each. They run with -e, -u and pipefail, one after the other.

machine() { # what this guest is for
  [ -f /sys/fs/cgroup/cgroup.controllers ] || die "no unified cgroups"
  has "$(cat /sys/fs/cgroup/cgroup.controllers)" memory
  [ "$(cat /sys/module/apparmor/parameters/enabled)" = Y ] || die "AppArmor is off"
  has "$(grep CapEff /proc/self/status)" 1ffffffffff
}

install() { # exactly what `make install` puts in place
  cp -a /suite/install/. /
  mkdir -p /opt/cni/bin && cp /suite/cni/* /opt/cni/bin/
  printf 'runtime-endpoint: %s\nimage-endpoint: %s\ntimeout: 60\n' $CONTAINER_RUNTIME_ENDPOINT $IMAGE_SERVICE_ENDPOINT > /etc/crictl.yaml
  systemctl daemon-reload
  systemctl enable -q slipwayd
  systemctl start slipwayd
  crictl version
  has "$(crictl version)" slipway
  has "$(systemctl show -p KillMode -p Delegate -p OOMPolicy slipwayd)" KillMode=process
  [ "$(cat /proc/"$(systemctl show -p MainPID --value slipwayd)"/oom_score_adj)" = -999 ] || die "OOM score"
  slipway build -q -t $IMAGE --target busybox /suite/images
}

limits() { # set in the systemd driver's scopes; a container over its memory says so
  local p c out
  p=$(pod limits)
  c=$(run limits "$p" within "sleep 1000" '"resources":{"memory_limit_in_bytes":33554432,"cpu_quota":50000,"cpu_period":100000,"unified":{"memory.high":"max","memory.swap.max":"0"}}')
  out=$(crictl exec -s "$c" cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max)
  has "$out" 33554432
  has "$out" "50000 100000"
  has "$(cat /proc/"$(init_of "$c")"/cgroup)" kubepods-limits.slice
  c=$(run limits "$p" over "head -c 100000000 /dev/zero | tail" '"resources":{"memory_limit_in_bytes":20971520,"memory_swap_limit_in_bytes":20971520}')
  until_true 60 exited "$c"
  [ "$(field "$c" reason)" = OOMKilled ] || die "$(crictl inspect "$c")"
  remove "$p"
}

devices() { # denied by a program in the kernel, and still after systemd has looked at every unit again
  local p c try='mknod /tmp/kmsg c 1 11; cat /tmp/kmsg > /dev/null; echo "kmsg $?"; echo x > /dev/null; echo "null $?"'
  p=$(pod devices)
  c=$(run devices "$p" main "sleep 1000" '"security_context":{"capabilities":{"add_capabilities":["MKNOD"]}}')
  for round in 1 2; do
    out=$(crictl exec -s "$c" sh -c "rm -f /tmp/kmsg; $try" 2>&1)
    has "$out" "kmsg 1"
    has "$out" "null 0"
    has "$out" "Operation not permitted"
    systemctl daemon-reload
  done
  remove "$p"
}

exec_confinement() { # exec is confined as the container's init is
  local p c
  p=$(pod confined)
  c=$(run confined "$p" main "sleep 1000" '"security_context":{"run_as_user":{"value":1000},"no_new_privs":true,"capabilities":{"drop_capabilities":["ALL"]},"seccomp":{"profile_type":0}}')
  out=$(crictl exec -s "$c" sh -c 'id -u; grep -E "^(CapBnd|CapEff|NoNewPrivs|Seccomp):" /proc/self/status; cat /proc/self/cgroup')
  for want in "1000" "CapEff:.0000000000000000" "CapBnd:.0000000000000000" "NoNewPrivs:.1" "Seccomp:.2"; do has "$out" "$want"; done
  remove "$p"
}

user_namespaces() { # root of the container is nobody on the host, and owns its files
  local p c m='"uids":[{"host_id":200000,"container_id":0,"length":65536}],"gids":[{"host_id":200000,"container_id":0,"length":65536}]'
  cat > /tmp/pod-userns.json <<J
{"metadata":{"name":"userns","uid":"uid-userns","namespace":"vm","attempt":0},"log_directory":"/var/log/pods/userns",
 "linux":{"cgroup_parent":"kubepods-userns.slice","security_context":{"namespace_options":{"network":2,"pid":1,"userns_options":{"mode":0,$m}}}}}
J
  p=$(crictl runp /tmp/pod-userns.json)
  c=$(run userns "$p" main "sleep 1000" '"security_context":{"namespace_options":{"network":2,"pid":1,"userns_options":{"mode":0,'"$m"'}}}')
  has "$(crictl exec -s "$c" cat /proc/self/uid_map)" "200000"
  has "$(crictl exec -s "$c" stat -c '%u %g' /bin/busybox)" "^0 0$"
  has "$(grep Uid: /proc/"$(init_of "$c")"/status)" 200000
  remove "$p"
}

apparmor() { # critest's AppArmor specs
  slipway tag $IMAGE registry.k8s.io/e2e-test-images/busybox:1.29-2
  critest -config /etc/crictl.yaml -ginkgo.no-color -ginkgo.focus AppArmor > /tmp/critest.log 2>&1 || true
  line=$(grep -E '(Passed|Failed) \|' /tmp/critest.log | tail -1)
  echo "SUITE critest AppArmor: $line" > /dev/ttyS0
  grep -q "9 Passed | 0 Failed" <<< "$line" || { grep -A12 '\[FAILED\]' /tmp/critest.log | head -40; tail -20 /tmp/critest.log; exit 1; }
}

daemon_killed() { # kill -9: systemd starts it again, and containers never notice
  local p c init before
  p=$(pod killed)
  c=$(run killed "$p" main 'i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done')
  init=$(init_of "$c"); before=$(systemctl show -p MainPID --value slipwayd)
  systemctl kill --kill-whom=main -s KILL slipwayd
  until_true 30 eval "[ \"\$(systemctl show -p MainPID --value slipwayd)\" != $before ] && up"
  [ "$(init_of "$c")" = "$init" ] && kill -0 "$init"
  has "$(crictl exec -s "$c" echo alive)" alive
  [ "$(field "$c" state)" = CONTAINER_RUNNING ]
  awk '$4 != NR - 1 {print "a gap in the log at " NR ": " $0; exit 1}' /var/log/pods/killed/main.log
  remove "$p"
}

restart_and_upgrade() { # systemctl restart, and another slipwayd in place of this one
  local p c init
  p=$(pod restarted)
  c=$(run restarted "$p" main "sleep 1000")
  init=$(init_of "$c")
  systemctl restart slipwayd
  until_true 30 up
  [ "$(init_of "$c")" = "$init" ] && kill -0 "$init"
  # As a package does it: the new file takes the old one's name.
  cp /usr/local/bin/slipwayd /usr/local/bin/slipwayd.new && mv /usr/local/bin/slipwayd.new /usr/local/bin/slipwayd
  systemctl restart slipwayd
  until_true 30 up
  [ "$(init_of "$c")" = "$init" ] && kill -0 "$init"
  has "$(crictl exec -s "$c" echo alive)" alive
  remove "$p"
}

shim_killed() { # the container goes with its shim, is reported, and nothing is left of it
  local p c init shim
  p=$(pod orphan)
  c=$(run orphan "$p" main "sleep 1000")
  init=$(init_of "$c"); shim=$(ps -o ppid= -p "$init" | tr -d ' ')
  kill -9 "$shim"
  until_true 30 exited "$c"
  ! kill -0 "$init" 2>/dev/null || die "the container lives on"
  remove "$p"
  [ "$(systemctl is-active slipwayd)" = active ]
  left=$(find /sys/fs/cgroup -name "*${c:0:12}*")
  [ -z "$left" ] || die "left: $left"
}

builds() { # from a service's cgroup, which has processes itself; the result runs at once
  local p c
  printf 'FROM %s\nRUN id -u > /id && cat /proc/self/cgroup\n' $IMAGE > /tmp/Dockerfile
  slipway build --progress plain --network none -t slipway.test/built:1 -f /tmp/Dockerfile /suite/empty
  p=$(pod built)
  c=$(IMAGE=slipway.test/built:1 run built "$p" main "cat /id")
  until_true 30 exited "$c"
  [ "$(field "$c" exitCode)" = 0 ] || die "$(crictl logs "$c" 2>&1)"
  remove "$p"
}

work_until_cut() { # builds, pods and removals without end: the harness cuts the power somewhere in it
  local n=0 p
  echo "SUITE working" > /dev/ttyS0
  while true; do
    n=$((n + 1))
    printf 'FROM %s\nRUN dd if=/dev/urandom of=/big bs=1M count=8 2>/dev/null && echo %s > /n\n' $IMAGE $n > /tmp/Dockerfile
    slipway build -q --no-cache --network none -t slipway.test/cut:$n -f /tmp/Dockerfile /suite/empty
    p=$(pod cut$n); run cut$n "$p" main$n "sleep 1000" > /dev/null
    [ $((n % 2)) = 0 ] || remove "$p"
    echo "SUITE worked $n" > /dev/ttyS0
  done
}

after_the_cut() { # every image that is listed runs and has what its layers say; the old pods are gone, and nothing else is left
  cp -a /suite/install/. / && systemctl daemon-reload
  until_true 60 up
  local i n=0 p
  for i in $(slipway images -q | sort -u); do
    slipway save -o /tmp/image.tar "$i"   # reads every layer
    rm -f /tmp/image.tar; n=$((n + 1))
  done
  [ $n -gt 0 ] || die "no image is left"
  [ -z "$(crictl ps -q)" ] || die "a container of before runs: $(crictl ps)"
  for p in $(crictl pods -q); do remove "$p"; done
  p=$(pod again)
  for i in $(slipway images | awk '$1 ~ /cut/ {print $1 ":" $2}' | tail -2); do
    IMAGE=$i
    c=$(run again "$p" "m$(tr -dc a-z0-9 <<< "$i")" "stat -c %s /big && cat /n")
    until_true 60 exited "$c"
    [ "$(field "$c" exitCode)" = 0 ] || die "$i: $(crictl logs "$c" 2>&1)"
    has "$(crictl logs "$c" 2>&1)" 8388608
  done
  remove "$p"
  [ -z "$(find /var/lib/slipway/content/ingest -type f 2>/dev/null)" ] || die "ingests are left: $(ls /var/lib/slipway/content/ingest)"
  ! grep -q /run/slipway/pods /proc/mounts || die "mounts are left: $(grep slipway /proc/mounts)"
  echo "SUITE $n images verified after the cut" > /dev/ttyS0
}
