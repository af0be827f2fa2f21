#!/usr/bin/env bash
# Everything about the kernel that needs a GPU: tests against the oracle, compute-sanitizer, and the
# benchmarks of the reduction alone and of whole models (benchmarks/README.md).
#
#   scripts/gpu_check.sh            a few models and rows: some four minutes
#   scripts/gpu_check.sh --full     all rows of both benchmarks: most of an hour
#
# Results go to ${OUT:-benchmarks/results}: gpu_check_<GPU>.json, kernel-<GPU>.*, endtoend-<GPU>.*
#
# For a bare CUDA machine: nvcc, python3 with numpy, torch, timm, pytest and hypothesis. No network,
# no TensorRT, nothing to install. Exit codes: 0 all good, 1 a check failed, 2 it cannot run here.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU 0'; then
  echo "gpu_check: no NVIDIA GPU on this machine (nvidia-smi lists none); nothing was checked" >&2
  exit 2
fi
if ! command -v nvcc >/dev/null && [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  export PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"
fi
if ! command -v nvcc >/dev/null; then
  echo "gpu_check: nvcc is not on PATH; set CUDA_HOME" >&2
  exit 2
fi
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import numpy, torch, timm, pytest, hypothesis' 2>/dev/null; then
  echo "gpu_check: $PYTHON lacks one of numpy, torch, timm, pytest, hypothesis; set PYTHON" >&2
  exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" scripts/gpu_check.py "$@"
