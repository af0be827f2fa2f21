#!/usr/bin/env bash
# Runs a command in a small Debian of aarch64 under qemu-user: what a Jetson's bundle does as far as
# it goes without a GPU. Not part of the tests: needs root, debootstrap, a Linux from 6.7 on and a
# static qemu-aarch64 (8 or newer: 7.2 crashes in onnxruntime). Nothing on this machine is changed:
# qemu is registered in a namespace of the command's own.
#
#   scripts/aarch64_run.sh ROOT COMMAND...      ROOT: a folder, made anew if it is not there
#   cp -r bundles/deit_s-jetson ROOT/root/b; scripts/aarch64_run.sh ROOT bash /root/b/install.sh
#
# JMP_QEMU: that qemu (qemu-aarch64-static). JMP_SUITE: of Debian (trixie: Python 3.13, glibc 2.41).
set -euo pipefail
root=$(realpath -m "${1:?usage: scripts/aarch64_run.sh ROOT COMMAND...}")
shift
qemu=$(realpath "$(command -v "${JMP_QEMU:-qemu-aarch64-static}")") || {
  echo "no qemu-aarch64-static: apt install qemu-user-static" >&2
  exit 2
}
if [ ! -d "$root" ]; then
  # Unpacked, and nothing is configured: that would take half an hour in an emulator.
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,python3-venv,libgomp1 \
    "${JMP_SUITE:-trixie}" "$root.new" >&2
  for package in "$root.new"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root.new"; done
  rm -rf "$root.new/proc" && mkdir -p "$root.new/proc" "$root.new/etc/ssl/certs"
  cp -L /etc/resolv.conf "$root.new/etc/"
  cp -L /etc/ssl/certs/ca-certificates.crt "$root.new/etc/ssl/certs/"
  mv "$root.new" "$root"
fi
ready=$(mktemp -u)
mkfifo "$ready"
trap 'rm -f "$ready"' EXIT
# shellcheck disable=SC2016  # expanded by the inner shell
unshare --user --mount bash -c '
  set -e
  read -r _ <"$1"
  mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
  # e_machine of an ELF header, at byte 18: 183 is aarch64; F: qemu is opened now, outside of the root
  printf "%s" ":aarch64:M:18:\xb7\x00::$3:F" >/proc/sys/fs/binfmt_misc/register
  mount --rbind /dev "$2/dev"
  mount --rbind /proc "$2/proc"
  root=$2 && shift 3
  exec setpriv --reuid 0 --regid 0 --clear-groups chroot "$root" /usr/bin/env -i HOME=/root \
    LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$@"
' "$0" "$ready" "$root" "$qemu" "$@" <&0 &
child=$!
sleep 0.2 # until it has its namespace
for map in uid_map gid_map; do echo "0 0 65536" >"/proc/$child/$map"; done
echo >"$ready"
wait "$child"
