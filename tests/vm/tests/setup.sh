# The DaemonSet that sets a node up (manifests/base), its pod as it is: by a kubelet whose runtime is another, onto this machine and its systemd.

OTHER=/run/other
other() { crictl -c $OTHER/crictl.yaml -r unix://$OTHER/state/slipwayd.sock "$@"; }

# set_up NAME TAG: the DaemonSet's pod, of that image.
set_up() {
  sed "s#slipway.local/node:1#slipway.local/node:$2#g; s/NAME/$1/" /suite/set-up.json > /etc/kubernetes/set-up/pod.json
}
# What kubelet has of a pod's container: its log.
set_up_log() { cat /var/log/pods/default_"$1"-slipway-vm_*/"$2"/*.log 2> /dev/null; }
set_up_done() { ls /var/log/pods/default_"$1"-slipway-vm_*/done/*.log > /dev/null 2>&1; }
wait_set_up() {
  until_true 120 set_up_done "$1" || { set_up_log "$1" install; journalctl -u kubelet --no-pager -o cat -n 30; return 1; }
  has "$(set_up_log "$1" install)" "slipwayd is installed and runs ($2)"
}
refused_for() { set_up_log "$1" install | grep -q "$2"; }
main_pid() { systemctl show -p MainPID --value slipwayd; }

node_set_up() { # from nothing, again, to another version under a pod, and not at all where it could not run
  local file tree=/suite/install first p c init
  mkdir -p $OTHER/state /var/lib/other /etc/kubernetes/set-up /opt/cni/bin /var/tmp/node
  cp /suite/cni/* /opt/cni/bin/
  echo 'timeout: 60' | tee $OTHER/crictl.yaml > /etc/crictl.yaml
  printf 'root = "/var/lib/other"\nstate = "%s/state"\n[runtime]\ncgroup_driver = "systemd"\ncgroup_root = "other.slice"\n[network]\nconf_dir = "%s/etc/cni/net.d"\n' \
    $OTHER $tree > $OTHER/config.toml
  systemd-run -q --unit other -p KillMode=process -p Delegate=yes $tree/usr/local/bin/slipwayd --config $OTHER/config.toml
  (
    export SLIPWAY_ROOT=/var/lib/other SLIPWAY_STATE=$OTHER/state PATH=$tree/usr/local/bin:$PATH
    cp -r $tree/usr/local/bin /suite/node /var/tmp/node/
    slipway build -q -t slipway.local/tools:1 --target busybox /suite/images
    slipway build -q -t slipway.local/node:1 --build-arg BASE=slipway.local/tools:1 -f /suite/node.Dockerfile /var/tmp/node
    printf 'FROM slipway.local/node:1\nRUN printf 2 >> /slipway/bin/slipwayd\n' > /tmp/second
    slipway build -q --network none -t slipway.local/node:2 -f /tmp/second /suite/empty
    rm -r /var/tmp/node
  )
  cat > /etc/kubernetes/set-up.yaml <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
enableServer: false
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
staticPodPath: /etc/kubernetes/set-up
containerRuntimeEndpoint: unix://$OTHER/state/slipwayd.sock
cgroupDriver: systemd
failSwapOn: false
makeIPTablesUtilChains: false
C
  until_true 30 test -S $OTHER/state/slipwayd.sock
  set_up first 1
  systemd-run -q --unit kubelet /suite/bin/kubelet --config /etc/kubernetes/set-up.yaml --node-labels slipway.dev/install=true
  wait_set_up first restart
  for file in $(cd $tree && find . -type f ! -name '*.service' ! -name '*.conflist'); do
    cmp "$tree/$file" "/$file"
    [ "$(stat -c %a "/$file")" = "$(stat -c %a "$tree/$file")" ] || die "the mode of $file"
  done
  for file in slipwayd slipway-agent; do cmp $tree/usr/local/lib/systemd/system/$file.service /etc/systemd/system/$file.service; done
  [ ! -e /etc/cni/net.d ] || die "a network beside the cluster's"
  systemd-analyze verify --recursive-errors=no slipwayd.service slipway-agent.service
  [ "$(systemctl is-enabled slipwayd) $(systemctl is-active slipwayd)" = "enabled active" ] || die "$(systemctl status slipwayd)"
  has "$(crictl version)" slipway
  first=$(main_pid)

  slipway build -q -t $IMAGE --target busybox /suite/images
  p=$(pod under)
  c=$(run under "$p" main "sleep 1000")
  init=$(init_of "$c")
  set_up again 1
  wait_set_up again start
  [ "$(main_pid)" = "$first" ] || die "slipwayd was restarted for nothing"

  set_up newer 2
  wait_set_up newer restart
  [ "$(stat -c %s /usr/local/bin/slipwayd)" = $(($(stat -c %s $tree/usr/local/bin/slipwayd) + 1)) ] || die "the program is the old one"
  [ "$(main_pid)" != "$first" ] || die "the old program runs"
  first=$(main_pid)
  has "$(crictl exec -s "$c" echo alive)" alive
  [ "$(init_of "$c")" = "$init" ] || die "the container is another one"

  echo 'no_such_key = 1' > /etc/slipway/config.toml
  set_up refused 1
  until_true 120 refused_for refused no_such_key || { set_up_log refused install; journalctl -u kubelet --no-pager -o cat -n 30; return 1; }
  refused_for refused 'this node is left as it is' || die "$(set_up_log refused install)"
  [ "$(main_pid) $(systemctl is-active slipwayd)" = "$first active" ] || die "a refused version stopped the one that ran"
  [ "$(stat -c %s /usr/local/bin/slipwayd)" = $(($(stat -c %s $tree/usr/local/bin/slipwayd) + 1)) ] || die "a refused version was installed"

  rm /etc/kubernetes/set-up/pod.json
  systemctl stop kubelet
  other rmp -fa > /dev/null
  remove "$p"
  # Kubelet's slices; one that is to come makes its own.
  systemctl stop kubepods.slice
  systemctl stop other
  systemctl disable -q --now slipwayd
  rm -r /etc/systemd/system/{slipwayd,slipway-agent}.service /etc/slipway /etc/kubernetes/kubelet.conf.d /usr/local/bin/{slipway*,containerd-shim-slipway-v1}
  rm -r /var/lib/{slipway,slipway-node-setup,other} /run/slipway $OTHER
  systemctl daemon-reload
}
