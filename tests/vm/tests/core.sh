# Pods and their limits, devices, ids and confinement on a node as real ones are. Each function is a test, and runs with -e, -u and
# pipefail.

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
