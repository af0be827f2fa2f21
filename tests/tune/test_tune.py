"""tune: budgets are kept, what is not shown is not written, an interrupted run is not lost."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import gmean

from jmp_deploy.cli.main import main
from jmp_deploy.core.errors import ImageError, ScheduleError, WeightsError
from jmp_deploy.core.images import Preprocess, load_batch
from jmp_deploy.core.manifest import Weights
from jmp_deploy.jmp import latency, models, schedule
from jmp_deploy.jmp.dense import DenseFeatures
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.tune import search
from jmp_deploy.tune import tune as tuning
from jmp_deploy.tune.measure import Evaluator, pairs
from jmp_deploy.tune.tune import TuneOptions, tune
from tests.fakes.artifacts import FILE_WEIGHTS
from tests.fakes.models import tiny_eva, tiny_vit
from tests.jmp.test_schedule import DEIT_S

SPEC = Preprocess(32, 32, 36, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --- the search, on invented answers ------------------------------------------------------------


def problem(budget: float = 3.0, shape: schedule.ModelShape = DEIT_S) -> search.Problem:
    options = TuneOptions("m", (), Path("out"), gmacs=budget)
    return tuning.make_problem(options, shape)[0]


def harm(keeps: search.Keeps, weights: list[float]) -> float:
    """An invented distance: in each block, a price times the square of the share that goes."""
    before, total = 196, 0.0
    for keep, weight in zip(keeps, weights, strict=True):
        total += weight * ((before - keep) / before) ** 2
        before = keep
    return total


@pytest.mark.parametrize("dear", [range(6), range(6, 12)])
def test_search_moves_reductions_to_where_they_are_cheap(dear):
    weights = [10.0 if block in dear else 1.0 for block in range(12)]
    task = problem()
    asked: list[search.Keeps] = []

    def measure(keeps, tau):
        asked.append(keeps)
        return harm(keeps, weights)

    found, plain = search.search(task, measure, tau=0.7), search.plain(task, 0.7)
    assert task.fits(found.keeps) and found.tau == 0.7
    assert harm(found.keeps, weights) < 0.8 * harm(plain.keeps, weights)
    assert len(set(asked)) < 100
    assert found.keeps[-1] == found.keeps[-2], "the last block computes what the head reads alone"


def test_search_without_work_to_spend_answers_the_plain_schedule():
    task = problem()
    found = search.search(task, lambda keeps, tau: 1.0, tau=None, exhausted=lambda: True)
    assert found == search.plain(task, None) and found.tau == 0.8


def test_search_chooses_tau():
    found = search.search(
        problem(), lambda keeps, tau: harm(keeps, [1.0] * 12) + abs(tau - 0.88), tau=None
    )
    assert found.tau == 0.9


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
def test_search_takes_a_model_of_few_blocks(depth):
    task = problem(0.7, shape := replace(DEIT_S, depth=depth, num_patches=16))
    task = replace(task, budget=(task.cost(task.dense()) + task.cost(task.least())) / 2)
    found = search.search(task, lambda keeps, tau: harm(keeps, [1.0] * depth), tau=None)
    assert task.fits(found.keeps) and pairs(found.keeps, 16)
    if depth > 3:
        assert found.keeps[-1] == found.keeps[-2]
    assert schedule.resolve("found", pairs(found.keeps, 16), shape)


def test_plain_schedules_are_those_of_build_at_its_own_budget():
    paper = schedule.paper(DEIT_S)
    same = schedule.improved(paper, DEIT_S)
    found = search.paper_like(problem(schedule.macs(DEIT_S, same) / 1e9))
    assert found and pairs(found, 196) == list(paper.steps)
    for share in (0.8, 0.6, 0.5, 0.4):
        plain = schedule.for_share(DEIT_S, share)
        spread = search.plain(problem(share * schedule.macs(DEIT_S) / 1e9), None)
        assert pairs(spread.keeps, 196) == list(plain.steps) and spread.tau == plain.tau


@pytest.mark.parametrize("share", [0.95, 0.6, 0.3, 0.12, 0.06])
def test_any_budget_that_can_be_met_is_met(share):
    task = problem(share * schedule.macs(DEIT_S) / 1e9)
    assert task.fits(search.plain(task, None).keeps)
    found = search.search(task, lambda keeps, tau: harm(keeps, [1.0] * 12), tau=0.7)
    assert task.fits(found.keeps)


def test_budget_out_of_reach_names_the_nearest():
    with pytest.raises(ScheduleError, match=r"is 0\.\d+ GMACs, keeping 1 of 196 patch"):
        search.check(problem(0.01), "GMACs")
    with pytest.raises(ScheduleError, match=r"the dense model takes 4\.599 GMACs"):
        search.check(problem(4.7), "GMACs")


# --- latency tables -----------------------------------------------------------------------------


def staircase(**changes) -> dict:
    """A device on which time rises every 32 tokens, and 160 tokens are a trap."""
    rows = []
    for tokens in range(5, 198):
        level = -(-tokens // 32) + (5 if 155 < tokens <= 160 else 0)
        rows.append({"batch": 8, "tokens": tokens, "attn_ms": 0.1 * level, "mlp_ms": 0.2 * level})
    table = {
        "format": latency.FORMAT,
        "model": DEIT_S.name,
        "depth": 12,
        "num_prefix": 1,
        "num_patches": 196,
        "device": "invented",
        "other_ms": {"8": 0.5},
        "rows": rows,
    }
    return {**table, **changes}


def written(folder: Path, data: object) -> Path:
    path = folder / "table.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_good_counts_are_the_right_edges_of_the_steps(tmp_path):
    table = latency.read(written(tmp_path, staircase()), DEIT_S)
    # one prefix token; 155 stands for the step that the trap cuts short
    assert table.good_counts() == (196, 191, 154, 127, 95, 63, 31)


def test_latency_adds_up(tmp_path):
    data = staircase()
    for row in data["rows"]:
        row["reduce_ms"] = 0.05
    table = latency.read(written(tmp_path, data), DEIT_S)
    assert table.latency([196] * 12) == pytest.approx(0.5 + 12 * 7 * 0.3)
    reduced = [196] * 4 + [127] * 8  # block 4: attention of 197 tokens, MLP of 128, one reduction
    expected = 0.5 + 4 * 7 * 0.3 + (7 * 0.1 + 4 * 0.2 + 0.05) + 7 * 4 * 0.3
    assert table.latency(reduced) == pytest.approx(expected)


def test_search_under_latency_keeps_only_good_counts(tmp_path):
    path = written(tmp_path, staircase())
    options = TuneOptions("m", (), Path("out"), speedup=1.5, table=path)
    task, unit = tuning.make_problem(options, DEIT_S)
    found = search.search(task, lambda keeps, tau: harm(keeps, [1.0] * 12), tau=0.7)
    assert unit == "ms" and task.cost(found.keeps) <= task.cost(task.dense()) / 1.5
    assert set(found.keeps) <= {196, 191, 154, 127, 95, 63, 31}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{", "not a latency table"),
        ([1], "not a latency table"),
        (staircase(format="other"), "not a latency table"),
        (staircase(model="deit_tiny_patch16_224"), "another model: model 'deit_tiny_patch16_224'"),
        (staircase(num_patches=256), "another model: num_patches 256"),
        (staircase(rows=[]), r"length >= 1 - at `\$.rows`"),
        (
            staircase(rows=[{"batch": 8, "tokens": 197, "attn_ms": -1, "mlp_ms": 1}]),
            r"rows\[0\].attn_ms",
        ),
        (staircase(rows=staircase()["rows"][:-1]), "lacks the full sequence of 197"),
        (staircase(rows=staircase()["rows"] * 2), "two rows"),
        (staircase(rows=staircase()["rows"][-1:]), "no smaller number of tokens is faster"),
        (staircase(other_ms={"1": 0.5}), "other_ms"),
    ],
)
def test_bad_table_is_refused(tmp_path, data, words):
    with pytest.raises(ScheduleError, match=words):
        latency.read(written(tmp_path, data), DEIT_S)


def test_table_without_the_batch_names_those_it_has(tmp_path):
    with pytest.raises(ScheduleError, match="no batch 4, only 8"):
        latency.read(written(tmp_path, staircase()), DEIT_S, 4)


# --- the whole, on a tiny model -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """`load_model` gives the tiny model."""

    def load(name, weights="auto", **options):
        model = tiny_vit(num_classes=0 if name == "features" else 10)
        origin = FILE_WEIGHTS
        if weights == "fallback":
            origin = Weights("random", seed=0, fallback_for="pretrained", reason="no hub")
        return models.LoadedModel(model, "tiny", origin, SPEC, None)

    monkeypatch.setattr(models, "load_model", load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(20):
        coarse = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 40)).save(path / f"{index:02}.png")
    return path


def options(folder: Path, tmp_path: Path, **changes) -> TuneOptions:
    values = {
        "out": tmp_path / "tuned.json",
        "limit": 16,
        "batch": 5,
        "passes": 12.0,
        "speedup": 1.4,
    }
    return TuneOptions("tiny", (folder,), **{**values, **changes})


@pytest.mark.parametrize("name", ["tiny", "features"])
def test_what_is_written_fits_the_budget_and_is_what_was_judged(folder, tmp_path, name):
    result = tune(replace(options(folder, tmp_path), model=name))
    shape = model_shape(tiny_vit(num_classes=0 if name == "features" else 10))
    loaded = schedule.load(tmp_path / "tuned.json", shape)
    assert schedule.macs(shape, loaded) <= schedule.macs(shape) / 1.4
    assert loaded.tau == result["tau"] and loaded.merge_weight == result["merge_weight"]
    written = result["candidates"][result["chosen"]]
    assert (list(loaded.steps), loaded.tau) == (written["steps"], written["tau"])
    for figure in written["held_back"].values():
        assert 0 < figure["low"] <= figure["value"] <= figure["high"] < 1
    tuned, plain = (result["candidates"][form]["choosing"] for form in ("tuned", "spread"))
    assert tuned["geometric"]["value"] <= plain["geometric"]["value"], "where the search begins"
    assert not list(tmp_path.glob("*.state"))


def pixels_of(paths: list[Path]) -> torch.Tensor:
    return torch.from_numpy(np.stack([load_batch([path], SPEC)[0] for path in paths]))


def test_reported_distances_are_what_the_schedules_give_on_the_files_held_back(folder, tmp_path):
    """Kept block inputs and skipped blocks change nothing: patched afresh, the same distances; and
    the third that was held back is no file of those that chose."""
    result = tune(options(folder, tmp_path, limit=20))
    paths = sorted(folder.iterdir())
    order = [paths[index] for index in np.random.default_rng(0).permutation(20)]
    images = {"choosing": pixels_of(order[:14]), "held_back": pixels_of(order[14:])}
    dense, shape = tiny_vit(), model_shape(tiny_vit())
    found: dict[tuple[str, str], np.ndarray] = {}
    for name in ("tuned", "spread"):
        entry = result["candidates"][name]
        plan = schedule.improved(schedule.resolve(name, entry["steps"], shape), shape)
        patch(reduced := tiny_vit(), plan, tau=entry["tau"])
        for part, pixels in images.items():
            with torch.inference_mode():
                cosine = torch.nn.functional.cosine_similarity(dense(pixels), reduced(pixels))
            found[name, part] = 1 - cosine.double().numpy()
            values = found[name, part]
            assert entry[part]["mean"]["value"] == pytest.approx(values.mean(), abs=1e-6)
            assert entry[part]["geometric"]["value"] == pytest.approx(gmean(values), rel=1e-3)
    for part in images:
        for kind, mean in (("mean", np.mean), ("geometric", gmean)):
            gain = 1 - mean(found["tuned", part]) / mean(found["spread", part])
            assert result["gain"][part][kind]["value"] == pytest.approx(gain, abs=1e-3)
    assert result["images"]["held_back"] == 6


@pytest.mark.parametrize(
    ("elsewhere", "worst", "chosen", "words"),
    [
        (1, 0, "tuned", "beyond chance, so tuned is written"),
        (-1, 0, "spread", "not beyond chance, so the plain schedule, spread, is written"),
        (1, 1, "spread", "worse, so the plain schedule, spread, is written"),
    ],
)
def test_only_what_holds_on_the_files_held_back_is_written(
    folder, tmp_path, monkeypatch, capsys, elsewhere, worst, chosen, words
):
    """To take many tokens early looks good on the images that choose; on those held back it is, or
    is not, or is but for the one that decides the mean."""

    def distances(self, keeps, tau, images):
        early = (16 * 6 - sum(keeps)) / 100
        sign = 1 if images.start == 0 else elsewhere
        found = [0.01 * math.exp(-sign * early) + image / 1e5 for image in images]
        if images.start and worst:
            found[-1] = 1 + early / 10
        return found

    monkeypatch.setattr(Evaluator, "distances", distances)
    out = tmp_path / "tuned.json"
    arguments = ["tune", "tiny", "--images", str(folder), "--speedup", "1.4", "-o", str(out)]
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["candidates"]["tuned"]["steps"] != result["candidates"]["spread"]["steps"]
    assert result["gain"]["choosing"]["geometric"]["low"] > 0
    assert (result["gain"]["held_back"]["mean"]["value"] > 0) == (chosen == "tuned")
    assert result["chosen"] == chosen
    assert result["steps"] == result["candidates"][chosen]["steps"]
    assert words in " ".join(capsys.readouterr().out.split())


def test_copies_of_an_image_are_taken_once(folder, tmp_path):
    """Else what chose would judge under another name."""
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in folder.iterdir():
        for number in range(3):
            (copies / f"{path.stem}-{number}.png").write_bytes(path.read_bytes())
    result = tune(options(copies, tmp_path, passes=1.0, limit=60))
    assert result["images"]["count"] == 20
    assert "60 images, but only 20 different ones" in " ".join(result["warnings"])


def test_same_seed_same_result_other_seed_other_images(folder, tmp_path):
    first, second = (tune(options(folder, tmp_path / name)) for name in ("a", "b"))
    assert first == second
    third = tune(options(folder, tmp_path / "c", seed=1))
    assert third["images"]["sha256"] != first["images"]["sha256"]


def test_interrupted_run_is_resumed_to_the_same_result(folder, tmp_path, monkeypatch):
    whole = tune(options(folder, tmp_path / "whole"))
    plain = Evaluator.distances
    calls = 0

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls > 7:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Evaluator, "distances", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(options(folder, tmp_path / "part"))
    assert not (tmp_path / "part" / "tuned.json").exists()
    monkeypatch.setattr(Evaluator, "distances", plain)
    resumed = tune(options(folder, tmp_path / "part", resume=True))
    counts = resumed.pop("measurements"), whole.pop("measurements")
    assert resumed == whole
    assert counts[0] == {"run": counts[1]["run"] - 7, "resumed": 7}


def test_state_of_another_run_is_refused_and_kept(folder, tmp_path):
    state = tmp_path / "tuned.json.state"
    for text, words in (
        (json.dumps({"key": "another", "known": {}}), "another model, weights, images, seed"),
        ("{", "is not a state of `tune`"),
    ):
        state.write_text(text)
        with pytest.raises(ScheduleError, match=words):
            tune(options(folder, tmp_path, resume=True))
        assert state.read_text() == text


def test_model_is_left_unpatched(folder):
    model = tiny_vit()
    blocks = model.blocks
    pixels = load_batch(sorted(folder.iterdir())[:3], SPEC)
    evaluator = Evaluator(model, pixels, 2)
    evaluator.distances((16, 16, 16, 9, 9, 4), 0.7, range(3))
    assert model.blocks is blocks
    assert evaluator.distances((16,) * 6, 0.7, range(3)) == pytest.approx([0] * 3, abs=1e-9)


@pytest.mark.parametrize("make", [tiny_vit, partial(tiny_eva, global_pool="token")])
def test_features_of_patches_are_judged_patch_by_patch(folder, make):
    model, keeps = make(), (16, 16, 12, 9, 9, 9)
    pixels = load_batch(sorted(folder.iterdir())[:3], SPEC)
    found = Evaluator(model, pixels, 2, of_patches=True).distances(keeps, 0.7, range(3))
    images = torch.from_numpy(pixels)
    want = DenseFeatures(model)(images).double().numpy()
    shape = model_shape(model).for_patches()
    steps = schedule.improved(schedule.resolve("it", pairs(keeps, 16), shape), shape)
    patch(model, steps, tau=0.7, restore=True)
    got = DenseFeatures(model)(images).double().numpy()
    lengths = np.linalg.norm(got, axis=2) * np.linalg.norm(want, axis=2)
    cosine = ((got * want).sum(axis=2) / lengths).mean(axis=1)
    np.testing.assert_allclose(found, 1 - cosine, rtol=1e-4, atol=1e-7)


def test_a_schedule_for_features_of_patches(folder, tmp_path):
    result = tune(options(folder, tmp_path, passes=1.0, output="dense"))
    assert "of a patch" in result["objective"] and not result["last_prefix_only"]
    assert tune(options(folder, tmp_path, passes=1.0))["last_prefix_only"]


def test_images_all_alike_and_few_are_warned_of(tmp_path):
    for index in range(12):
        image = Image.new("RGB", (40, 40), (90, 90, 90))
        image.putpixel((20, 8 + index), (94, 90, 90))
        image.save(tmp_path / f"{index}.png")
    result = tune(options(tmp_path, tmp_path, passes=1.0))
    words = " ".join(result["warnings"])
    assert "all alike" in words and "only 12 images: below 50 photos" in words


def test_varied_images_are_not_warned_of(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FEW", 16)
    assert tune(options(folder, tmp_path, passes=1.0))["warnings"] == []


def test_too_few_different_images_to_hold_some_back_are_refused(tmp_path):
    for index in range(20):
        Image.new("RGB", (40, 40), (8 * (index // 2), 90, 90)).save(tmp_path / f"{index}.png")
    with pytest.raises(ImageError, match=r"10 different images: `tune` takes 12 at least"):
        tune(options(tmp_path, tmp_path, limit=20))


def test_random_weights_that_nobody_asked_for_are_refused(folder, tmp_path):
    with pytest.raises(WeightsError, match="no hub"):
        tune(options(folder, tmp_path, weights="fallback"))


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ImageError, match="no images"):
        tune(options(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gmacs": 1.0}, "one budget"),
        ({"speedup": None}, "one budget"),
        ({"speedup": -1.0}, "not valid"),
        ({"speedup": None, "latency_ms": 3.0}, "needs a table"),
        ({"speedup": None, "gmacs": 1.0, "table": Path("t.json")}, "--on goes with"),
        ({"table": Path("missing.json")}, "no such latency table"),
        ({"speedup": 500.0}, "nearest possible"),
    ],
)
def test_bad_options_are_one_error(folder, tmp_path, changes, words):
    with pytest.raises(ScheduleError, match=words):
        tune(options(folder, tmp_path, **changes))


def test_schedule_file_of_another_model_is_refused(folder, tmp_path):
    tune(options(folder, tmp_path, passes=1.0))
    with pytest.raises(ScheduleError, match="is a schedule for VisionTransformer"):
        schedule.load(tmp_path / "tuned.json", DEIT_S)


def test_command_prints_how_to_build_and_keeps_the_curve(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jmp_deploy.cli.tune.find_spec", lambda name: None)
    out = tmp_path / "s.json"
    arguments = ["tune", "tiny", "--images", str(folder), "--speedup", "1.4", "--passes", "2"]
    arguments += ["--limit", "16", "-o", str(out), "--plot", str(tmp_path / "p.png")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "--schedule" in printed.out
    assert "matplotlib is not installed" in printed.err and not (tmp_path / "p.png").exists()
    assert "searching" in printed.err, "progress without a terminal"
    curve = json.loads(out.read_text())["curve"]
    assert {point["form"] for point in curve} == {"paper", "spread", "tuned"}
    costs = [point["cost"] for point in curve if point["form"] == "tuned"]
    assert len(set(costs)) >= 3


def test_plot_is_drawn(folder, tmp_path):
    pytest.importorskip("matplotlib")
    from jmp_deploy.cli.tune import plot

    result = tune(options(folder, tmp_path, passes=1.0, curve=True))
    assert plot(result, tmp_path / "p.png") is None
    with Image.open(tmp_path / "p.png") as image:
        image.verify()
