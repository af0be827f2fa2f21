"""Published schedules: what the benchmarks measured, for the very model and size."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from jmp_deploy.core.errors import ScheduleError
from jmp_deploy.jmp import published, schedule

ROOT = Path(__file__).parents[2]
DINOV2_S = schedule.ModelShape(
    name="vit_small_patch14_dinov2",
    depth=12,
    width=384,
    num_prefix=1,
    num_patches=256,
    attn_dim=384,
    head_dim=64,
    attn_weights=4 * 384 * 384,
    mlp_weights=8 * 384 * 384,
    stem_macs=256 * 14 * 14 * 3 * 384,
    head_macs=0,
    has_class_token=True,
    qkv_weights=3 * 384 * 384,
    head_reads_prefix_only=True,
)


def test_files_are_what_the_results_say():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "scripts/publish_schedules.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.files(ROOT / "benchmarks" / "results")
    assert sorted(made) == schedule.published() != []
    for name, content in made.items():
        written = json.loads((schedule.PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
        assert written == json.loads(json.dumps(content))


@pytest.mark.parametrize("name", schedule.published())
def test_a_published_schedule_is_that_of_its_share_and_costs_what_it_says(name):
    found, same = (
        schedule.parse(name, DINOV2_S),
        schedule.parse(name.replace("dinov2_s-", "spread:"), DINOV2_S),
    )
    assert replace(found, name=same.name) == same
    figures = published.measured(name)
    assert schedule.macs(DINOV2_S, found) == pytest.approx(figures.gmacs * 1e9)
    assert schedule.macs(DINOV2_S) == pytest.approx(figures.dense_gmacs * 1e9)
    for figure in (figures.cosine, figures.probe):
        assert figure.low <= figure.value <= figure.high
    schedule.check_spelling(name)


def test_expected_accuracy_is_said_of_the_very_schedule_alone():
    spread = schedule.parse("spread:62", DINOV2_S)
    words = published.expected(spread, DINOV2_S)
    assert "photos that chose nothing" in words and "points" in words
    assert published.expected(schedule.parse("dinov2_s-62", DINOV2_S), DINOV2_S) == words
    assert published.expected(replace(spread, tau=0.9), DINOV2_S) == ""
    assert published.expected(replace(spread, merge_weight=1.0), DINOV2_S) == ""
    assert published.expected(schedule.parse("spread:61", DINOV2_S), DINOV2_S) == ""
    other = replace(DINOV2_S, name="vit_small_patch14_reg4_dinov2")
    assert published.expected(spread, other) == ""


def test_a_schedule_for_another_image_size_is_refused():
    larger = replace(DINOV2_S, num_patches=1369)
    with pytest.raises(ScheduleError, match="for 256 patches, the image has 1369"):
        schedule.parse("dinov2_s-62", larger)
    assert published.expected(schedule.parse("spread:62", larger), larger) == ""


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ScheduleError) as error:
        schedule.check_spelling("dinov2_s-61")
    assert "dinov2_s-62" in error.value.hint
