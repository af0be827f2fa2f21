#!/usr/bin/env python3
"""Writes jmp_deploy/schedules/*.json: steps, and the accuracy that benchmarks/results/ has of them.

    python benchmarks/photos.py artifacts/unseen --part test ... -o benchmarks/results/photos-test
    python benchmarks/accuracy.py --part test ... -o benchmarks/results/accuracy-test
    python scripts/publish_schedules.py

A schedule of JMP that both results hold is published as MODEL-PERCENT; nothing is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHORT = "dinov2_s"
WEIGHTS = "the DINOv2 ViT-S/14 weights of scripts/demo_weights.py"


def files(results: Path) -> dict[str, dict[str, Any]]:
    """The content of each file, by name."""
    photos = json.loads((results / "photos-test.json").read_text(encoding="utf-8"))
    probes = json.loads((results / "accuracy-test.json").read_text(encoding="utf-8"))
    judged = {
        row["budget"]: row for row in probes["rows"] if row["method"] == "jmp" and "digits" in row
    }
    count, dense = photos["sets"]["photos"], probes["dense_gmacs"]
    found = {}
    for row in photos["rows"]:
        probe = judged.get(row["budget"])
        if row["method"] != "jmp" or probe is None or probe["schedule"] != row["schedule"]:
            continue
        error, points = row["photos"], probe["digits"]["accuracy"]
        found[f"{SHORT}-{row['budget'] * 100:.0f}"] = {
            "model": photos["model"],
            "patches": photos["patches"],
            "steps": row["schedule"],
            **row["manner"],
            "measured": {
                "weights": WEIGHTS,
                "commit": photos["machine"]["commit"],
                "gmacs": row["share"] * dense,
                "dense_gmacs": dense,
                "cosine": {
                    "on": f"{count['pictures']} photos that chose nothing",
                    "value": 1 - error["mean"] / 1e4,
                    "low": 1 - error["high"] / 1e4,
                    "high": 1 - error["low"] / 1e4,
                },
                "probe": {
                    "on": f"{probe['digits']['n']:,} digits (linear probe)",
                    "value": points["difference"],
                    "low": points["low"],
                    "high": points["high"],
                },
            },
        }
    return found


def main() -> int:
    """The command line; returns the exit code."""
    from jmp_deploy.core.files import write_json
    from jmp_deploy.jmp.schedule import PUBLISHED

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    for name, content in files(parser.parse_args().results).items():
        write_json(PUBLISHED / f"{name}.json", content)
        print(f"written    {PUBLISHED / name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
