# Pods and their limits, devices, ids and confinement on a node as real ones are. Each function is a test, and runs with -e, -u and
# pipefail.

machine() { # what this guest is for
  [ -f /sys/fs/cgroup/cgroup.controllers ] || die "no unified cgroups"
  has "$(cat /sys/fs/cgroup/cgroup.controllers)" memory
  [ "$(cat /sys/module/apparmor/parameters/enabled)" = Y ] || die "AppArmor is off"
  has "$(grep CapEff /proc/self/status)" 1ffffffffff
  has "$(cat /proc/pressure/cpu)" some
  dd if=/dev/zero of=/swap bs=1M count=200 2> /dev/null && chmod 600 /swap && mkswap -q /swap && swapon /swap
}

install() { # exactly what `make install` puts in place
  local file
  cp -a /suite/install/. /
  for file in /usr/local/bin/{slipwayd,slipway,slipway-agent,containerd-shim-slipway-v1,slipway-runc} /etc/slipway/config.toml \
    /etc/cni/net.d/10-slipway.conflist /etc/kubernetes/kubelet.conf.d/20-slipway.conf; do [ -s $file ] || die "no $file"; done
  systemd-analyze verify --recursive-errors=no slipwayd.service slipway-agent.service
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

limits() { # set in the systemd driver's scopes, where they stay when systemd looks at its units again; a container over its memory says so
  local p c out round disk
  p=$(pod limits)
  disk=$(cat /sys/block/vda/dev)
  c=$(run limits "$p" within "sleep 1000" '"resources":{"memory_limit_in_bytes":33554432,"cpu_quota":50000,"cpu_period":100000,"cpu_shares":512,"hugepage_limits":[{"page_size":"2MB","limit":4194304},{"page_size":"1GB","limit":0}],
    "unified":{"memory.high":"max","memory.swap.max":"0","memory.oom.group":"1","pids.max":"77","io.weight":"default 59","io.max":"'"$disk"' wbps=1048576"}}')
  has "$(cat /proc/"$(init_of "$c")"/cgroup)" kubepods-limits.slice
  for round in 1 2; do
    out=$(crictl exec -s "$c" sh -c 'cd /sys/fs/cgroup; grep . memory.max cpu.max cpu.weight memory.swap.max memory.oom.group pids.max io.weight io.max hugetlb.2MB.max')
    for want in "memory.max:33554432" "cpu.max:50000 100000" "cpu.weight:[2-5][0-9]$" "memory.swap.max:0" "memory.oom.group:1" "pids.max:77" "hugetlb.2MB.max:4194304" "io.weight:default 59" "io.max:$disk .*wbps=1048576"; do has "$out" "$want"; done
    systemctl daemon-reload
  done
  c=$(run limits "$p" over "head -c 100000000 /dev/zero | tail" '"resources":{"memory_limit_in_bytes":20971520,"memory_swap_limit_in_bytes":20971520}')
  until_true 60 exited "$c"
  [ "$(field "$c" reason)" = OOMKilled ] || die "$(crictl inspect "$c")"
  remove "$p"
}

resized() { # in place: the process goes on under other limits, which stay
  local p c init out round
  p=$(pod resized)
  c=$(run resized "$p" main "sleep 1000" '"resources":{"memory_limit_in_bytes":33554432,"cpu_quota":50000,"cpu_period":100000}')
  init=$(init_of "$c")
  crictl update --memory 67108864 --cpu-quota 25000 --cpu-period 100000 "$c"
  for round in 1 2; do
    out=$(crictl exec -s "$c" sh -c 'cd /sys/fs/cgroup; grep . memory.max cpu.max')
    has "$out" "memory.max:67108864"
    has "$out" "cpu.max:25000 100000"
    systemctl daemon-reload
  done
  [ "$(init_of "$c")" = "$init" ] && kill -0 "$init" || die "it was started again"
  has "$(field "$c" memoryLimitInBytes)" 67108864
  remove "$p"
}

lowered() { # below what is used: what may be swapped is, and the container goes on; what may not is killed, and says so; nobody waits
  local p c out hold='x=$(yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa | head -c 30000000); touch /full; while sleep 0.3; do :; done; echo ${#x}'
  p=$(pod lowered)
  c=$(run lowered "$p" swaps "$hold" '"resources":{"memory_limit_in_bytes":67108864,"memory_swap_limit_in_bytes":134217728}')
  crictl exec -s "$c" sh -c 'until [ -e /full ]; do sleep 0.1; done'
  crictl update --memory 16777216 "$c"
  until_true 60 eval '[ "$(crictl exec -s '"$c"' cat /sys/fs/cgroup/memory.current)" -le 16777216 ]'
  has "$(crictl exec -s "$c" cat /sys/fs/cgroup/memory.max)" "^16777216$"
  [ "$(field "$c" state)" = CONTAINER_RUNNING ] || die "$(crictl inspect "$c")"
  c=$(run lowered "$p" cannot "$hold" '"resources":{"memory_limit_in_bytes":67108864,"unified":{"memory.swap.max":"0"}}')
  crictl exec -s "$c" sh -c 'until [ -e /full ]; do sleep 0.1; done'
  # Whoever is faster: the answer, or the end that the change has brought about.
  out=$(crictl update --memory 16777216 "$c" 2>&1) || has "$out" "the container has ended"
  until_true 60 exited "$c"
  [ "$(field "$c" reason) $(field "$c" exitCode)" = "OOMKilled 137" ] || die "$(crictl inspect "$c")"
  remove "$p"
}

swap() { # a container swaps as far as it may, and says how much; beyond that it is killed and says so
  local p c n out
  p=$(pod swap)
  c=$(run swap "$p" main 'x=$(yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa | head -c 30000000); touch /full; sleep 1000; echo ${#x}' '"resources":{"memory_limit_in_bytes":25165824,"memory_swap_limit_in_bytes":167772160}')
  out=$(crictl exec -s "$c" sh -c 'until [ -e /full ]; do sleep 0.1; done; cat /sys/fs/cgroup/memory.swap.max')
  has "$out" "^142606336$"
  out=$(crictl stats -o json "$c" | tr -d ' \n')
  has "$out" '"swapUsageBytes":{"value":"[1-9][0-9]\{6,\}"'
  [ "$(field "$c" state)" = CONTAINER_RUNNING ] || die "$(crictl inspect "$c")"
  # One that is killed after a struggle, when its scope may be gone before anybody has looked.
  for n in 1 2 3; do
    c=$(run swap "$p" over$n "exec dd if=/dev/zero of=/dev/null bs=40M" '"resources":{"memory_limit_in_bytes":15728640,"memory_swap_limit_in_bytes":20971520}')
    until_true 60 exited "$c"
    [ "$(field "$c" reason) $(field "$c" exitCode)" = "OOMKilled 137" ] || die "$(crictl inspect "$c")"
  done
  remove "$p"
}

pressure() { # what a throttled container waits for is counted, as kubelet asks for it
  local p c out
  p=$(pod pressure)
  c=$(run pressure "$p" main 'while true; do :; done' '"resources":{"cpu_quota":5000,"cpu_period":100000}')
  until_true 30 eval 'grep -q "some.*total=[1-9]" /proc/'"$(init_of "$c")"'/root/sys/fs/cgroup/cpu.pressure'
  out=$(crictl stats -o json "$c" | tr -d ' \n')
  has "$out" '"cpu":{[^{}]*{[^{}]*},"psi":{"Full":{[^}]*},"Some":{"Total":"[1-9]'
  [ "$(grep -o '"psi":' <<< "$out" | wc -l)" = 3 ] || die "not of cpu, memory and io: $out"
  remove "$p"
}

limits_by_file() { # given by the names of cgroup files they are what they were after an update, and after a reload of systemd
  local p c cg
  p=$(pod byfile)
  c=$(run byfile "$p" main "sleep 1000" '"resources":{"memory_limit_in_bytes":67108864,"unified":{"memory.high":"50331648","memory.swap.max":"1048576","memory.oom.group":"1"}}')
  cg=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/"$(init_of "$c")"/cgroup)
  as_given() { [ "$(cat "$cg"/memory.high) $(cat "$cg"/memory.swap.max) $(cat "$cg"/memory.oom.group)" = "50331648 1048576 1" ]; }
  until_true 10 as_given
  crictl update --memory 58720256 "$c"
  [ "$(cat "$cg"/memory.max)" = 58720256 ] || die "not updated: $(cat "$cg"/memory.max)"
  for round in 1 2; do
    until_true 10 as_given || die "round $round: $(grep . "$cg"/memory.{max,high,swap.max,oom.group})"
    systemctl daemon-reload
    # It answers when it has written what it had to write.
    systemctl is-active -q slipwayd && systemctl is-active -q slipwayd
  done
  until_true 10 as_given
  [ "$(cat "$cg"/memory.max)" = 58720256 ] || die "not kept: $(cat "$cg"/memory.max)"
  remove "$p"
}

what_programs_expect() { # of a sandbox and of a container: spared by the OOM killer, and as many descriptors as is usual
  local p c
  pod_file expect
  sed -i 's/"pid":1/"pid":0/' /tmp/pod-expect.json
  p=$(crictl runp /tmp/pod-expect.json)
  c=$(run expect "$p" main "ulimit -Sn; ulimit -Hn; exec sleep 1000" '"security_context":{"namespace_options":{"network":2,"pid":0}}')
  [ "$(crictl exec -s "$c" cat /proc/1/oom_score_adj)" = -998 ] || die "$(crictl exec -s "$c" cat /proc/1/oom_score_adj)"
  has "$(crictl exec -s "$c" sh -c 'echo $(ulimit -Sn) $(ulimit -Hn)')" "^1024 524288$"
  has "$(echo $(crictl logs "$c"))" "^1024 524288$"
  remove "$p"
}

devices() { # what a CDI file grants opens and nothing else does, by a program in the kernel: also after systemd has looked at every unit again, and after an update
  local p c other round want all='"security_context":{"capabilities":{"add_capabilities":["MKNOD","SYSLOG"]}},"resources":{"memory_limit_in_bytes":67108864}'
  mkdir -p /etc/cdi
  # The kernel's log. Of the others none is among what every container may open, and no other reason makes this error of them.
  cat > /etc/cdi/vm-test.json << 'J'
{"cdiVersion":"0.6.0","kind":"vm.test/dev","devices":[{"name":"log","containerEdits":{"deviceNodes":[{"path":"/dev/granted","type":"c","major":1,"minor":11,"fileMode":438}]}}]}
J
  looks() { # looks ID WANTED...: how opening each ends
    local out c=$1; shift
    out=$(crictl exec -s "$c" sh -c 'cd /tmp; rm -f [0-9]*; for d in 1:11 1:2 10:229; do mknod $d c ${d%:*} ${d#*:}; done
      for d in 1:11 1:2 10:229 /dev/granted /dev/null; do (exec 3< $d) 2> why && echo "$d opens" || echo "$d $(grep -o "not permitted" why)"; done' 2>&1)
    for want in "1:2 not permitted" "10:229 not permitted" "/dev/null opens" "$@"; do has "$out" "^$want$"; done
  }
  p=$(pod devices)
  c=$(CDI=vm.test/dev=log run devices "$p" granted "sleep 1000" "$all")
  other=$(run devices "$p" plain "sleep 1000" "$all")
  for round in begun reloaded updated "reloaded again"; do
    echo "$round"
    looks "$c" "/dev/granted opens" "1:11 opens"
    looks "$other" "1:11 not permitted"
    case $round in
      reloaded) crictl update --memory 58720256 "$c"; crictl update --memory 58720256 "$other" ;;
      *) systemctl daemon-reload ;;
    esac
  done
  rm /etc/cdi/vm-test.json
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
 "linux":{"cgroup_parent":"kubepods-userns.slice","security_context":{"namespace_options":{"network":0,"pid":1,"userns_options":{"mode":0,$m}}}}}
J
  p=$(crictl runp /tmp/pod-userns.json)
  c=$(run userns "$p" main "sleep 1000" '"security_context":{"capabilities":{"add_capabilities":["NET_ADMIN"]},"namespace_options":{"network":0,"pid":1,"userns_options":{"mode":0,'"$m"'}}}')
  has "$(crictl exec -s "$c" cat /proc/self/uid_map)" "200000"
  has "$(crictl exec -s "$c" stat -c '%u %g' /bin/busybox)" "^0 0$"
  has "$(grep Uid: /proc/"$(init_of "$c")"/status)" 200000
  has "$(crictl exec -s "$c" cat /proc/net/dev)" eth0
  crictl exec -s "$c" ip link set lo down || die "it does not own its network"
  remove "$p"
}

shared_pids() { # the pod's own first process is confined and reaps; a container's processes see each other's
  local p c d init out
  pod_file shared; sed -i 's/"pid":1/"pid":0/' /tmp/pod-shared.json
  p=$(crictl runp /tmp/pod-shared.json)
  local shared='"security_context":{"namespace_options":{"network":2,"pid":0}}'
  c=$(run shared "$p" one "sleep 1234" "$shared")
  d=$(run shared "$p" two "sleep 1000" "$shared")
  has "$(crictl exec -s "$d" ps)" "sleep 1234"
  init=$(grep -l . /sys/fs/cgroup/kubepods.slice/kubepods-shared.slice/*/cgroup.procs | wc -l)
  [ "$init" = 3 ] || die "the first process is not in a cgroup of its own: $(grep -r . /sys/fs/cgroup/kubepods.slice/kubepods-shared.slice/*/cgroup.procs)"
  out=$(crictl exec -s "$d" grep -E '^(Uid|CapEff|NoNewPrivs|Seccomp):' /proc/1/status)
  for want in "CapEff:.0000000000000000" "NoNewPrivs:.1" "Seccomp:.2"; do has "$out" "$want"; done
  remove "$p"
}
