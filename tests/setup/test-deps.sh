#!/usr/bin/env bash
# What `make test` needs beside `make run`: a real registry, busybox for small images, and (from their Go modules,
# built once and cached) crictl, containerd with runc, and current CNI plugins.
. "$(dirname "$0")/lib.sh"
apt_install containernetworking-plugins iptables iproute2 mmdebstrap docker-registry busybox-static e2fsprogs \
  apache2-utils curl jq openssl libseccomp-dev gcc musl-tools pkg-config
with_lock go-tools "$(dirname "$0")/go-tools.sh" crictl critest containerd runc cni etcd kubernetes
"$(dirname "$0")/lab-rootfs.sh"
"$(dirname "$0")/base-image.sh"
"$(dirname "$0")/vm-image.sh"
