#!/usr/bin/env bash
# Makes this bundle run on this Jetson: JetPack 6.1 or newer. No PyTorch, and nothing outside this
# folder but pip's cache. Can be run again; arguments go to `run`. Afterwards: ./jmp run artifact PHOTO
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { # die MESSAGE HINT
  printf 'error: %s\n  %s\n' "$1" "$2" >&2
  exit 2
}

sha256sum --quiet -c SHA256SUMS || die "this bundle is not whole" "copy it again"
[ "$(uname -m)" = aarch64 ] || echo "warning: this is $(uname -m), not a Jetson" >&2
python3 -c 'import tensorrt as t; raise SystemExit(int(t.__version__.split(".")[0]) < 10)' 2>/dev/null ||
  die "$(python3 -V 2>&1) sees no TensorRT 10 or newer" \
    "JetPack 6.1 and newer have it: sudo apt-get install python3-libnvinfer (JetPack's own python3)"
[ -d wheel ] || die "this bundle was made without jmp_deploy" "make it again without --no-wheel"

# The release of Jetson Linux says which CUDA its driver takes: 36 is JetPack 6, 38 and 39 are 7.
release=$(sed -n 's/^# R\([0-9]*\).*/\1/p' /etc/nv_tegra_release 2>/dev/null || true)
cuda=13 extra=runtime
[ "${release:-38}" -ge 38 ] || cuda=12 extra=runtime-cu12

echo "1/5 environment"
# --system-site-packages: it sees JetPack's TensorRT. --clear: without pip it is half made.
.venv/bin/python -m pip --version >/dev/null 2>&1 ||
  python3 -m venv --clear --system-site-packages .venv ||
  die "python3 cannot make a virtual environment" "sudo apt-get install python3-venv"
for wheel in wheel/*.whl; do
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${wheel}[$extra]"
done

library=plugin/cuda$cuda/libjmp_deploy_plugin.so
{
  echo '#!/usr/bin/env bash'
  echo '# jmp_deploy as install.sh has set it up: ./jmp run artifact photo.png'
  echo 'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)'
  echo 'export JMP_DEPLOY_CACHE="$here/.cache"'
  [ ! -f "$library" ] || echo "export JMP_DEPLOY_PLUGIN=\"\$here/$library\""
  echo 'exec "$here/.venv/bin/python" -m jmp_deploy "$@"'
} >jmp
chmod +x jmp

echo "2/5 plugin"
if [ -f "$library" ]; then
  echo "$library, compiled before"
elif [ -d plugin ]; then
  ./jmp plugin build
fi

echo "3/5 engine, for this device and its TensorRT"
./jmp run artifact photo.png --rebuild "$@"

echo "4/5 check against PyTorch's outputs in reference.npz"
./jmp compare artifact --backends torch,engine

echo "5/5 speed"
nvpmodel -q 2>/dev/null || true
echo "not the fastest mode, or idling clocks? sudo nvpmodel -m 0 && sudo jetson_clocks"
./jmp bench artifact -b 1
