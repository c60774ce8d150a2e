# Power cuts: the harness kills the machine when these say so, and boots it again from the same disk.
REGISTRY=127.0.0.1:5000
STORE=/var/lib/slipway
RESERVED=/var/lib/cni/networks/slipway

registry() { # what was pushed into it was synced before anything is cut
  systemctl is-active -q registry || systemd-run -q --unit registry -E OTEL_TRACES_EXPORTER=none /suite/images/docker-registry serve /suite/images/registry.yml
  until_true 60 curl -sfo /dev/null http://$REGISTRY/v2/
}

# dockerfile WHAT: of two layers, each of which says by itself whether it is whole.
dockerfile() {
  echo "FROM $IMAGE"
  local layer
  for layer in 1 2; do
    echo "RUN mkdir /l$layer && cd /l$layer && dd if=/dev/urandom of=big bs=1M count=3 2> /dev/null && for i in \$(seq 200); do echo $1 \$i > f\$i; done && sha256sum * > /sums$layer"
  done
}
# made NAME: such an image, built anew.
made() {
  dockerfile "$1" > "/tmp/Dockerfile-${1//[^a-z0-9]/-}"
  slipway build -q --no-cache --network none -t "$1" -f "/tmp/Dockerfile-${1//[^a-z0-9]/-}" /suite/empty > /dev/null
}
CHECK='for n in 1 2; do cd /l$n && sha256sum -c ../sums$n > /tmp/sums || { grep -v OK /tmp/sums; exit 1; }; done; echo whole'

before_the_cuts() { # what each cut must leave as it is
  registry
  local n
  for n in 1 2; do
    made $REGISTRY/pulled:$n
    slipway push -q $REGISTRY/pulled:$n > /dev/null
    slipway rmi $REGISTRY/pulled:$n > /dev/null
  done
  slipway prune > /dev/null
  made slipway.test/kept:1
  crictl pull $REGISTRY/pulled:1 > /dev/null
  slipway images > /var/lib/kept-images
  sync
}

at() { journalctl -u slipwayd --no-pager -o cat | grep -q "failpoint passed name=\"$1\""; }
stopped() { [ "$(ps -o stat= -p "$1" | cut -c1)" = T ]; }

half_way() { # a pull, a build's commit, a pod's and a container's start, each held in its middle
  local whole building wait='=sleep:3600000*1'
  export NETWORK=0
  whole=$(pod whole); run whole "$whole" main "sleep 1000" > /dev/null
  # What a cut may leave of an address: nobody has synced what is in the file, or the record of the pod.
  : > $RESERVED/10.88.9.1; printf 'unknown\r\neth0' > $RESERVED/10.88.9.2; sync -f $RESERVED
  drop_in "Environment=\"SLIPWAY_FAILPOINTS=pull_image.before_commit$wait;run_pod_sandbox.after_cni$wait;create_container.after_create$wait\"" \
    ExecStart= "ExecStart=/usr/local/bin/slipwayd --log-level info,slipwayd::fail=debug"
  systemctl restart slipwayd
  until_true 30 up
  crictl --timeout 3600s pull $REGISTRY/pulled:2 &
  pod_file half; crictl --timeout 3600s runp /tmp/pod-half.json &
  container_file whole "$whole" half "sleep 1000"
  crictl --timeout 3600s create "$whole" /tmp/container-half.json /tmp/pod-whole.json &
  dockerfile half > /tmp/Dockerfile-half
  SLIPWAY_STORE_FAILPOINT=commit.before_sync=stop slipway build -q --no-cache --network none -t slipway.test/half:1 -f /tmp/Dockerfile-half /suite/empty &
  building=$!
  until_true 120 at pull_image.before_commit
  until_true 120 at run_pod_sandbox.after_cni
  until_true 120 at create_container.after_create
  until_true 120 stopped $building
  say "ready for the cut"
  sleep infinity
}

work_pull() { crictl pull $REGISTRY/pulled:2; slipway rmi $REGISTRY/pulled:2; }
work_build() { made slipway.test/cut:"$1"; }
work_pod() { local p; p=$(pod "cut$1"); run "cut$1" "$p" "main$1" "sleep 1000"; [ $(($1 % 2)) = 0 ] || remove "$p"; }
again_and_again() { # again_and_again WHAT: until the cut
  local n=0
  trap '{ tail -5 /tmp/work-$1; echo "SUITE failed work_$1 $n"; } > /dev/ttyS0' EXIT
  while true; do n=$((n + 1)); "work_$1" $n > "/tmp/work-$1" 2>&1; touch "/tmp/worked-$1"; done
}
each_worked() { [ -e /tmp/worked-pull ] && [ -e /tmp/worked-build ] && [ -e /tmp/worked-pod ]; }

work() { # pulls, builds and pods at once, without end: the cut comes wherever it comes
  export NETWORK=0
  registry
  again_and_again pull & again_and_again build & again_and_again pod &
  until_true 240 each_worked
  say "ready for the cut"
  sleep infinity
}

names() { awk '$1 ~ /^[a-z0-9.:]+\// {print $1 ":" $2}' "$@"; }
layers_verify() { # every layer on disk is what was made
  local sums n=0
  for sums in $STORE/snapshots/*/fs/sums[12]; do
    (cd "${sums%/*}/l${sums: -1}" && sha256sum --quiet -c "$sums") || die "$sums"
    n=$((n + 1))
  done
  say "$n layers verified"
}
runs_whole() { # runs_whole POD-ID IMAGE: its files are what their sums say, also from within
  local c
  c=$(IMAGE=$2 run again "$1" "m$(tr -dc a-z0-9 <<< "$2")" "$CHECK")
  until_true 120 exited "$c"
  [ "$(field "$c" exitCode)" = 0 ] || die "$2: $(crictl logs "$c" 2>&1)"
}
left_below() { find "$@" -mindepth 1 2>/dev/null; }

after_the_cut() { # what was finished is whole, what was not is gone, and all of it can be done again
  export NETWORK=0
  until_true 60 up
  local name p n
  slipway images > /tmp/images
  for name in $(names /var/lib/kept-images); do has "$(names /tmp/images)" "^$name\$"; done
  layers_verify
  for name in $(names /tmp/images); do slipway save -o /dev/null "$name"; done # reads every blob
  # The pods of before are told of as not ready; none of their processes, cgroups, addresses or mounts is there.
  until_true 60 test -e /run/slipway/addresses
  say "$(journalctl -b -u slipwayd --no-pager -o cat | grep -m1 'let go of addresses' || echo "no address was lost")"
  [ -z "$(crictl ps -q)" ] || die "a container of before runs: $(crictl ps)"
  has_not "$(crictl pods)" " Ready "
  ! pgrep -f containerd-shim-slipway || die "a shim is left: $(pgrep -af containerd-shim-slipway)"
  for p in $(crictl pods -q); do crictl rmp "$p" > /dev/null; done
  nothing_is_left
  # Again, and to the end.
  registry
  crictl pull $REGISTRY/pulled:2 > /dev/null
  made slipway.test/half:1
  p=$(pod again)
  for name in $REGISTRY/pulled:1 $REGISTRY/pulled:2 slipway.test/kept:1 slipway.test/half:1 $(names /tmp/images | grep /cut: | tail -1); do runs_whole "$p" "$name"; done
  remove "$p"
  slipway rmi $REGISTRY/pulled:2 > /dev/null
  nothing_is_left
}

left_of_pods() { # and half-made blobs
  left_below $STORE/content/ingest /run/slipway/pods /run/slipway/containers /run/slipway/builds
  find /var/lib/cni -name '10.88.*'
  grep -h /run/slipway/ /proc/mounts
  find /sys/fs/cgroup -name 'slipway-*.scope' -o -name 'kubepods-*'
  ip -br link show type veth
}
nothing_is_left() { # what takes long after a start is finished beside serving
  until_true 60 eval '[ -z "$(left_of_pods)" ]' || die "left: $(left_of_pods)"
}

the_store_empties() { # nothing is held by what no longer exists
  local name
  for name in $(names <(slipway images)); do slipway rmi "$name" > /dev/null; done
  slipway prune > /dev/null
  [ -z "$(slipway images -q)" ] || die "$(slipway images)"
  [ -z "$(ls $STORE/snapshots $STORE/content/sha256 | grep -v :)" ] || die "left: $(ls $STORE/snapshots $STORE/content/sha256)"
}
