# A kubelet without an API server, with the snippet that `make install` left, and systemd's logind beside it.

node_shutdown() { # the node is told to power off: its pods get their SIGTERM and their time first
  mkdir -p /etc/kubernetes/manifests /run/polite
  cat > /etc/kubernetes/kubelet.yaml <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
enableServer: false
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
staticPodPath: /etc/kubernetes/manifests
shutdownGracePeriod: 40s
shutdownGracePeriodCriticalPods: 10s
failSwapOn: false
makeIPTablesUtilChains: false
C
  cat > /etc/kubernetes/manifests/polite.yaml <<P
apiVersion: v1
kind: Pod
metadata: {name: polite, namespace: default}
spec:
  hostNetwork: true
  containers:
  - name: main
    image: $IMAGE
    imagePullPolicy: Never
    securityContext: {privileged: true}
    command: [sh, -c, "trap 'sleep 2; echo SUITE the pod has said goodbye > /dev/ttyS0; exit 0' TERM; touch /run/polite/up; while true; do sleep 0.2; done"]
    volumeMounts: [{name: run, mountPath: /run/polite}]
  volumes: [{name: run, hostPath: {path: /run/polite}}]
P
  systemctl is-active -q systemd-logind || systemctl start systemd-logind
  systemd-run -q --unit kubelet /suite/bin/kubelet --config /etc/kubernetes/kubelet.yaml --config-dir /etc/kubernetes/kubelet.conf.d
  until_true 90 test -e /run/polite/up || { journalctl -u kubelet --no-pager -o cat -n 40; return 1; }
  until_true 30 eval 'systemd-inhibit --list --no-legend | grep -q kubelet' || { journalctl -u kubelet --no-pager -o cat -n 40; return 1; }
  has "$(cat /proc/"$(pgrep -f 'has said goodbye' | head -1)"/cgroup)" "kubepods.slice/.*slipway-"
  say "the node is to power off"
  systemctl poweroff
  sleep infinity
}
