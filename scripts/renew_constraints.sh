#!/usr/bin/env bash
# Renews constraints.txt, the set of versions that is tested together:
#
#   1. another PyTorch: edit the pair below (its releases say which torchvision goes with which torch)
#   2. scripts/renew_constraints.sh     newest of all else, for Python 3.10-3.13, Linux
#   3. scripts/test.sh                  on each Python that is at hand (JMP_PYTHON); then commit
#
# Needs uv (pip install uv), and the network. The packages come from where uv is configured to look;
# nothing of that is written down.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One release of PyTorch with wheels for every supported Python.
PAIR=(torch==2.14.1 torchvision==0.29.1)
# Not tensorrt and the -cu12 extras: which TensorRT and which CUDA fit is the device's to say.
EXTRAS=(export rtx nvcc runtime plot dev)

UV="$(command -v uv)" || { echo "error: no uv on PATH; mend it: pip install uv" >&2; exit 2; }
new="$(mktemp)"
trap 'rm -f "$new" "$new.pair"' EXIT
printf '%s\n' "${PAIR[@]}" >"$new.pair"
{
  echo "# Versions that are tested together; pip and uv: install ... -c constraints.txt"
  echo "# Written by scripts/renew_constraints.sh, which says how to renew them."
  # --universal: one file with markers where Pythons differ. uv without our pyproject's extras, such
  # as cuda-toolkit[nvcc]: pip allows none in constraints.
  "$UV" pip compile --quiet pyproject.toml "${EXTRAS[@]/#/--extra=}" --constraints "$new.pair" \
    --universal --python-version 3.10 --upgrade --strip-extras --no-annotate --no-header \
    --no-emit-index-url --no-emit-find-links
} >"$new"
cat "$new" >constraints.txt
git --no-pager diff --stat -- constraints.txt
