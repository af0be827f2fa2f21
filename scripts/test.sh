#!/usr/bin/env bash
# The whole test suite on any machine with Python 3.10-3.13 and a C++ compiler:
#
#   scripts/test.sh                       all of it
#   scripts/test.sh -k schedule           arguments go to pytest
#
# Style, types, the plugin's sources with warnings as errors, then pytest. Every step runs, whatever
# the others said; the exit code is 0 only if all passed. Tests that need a GPU are skipped where
# there is none.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT" || exit 2

echo "jmp_deploy tests: environment"
jmp_env export,rtx,nvcc,runtime,dev
BIN="$VENV/bin"
# Each without what it depends on, which is not needed here, or not everywhere to be had. Where one is
# not to be had either, a test says that it is skipped, or mypy knows a little less.
alone() { # alone "what for" NAME==VERSION: into .venv
  "$PYTHON" -c 'import importlib.metadata as m, sys; m.version(sys.argv[1])' "${2%%==*}" 2>/dev/null ||
    jmp_step "$1" "$PYTHON" -m pip install --no-deps "$2"
}
lean_runtime() { # lean_runtime VERSION: a real TensorRT of 45 MB, for the plugin to register with
  local folder="$ROOT/build/lean/$1" packages=(tensorrt-lean-cu13-{libs,bindings}"==$1")
  [[ -d "$folder" ]] || { rm -rf "$folder.new" && jmp_step "lean runtime of TensorRT $1" \
    "$PYTHON" -m pip install --no-deps --target "$folder.new" "${packages[@]}" &&
    mv "$folder.new" "$folder"; }
}
alone "tensorrt-stubs, for mypy" tensorrt-stubs==10.13.0.35.1
alone "tritonclient, for the proto of Triton's configuration" tritonclient==2.73.0
lean_runtime 10.16.1.11
lean_runtime 11.4.0.106

failed=()
check() { # check NAME COMMAND...
  jmp_step "$@" || failed+=("$1")
}

# Needs no TensorRT, only its headers. One architecture on each side of every switch in the sources;
# all of them are scripts/ptxas_check.py's.
compile_plugin() {
  local build="$ROOT/build/plugin-werror" nvcc headers
  { read -r nvcc && read -r headers; } < <("$PYTHON" - <<'END'
from jmp_deploy.plugin.toolchain import find_toolchain

found = find_toolchain()
print(found.nvcc, found.headers, sep="\n")
END
  ) || return 1
  rm -rf "$build"
  export PATH="$BIN:$PATH"
  cmake -S "$ROOT/plugins" -B "$build" -G Ninja -DJMP_WERROR=ON \
    -DCMAKE_CUDA_ARCHITECTURES="75-real;87-real;90-real;120" \
    -DCMAKE_CUDA_COMPILER="$nvcc" -DTENSORRT_INCLUDE_DIR="$headers" &&
    cmake --build "$build"
}

echo "jmp_deploy tests: sources"
check "ruff check" "$BIN/ruff" check .
check "ruff format" "$BIN/ruff" format --check .
check "mypy" "$BIN/mypy" jmp_deploy
check "plugin, warnings as errors" compile_plugin

echo "jmp_deploy tests: pytest"
# a file to a worker, so that its fixtures are made once
"$PYTHON" -m pytest -n 2 --dist loadfile "$@" </dev/null || failed+=("pytest")

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
  exit 1
fi
