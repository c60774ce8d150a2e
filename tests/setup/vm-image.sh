#!/usr/bin/env bash
# The guest of the vm suite: Debian 13 with its cloud kernel, systemd, unified cgroups and AppArmor, as a disk image with kernel
# and initrd beside it. Made once, without booting anything; the suite boots overlays of it.
. "$(dirname "$0")/lib.sh"
apt_install qemu-system-x86 qemu-utils mmdebstrap e2fsprogs
dir=$SLIPWAY_CACHE/vm

make_guest() {
  local want; want=$(sha256sum < "$0")
  [ "$(cat "$dir/made" 2>/dev/null)" = "$want" ] && return
  say "making a Debian 13 guest (once)"
  rm -rf "$dir"; mkdir -p "$dir"
  # The mirror of this machine's own packages; its key is Debian's, which every release carries.
  local mirror
  mirror=$(package_sources | xargs -r awk '/^URIs:/ {print $2; exit} /^deb / {for (i = 2; i <= NF; i++) if ($i ~ /^http/) {print $i; exit}}' | head -1)
  [ -n "$mirror" ] || die "no package sources found in /etc/apt"
  mmdebstrap --quiet --variant=minbase \
    --include=linux-image-cloud-amd64,systemd,systemd-sysv,dbus,udev,kmod,apparmor,sudo,iproute2,iptables,nftables,util-linux,procps,e2fsprogs,busybox-static,ca-certificates,curl \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    trixie "$dir/root.tar" "deb $mirror trixie main" > "$dir/log" 2>&1 ||
    { tail -20 "$dir/log" >&2; die "making the guest failed"; }
  mkdir "$dir/root"
  tar -C "$dir/root" -xf "$dir/root.tar"
  ( cd "$dir/root"
    echo slipway-vm > etc/hostname
    : > etc/fstab
    rm -f etc/resolv.conf; echo nameserver 127.0.0.1 > etc/resolv.conf
    # Nothing that waits, asks or writes to the console: that is the suite's.
    ln -sf /dev/null etc/systemd/system/serial-getty@ttyS0.service
    ln -sf /dev/null etc/systemd/system/systemd-networkd-wait-online.service
    ln -sf /dev/null etc/systemd/system/apt-daily.timer
    ln -sf /dev/null etc/systemd/system/apt-daily-upgrade.timer
    ln -sf /dev/null etc/systemd/system/e2scrub_reap.service
    # Of AppArmor what policies are made of, and none of the hundred that confine desktops: compiling them is half of a boot.
    find etc/apparmor.d -maxdepth 1 -type f -delete
    # The suite's disk carries what to do; without one the guest ends.
    mkdir -p suite
    cat > etc/systemd/system/suite.service <<'U'
[Unit]
Description=What the disk of the suite says
After=multi-user.target
[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
ExecStartPre=/bin/mount /dev/vdb /suite
ExecStart=/bin/bash /suite/run.sh
ExecStopPost=/bin/sync
ExecStopPost=/sbin/poweroff -f
TimeoutStartSec=infinity
U
    mkdir -p etc/systemd/system/multi-user.target.wants
    cat > etc/systemd/system/suite.timer <<'U'
[Timer]
OnBootSec=1
[Install]
WantedBy=multi-user.target
U
    ln -sf ../suite.timer etc/systemd/system/multi-user.target.wants/suite.timer )
  cp "$dir"/root/boot/vmlinuz-* "$dir/vmlinuz"
  cp "$dir"/root/boot/initrd.img-* "$dir/initrd.img"
  mkfs.ext4 -q -d "$dir/root" "$dir/root.ext4" 3G
  rm -rf "$dir/root" "$dir/root.tar"
  echo "$want" > "$dir/made"
}
with_lock vm make_guest
