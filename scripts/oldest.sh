#!/usr/bin/env bash
# Tries the lower bounds of pyproject.toml: the oldest versions that the extras export and runtime
# allow, in an environment of their own, imported, and a small model built and compared with them.
#
#   scripts/oldest.sh [FOLDER]          FOLDER: of the environment, made anew (a temporary one)
#
# JMP_PYTHON names the Python (default: uv's choice of 3.10, the oldest that we support).
# Needs uv (pip install uv), the network and 7 GB: PyTorch brings its CUDA libraries. The packages
# come from where uv is configured to look. What is tested all the time is constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV="$(command -v uv)" || { echo "error: no uv on PATH; mend it: pip install uv" >&2; exit 2; }
work="$(mktemp -d "${TMPDIR:-/tmp}/jmp_oldest.XXXXXX")"
trap 'rm -rf "$work"' EXIT
venv="${1:-$work/venv}"
# Anything but an environment of Python's stays as it is: uv refuses to clear it by itself.
[[ ! -e "$venv" || -f "$venv/pyvenv.cfg" ]] || {
  echo "error: $venv is there and is no virtual environment; mend it: name another folder" >&2
  exit 2
}

"$UV" venv --quiet --clear --python "${JMP_PYTHON:-3.10}" "$venv"
python="$venv/bin/python"
"$UV" pip install --quiet --python "$python" --resolution lowest-direct -r pyproject.toml \
  --extra export --extra runtime
"$UV" pip list --python "$python"
"$python" scripts/try_imports.py export,runtime
export PYTHONPATH="$PWD"
for precision in fp32 fp16; do
  "$python" -m jmp_deploy build test_vit --weights random --precision "$precision" \
    --engine none --inline --batch 1,2,4 -o "$work/$precision"
done
"$python" -m jmp_deploy compare "$work/fp16" --backends torch,onnxruntime
echo "the oldest versions that pyproject.toml allows build a model ($("$python" --version))"
