#!/usr/bin/env bash
# From nothing to an engine with JMP in it, on any Linux machine, with a GPU or without:
#
#   scripts/quickstart.sh
#
# Real weights (DINOv2 ViT-S/14), real photos; everything it makes lies under artifacts/. The first
# run installs PyTorch and TensorRT-RTX into .venv (some GB); after that it takes a few minutes at
# most and can be repeated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

ARTIFACT=artifacts/dinov2_s
WEIGHTS=artifacts/weights/dinov2_s.safetensors
PHOTOS=artifacts/photos

headline() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

headline "1. environment"
jmp_env export,rtx,nvcc
jmp() { "$PYTHON" -m jmp_deploy "$@"; }

headline "2. weights: DINOv2 ViT-S/14"
if [[ -s "$WEIGHTS" ]]; then
  echo "$WEIGHTS is there from an earlier run"
else
  "$PYTHON" scripts/demo_weights.py "$WEIGHTS"
fi

headline "3. photos: those that scikit-image and scikit-learn ship"
"$PYTHON" - "$PHOTOS" <<'END'
import pathlib
import sys

from jmp_deploy.core.images import sample_photos

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for name, image in sample_photos():
    image.save(folder / f"{name}.png")
    print(f"{folder / name}.png  {image.width} x {image.height}")
END

headline "4. build: JMP, FP16, plugin, engine"
jmp build dinov2_s --weights "$WEIGHTS" --precision fp16 -o "$ARTIFACT"

headline "5. compare: does it compute what PyTorch computes?"
agreed=0
jmp compare "$ARTIFACT" --json "$ARTIFACT.compare.json" || agreed=$?
((agreed <= 1)) || exit "$agreed" # 1: outside the tolerances, which the table below repeats

headline "6. run: features of the photos"
jmp run "$ARTIFACT" "$PHOTOS"/*.png --json "$ARTIFACT.run.json"

headline "7. what came out"
jmp report "$ARTIFACT" --compare "$ARTIFACT.compare.json"
echo
echo "next: .venv/bin/python -m jmp_deploy --help"
exit "$agreed"
