#!/usr/bin/env bash
# Opens a plugin that was compiled for a Jetson (`plugin build --for thor|orin`) under qemu-user, and
# asks it for its creators. Not part of the tests: needs aarch64-linux-gnu-g++ and qemu-aarch64(-static).
#
#   scripts/aarch64_check.sh LIBRARY
#
# JMP_AARCH64_ROOT: the folder of the target's lib/ (/usr/aarch64-linux-gnu, of Debian and Ubuntu).
set -euo pipefail
library=$(realpath "${1:?usage: scripts/aarch64_check.sh LIBRARY}")
root=${JMP_AARCH64_ROOT:-/usr/aarch64-linux-gnu}
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || {
  echo "no qemu-aarch64: apt install qemu-user-static" >&2
  exit 2
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/open.cpp" <<'END'
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  using Getter = void* const* (*)(int32_t&);
  int32_t count = 0;
  void* const* creators = reinterpret_cast<Getter>(dlsym(library, "getCreators"))(count);
  std::printf("opened on aarch64: %d creators\n", count);
  bool const good = count == 2 && creators[0] != nullptr && creators[1] != nullptr;
  return dlclose(library) == 0 && good ? 0 : 1;
}
END
aarch64-linux-gnu-g++ -std=c++17 "$folder/open.cpp" -ldl -o "$folder/open"
"$qemu" -L "$root" "$folder/open" "$library"
glibc=$(grep -aoE 'GLIBC_2\.[0-9]+' "$library" | sort -uV | tail -n 1)
echo "newest glibc that it asks for: $glibc (Ubuntu 22.04, JetPack 6, has 2.35)"
