#!/usr/bin/env bash
# Makes this bundle run on this Jetson: JetPack 6.1 or newer. No PyTorch, nothing outside this folder
# but pip's cache. Can be run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

sha256sum --quiet -c SHA256SUMS
[ "$(uname -m)" = aarch64 ] || echo "warning: this is $(uname -m), not a Jetson" >&2
python3 -c 'import tensorrt' 2>/dev/null || {
  echo "error: this Python has no TensorRT: sudo apt-get install python3-libnvinfer" >&2
  exit 2
}

# The release of Jetson Linux says which CUDA its driver takes: 36 is JetPack 6, 38 and 39 are 7.
release=$(sed -n 's/^# R\([0-9]*\).*/\1/p' /etc/nv_tegra_release 2>/dev/null || true)
extra=runtime
[ "${release:-38}" -ge 38 ] || extra=runtime-cu12

echo "1/5 environment"
[ -x .venv/bin/python ] || python3 -m venv --system-site-packages .venv # sees JetPack's TensorRT
for wheel in wheel/*.whl; do
  .venv/bin/python -m pip install --quiet "$wheel[$extra]"
done
jmp() { .venv/bin/python -m jmp_deploy "$@"; }

echo "2/5 plugin"
library=plugin/libjmp_deploy_plugin.so
# A library of CUDA 13 does not start on the driver of JetPack 6.
if [ -f "$library" ] && ! { [ "$extra" = runtime-cu12 ] &&
  grep -q '"cuda": "13' "${library%.so}.json"; }; then
  export JMP_DEPLOY_PLUGIN="$PWD/$library"
elif [ -d plugin ]; then
  jmp plugin build
fi

echo "3/5 engine, for this device and its TensorRT"
jmp run artifact photo.png --rebuild "$@"

echo "4/5 check against PyTorch's outputs in reference.npz"
jmp compare artifact --backends torch,engine

echo "5/5 speed"
nvpmodel -q 2>/dev/null || true
echo "not the fastest mode, or idling clocks? sudo nvpmodel -m 0 && sudo jetson_clocks"
jmp bench artifact -b 1
