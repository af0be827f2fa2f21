"""Schedules as users write them, and what they cost."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from jmp_deploy.core.errors import ScheduleError
from jmp_deploy.core.manifest import Jmp
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.schedule import ModelShape

DEIT_S = ModelShape(
    name="deit_small_patch16_224",
    depth=12,
    width=384,
    num_prefix=1,
    num_patches=196,
    attn_dim=384,
    head_dim=64,
    attn_weights=384 * 384 * 4,
    mlp_weights=384 * 1536 * 2,
    stem_macs=196 * 384 * 768,
    head_macs=384 * 1000,
    has_class_token=True,
)


def test_paper_schedule_is_the_published_one():
    assert schedule.parse("paper", DEIT_S).steps == ((3, 138), (6, 97), (9, 68))
    assert schedule.macs(DEIT_S) == pytest.approx(4.599e9, rel=1e-3)
    assert schedule.macs(DEIT_S, schedule.paper(DEIT_S)) == pytest.approx(2.998e9, rel=1e-3)


def test_spread_costs_no_more_than_paper_in_equal_steps():
    steps = schedule.parse("spread", DEIT_S).steps
    assert [block for block, _ in steps] == list(range(2, 11))
    counts = [196, *(keep for _, keep in steps)]
    assert len({a - b for a, b in pairwise(counts)}) == 1
    cost = schedule.macs(DEIT_S, schedule.spread(DEIT_S))
    paper = schedule.macs(DEIT_S, schedule.paper(DEIT_S))
    assert 0.97 * paper < cost <= paper


SAVING = ModelShape(
    **{**vars(DEIT_S), "qkv_weights": 384 * 384 * 3, "head_reads_prefix_only": True}
)


@pytest.mark.parametrize("shape", [DEIT_S, SAVING])
@pytest.mark.parametrize("percent", ["75", "62.5", "50", "40%"])
def test_spread_meets_a_budget_closely(shape, percent):
    found = schedule.parse(f"spread:{percent}", shape)
    assert {block for block, _ in found.steps} <= set(range(2, 11))
    share = schedule.macs(shape, found) / schedule.macs(shape)
    wanted = float(percent.strip("%")) / 100
    assert wanted - 0.02 < share <= wanted


def test_spread_leaves_the_last_blocks_something_to_work_with():
    steps = [196, *(keep for _, keep in schedule.parse("spread:75", DEIT_S).steps)]
    gaps = [a - b for a, b in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1  # even
    steps = [196, *(keep for _, keep in schedule.parse("spread:45", DEIT_S).steps)]
    rates = [b / a for a, b in pairwise(steps)]
    assert max(rates) - min(rates) < 0.03  # the same share in every block


def test_a_share_that_cannot_be_met_is_refused():
    with pytest.raises(ScheduleError, match="comes down to 10%"):
        schedule.parse("spread:10", DEIT_S)


def test_the_last_block_buys_tokens_for_the_others():
    plain, saving = (schedule.for_share(shape, 0.6) for shape in (DEIT_S, SAVING))
    assert all(b > a for (_, a), (_, b) in zip(plain.steps, saving.steps, strict=True))
    assert saving.last_prefix_only and not plain.last_prefix_only


def test_paper_costs_what_was_published_whatever_the_head_reads():
    steps = schedule.parse("paper", SAVING)
    assert not steps.last_prefix_only and steps.selection == "importance"
    assert schedule.macs(SAVING, steps) == pytest.approx(2.998e9, rel=2e-4)
    for spelling in ("3:138,6:97,9:68", "keep rate"):
        if spelling == "keep rate":
            same = schedule.keep_rate(0.7, [3, 6, 9], SAVING)
        else:
            same = schedule.parse(spelling, SAVING)
        assert schedule.macs(SAVING, same) == schedule.macs(SAVING, steps)
    better = schedule.improved(steps, SAVING)
    assert better.steps == steps.steps and better.selection == "distinct"
    assert schedule.macs(SAVING, better) < 0.98 * schedule.macs(SAVING, steps)


def test_an_artifact_gives_its_schedule_back():
    for spec in ("paper", "spread", "spread:50", "3:138"):
        steps = schedule.parse(spec, SAVING)
        jmp = Jmp(
            steps.name,
            steps.steps,
            selection=steps.selection,
            last_prefix_only=steps.last_prefix_only,
            tau=steps.tau,
            merge_weight=steps.merge_weight,
        )
        assert schedule.from_manifest(jmp) == steps


def test_a_schedule_file_says_how(tmp_path):
    path = tmp_path / "s.json"
    extra = {"selection": "distinct", "last_prefix_only": True, "tau": 0.9, "merge_weight": 0.5}
    path.write_text(json.dumps({"steps": [[3, 100]], **extra}))
    steps = schedule.load(path, SAVING)
    assert steps.selection == "distinct" and steps.last_prefix_only
    assert (steps.tau, steps.merge_weight) == (0.9, 0.5)
    with pytest.raises(ScheduleError, match="reads patch tokens"):
        schedule.load(path, DEIT_S)
    path.write_text(json.dumps({"steps": [[3, 100]], "selection": "best"}))
    with pytest.raises(ScheduleError, match=r"not a schedule file: .*selection"):
        schedule.load(path, SAVING)
    for odd, where in (
        ({"tau": "high"}, "tau"),
        ({"tau": float("nan")}, "invalid character"),
        ({"merge_weight": 1.5}, "merge_weight"),
    ):
        path.write_text(json.dumps({"steps": [[3, 100]], **odd}))
        with pytest.raises(ScheduleError, match=f"not a schedule file: .*{where}"):
            schedule.load(path, SAVING)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("3:138,6:97,9:68", ((3, 138), (6, 97), (9, 68))),
        ("9:68,3:138", ((3, 138), (9, 68))),
        ("3:196,6:97", ((6, 97),)),  # keeping all is no reduction
        ("r20@9-11", ((9, 176), (10, 156), (11, 136))),
    ],
)
def test_written_schedules(spec, steps):
    assert schedule.parse(spec, DEIT_S).steps == steps


def test_keep_rate_rounds_up_but_not_for_binary_fractions():
    shape = ModelShape(**{**vars(DEIT_S), "num_patches": 10})
    assert schedule.keep_rate(0.7, [3], shape).steps == ((3, 7),)
    assert schedule.keep_rate(0.71, [3], shape).steps == ((3, 8),)


def test_schedule_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model": DEIT_S.name, "steps": [[3, 100], [7, 50]]}))
    assert schedule.parse(str(path), DEIT_S).steps == ((3, 100), (7, 50))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("12:100", "block 12, but deit_small_patch16_224 has blocks 0 to 11"),
        ("3:197", "keeps 197 tokens in block 3, more than the 196 patch tokens"),
        ("3:0", "keeps 0 tokens in block 3"),
        ("3:-5", "keeps -5 tokens"),
        ("3:100,6:120", "keeps 120 tokens in block 6, more than the 100 tokens kept before it"),
        ("3:100,3:90", "names block 3 twice"),
        ("r100@3-6", "keeps -4 tokens in block 4"),
        ("r10@5-12", "names block 12"),
        ("papers", "unknown schedule 'papers'"),
        ("nowhere.json", "no such schedule file: nowhere.json"),
    ],
)
def test_bad_schedules_say_what_is_wrong(spec, message):
    with pytest.raises(ScheduleError, match=message):
        schedule.parse(spec, DEIT_S)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a schedule file"),
        ("[]", "is not a schedule file"),
        ('{"steps": [[3]]}', "is not a schedule file"),
        ('{"steps": [[3, "x"]]}', r"Expected `int`.*steps\[0\]\[1\]"),
        ('{"steps": [[3, 100.5]]}', r"Expected `int`.*steps\[0\]\[1\]"),
        ('{"steps": [[3, 100]], "model": "vit_tiny"}', "a schedule for vit_tiny"),
    ],
)
def test_bad_schedule_files_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=message):
        schedule.parse(str(path), DEIT_S)


@pytest.mark.parametrize("rate", [0, -1, 1.01, float("nan")])
def test_bad_keep_rates(rate):
    with pytest.raises(ScheduleError, match="keep rate"):
        schedule.keep_rate(rate, [3], DEIT_S)


def test_a_model_too_small_to_spread_is_told_so():
    shape = ModelShape(**{**vars(DEIT_S), "num_patches": 4})
    with pytest.raises(ScheduleError, match="too few blocks"):
        schedule.parse("spread", shape)


def test_models_with_little_to_give_are_warned_of_spread_alone():
    few = replace(DEIT_S, num_patches=36)
    for shape, spec, warned in (
        (few, "spread", True),
        (replace(DEIT_S, depth=6), "spread:60", True),
        (few, "spread:80", False),
        (few, "3:20", False),
        (DEIT_S, "spread", False),
    ):
        assert bool(schedule.caution(schedule.parse(spec, shape), shape)) == warned


def test_a_schedule_of_the_package_for_another_model_names_those_that_suit(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PUBLISHED", tmp_path)
    for name, model in (("a-50", "a"), ("b-50", DEIT_S.name), ("b-62", DEIT_S.name)):
        (tmp_path / f"{name}.json").write_text(f'{{"model": "{model}", "steps": [[3, 100]]}}')
    with pytest.raises(schedule.ScheduleError) as failure:
        schedule.parse("a-50", DEIT_S)
    assert "take b-50 or b-62 or spread:62" in failure.value.hint
    assert "remove" not in failure.value.hint, "the package's files are nobody's to change"
