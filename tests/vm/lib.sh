# What the guest's tests share: crictl, pods from a few words, waiting.
export PATH=/usr/local/bin:/suite/bin:$PATH
export CONTAINER_RUNTIME_ENDPOINT=unix:///run/slipway/slipwayd.sock IMAGE_SERVICE_ENDPOINT=unix:///run/slipway/slipwayd.sock
IMAGE=slipway.test/busybox:1

die() { echo "$*" >&2; exit 1; }
say() { echo "SUITE $*" > /dev/ttyS0; }
has() { grep -q -- "$2" <<< "$1" || die "no $2 in: $1"; }
has_not() { ! grep -q -- "$2" <<< "$1" || die "$2 in: $1"; }
until_true() { # until_true SECONDS COMMAND...
  local end=$(($(cut -d. -f1 /proc/uptime) + $1)); shift
  until "$@"; do [ "$(cut -d. -f1 /proc/uptime)" -lt $end ] || { echo "not within time: $*" >&2; return 1; }; sleep 0.5; done
}

# pod NAME [JSON of linux.security_context]: a sandbox below a slice of its own; prints its id. NETWORK=0: with a network of its own.
pod() {
  pod_file "$@"
  crictl runp "/tmp/pod-$1.json"
}
pod_file() {
  cat > /tmp/pod-$1.json <<J
{"metadata":{"name":"$1","uid":"uid-$1","namespace":"vm","attempt":0},"log_directory":"/var/log/pods/$1",
 "linux":{"cgroup_parent":"kubepods-$1.slice","security_context":{"namespace_options":{"network":${NETWORK:-2},"pid":1}${2:+,$2}}}}
J
}
# run POD-NAME POD-ID NAME SCRIPT [JSON of linux]: a running container; prints its id. CDI=NAME: with that device.
run() {
  local id
  container_file "$@"
  id=$(crictl create "$2" /tmp/container-$3.json /tmp/pod-$1.json)
  crictl start "$id" > /dev/null
  echo "$id"
}
container_file() {
  local script annotation=; script=$(sed 's/\\/\\\\/g; s/"/\\"/g' <<< "$4")
  [ -z "${CDI:-}" ] || annotation='"cdi.k8s.io/vm":"'$CDI'"'
  cat > /tmp/container-$3.json <<J
{"metadata":{"name":"$3","attempt":0},"image":{"image":"$IMAGE"},"command":["sh","-c","$script"],"log_path":"$3.log","linux":{${5:-}},"annotations":{$annotation}}
J
}
field() { crictl inspect -o json "$1" | tr -d ' \n' | grep -o "\"$2\":[^,}]*" | head -1 | cut -d: -f2- | tr -d '"'; }
exited() { [ "$(field "$1" state)" = CONTAINER_EXITED ]; }
init_of() { crictl inspect -o json "$1" | grep -oE '"pid": ?[0-9]+' | head -1 | grep -oE '[0-9]+'; } # of namespaces there are "pid"s too
remove() { crictl stopp "$1" > /dev/null; crictl rmp "$1" > /dev/null; }
shim_of() { ps -o ppid= -p "$1" | tr -d ' '; }
up() { crictl version > /dev/null 2>&1; }
# drop_in LINE...: changes slipwayd's unit until no_drop_in, or the next boot.
drop_in() { mkdir -p /run/systemd/system/slipwayd.service.d; printf '%s\n' '[Service]' "$@" > /run/systemd/system/slipwayd.service.d/suite.conf; systemctl daemon-reload; }
no_drop_in() { rm -r /run/systemd/system/slipwayd.service.d; systemctl daemon-reload; }
