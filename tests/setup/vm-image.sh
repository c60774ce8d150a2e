#!/usr/bin/env bash
# The guest of the vm suite: Debian 13 with its cloud kernel, systemd, unified cgroups and AppArmor, as a disk image with kernel and
# initrd beside it, and the machine as it is after its first boot, from which the suite's guests go on. Made once.
. "$(dirname "$0")/lib.sh"
apt_install qemu-system-x86 qemu-utils mmdebstrap e2fsprogs
dir=$SLIPWAY_CACHE/vm

# One processor: QEMU before 8.1 reads the code that it translates before it locks the page, so that another processor's patching of
# it may be missed for good. The kernel patches itself when it finds its clock unsteady, which it does when the machine is busy, and
# then ran into half a jump (in sched_clock_idle_wakeup_event).
# -icount: the guest's clock counts its instructions, a nanosecond each, and goes by the real one only while it idles. So nothing in
# it is late when the machine is busy, and every limit of time in there means what it means on a node.
MACHINE="-M q35 -accel tcg,tb-size=256 -cpu max,la57=off -smp 1 -icount shift=0,sleep=on -m 2048 -display none -no-reboot -nic none"
KERNEL="console=ttyS0 root=/dev/vda rw quiet systemd.show_status=0 apparmor=1 security=apparmor psi=1 swapaccount=1 mitigations=off tsc=reliable no_timer_check"
# As large as the suite's disk (tests/harness/vm.rs).
SUITE_DISK=900M

make_guest() {
  local want; want=$(cat "$0" <(qemu-system-x86_64 --version) | sha256sum)
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
    local unit
    for unit in dpkg-db-backup.timer fstrim.timer e2scrub_all.timer systemd-pstore.service ldconfig.service; do ln -sf /dev/null etc/systemd/system/$unit; done
    # The suite's disk carries what to do. Where it is blank the machine is one that is kept: it waits for a disk that is not.
    mkdir -p suite usr/local/sbin
    cat > usr/local/sbin/suite <<'S'
#!/bin/bash
blank() { [ "$(dd if=/dev/vdb iflag=direct bs=4096 count=1 2> /dev/null | od -An -tx1 -j1080 -N2)" != " 53 ef" ]; }
if blank; then
  sync
  echo "SUITE ready to be kept"
  while blank; do sleep 1; done
  blockdev --flushbufs /dev/vdb
  kept=1
fi
mount -o ro /dev/vdb /suite
[ -z "${kept:-}" ] || date -s "@$(cat /suite/now)" > /dev/null
exec bash /suite/run.sh
S
    chmod 755 usr/local/sbin/suite
    cat > etc/systemd/system/suite.service <<'U'
[Unit]
Description=What the disk of the suite says
After=multi-user.target
[Service]
Type=oneshot
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
ExecStart=/usr/local/sbin/suite
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
  echo "$MACHINE" > "$dir/machine"
  echo "$KERNEL" > "$dir/kernel"
  echo "$SUITE_DISK" > "$dir/suite-size"
  keep_booted
  echo "$want" > "$dir/made"
}

# Boots the guest with a blank disk, and keeps the machine as it is when it asks for that: root.ext4 is its disk from then on.
keep_booted() {
  say "booting it (once)"
  truncate -s "$SUITE_DISK" "$dir/blank"
  mkfifo "$dir/monitor"
  # shellcheck disable=SC2086
  qemu-system-x86_64 $MACHINE -serial "file:$dir/console" -monitor stdio -kernel "$dir/vmlinuz" -initrd "$dir/initrd.img" -append "$KERNEL" \
    -drive "file=$dir/root.ext4,format=raw,if=virtio,cache=unsafe" -drive "file=$dir/blank,format=raw,if=virtio,readonly=on" \
    < "$dir/monitor" > "$dir/monitor.log" 2>&1 &
  local guest=$! end=$((SECONDS + 1200))
  # shellcheck disable=SC2064
  trap "kill -9 $guest 2> /dev/null || true" EXIT
  exec 8> "$dir/monitor"
  rm "$dir/monitor"
  until grep -qa 'ready to be kept' "$dir/console" 2> /dev/null; do
    if ! kill -0 $guest 2> /dev/null || [ $SECONDS -ge $end ]; then
      tail -20 "$dir/console" "$dir/monitor.log" >&2
      die "the guest does not boot"
    fi
    sleep 1
  done
  # It answers the second when it has done the first.
  printf 'migrate "exec:cat > %s/kept"\nquit\n' "$dir" >&8
  exec 8>&-
  wait $guest || die "the guest's state could not be kept: $(tail -5 "$dir/monitor.log")"
  [ -s "$dir/kept" ] || die "the guest's state could not be kept: $(tail -5 "$dir/monitor.log")"
  trap - EXIT
  rm "$dir/blank"
}
with_lock vm make_guest
