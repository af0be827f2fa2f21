"""`validate` as a user types it: figures against an independent computation, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jmp_deploy.cli.main import main
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.manifest import Weights
from jmp_deploy.validate import loader
from tests.core.test_lean_imports import TOOLS, python
from tests.fakes import validation

CLASSES = 10


def run(*arguments, code=0):
    """Runs a command with --json and returns what it wrote, or None."""
    out = Path(arguments[-1]) if str(arguments[-1]).endswith(".json") else None
    assert main([str(argument) for argument in arguments]) == code
    return json.loads(out.read_text()) if out else None


def fails(capsys, *arguments, message, code=2):
    """One clear line and this exit code, no traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in err, err
    return err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and its dense twin, 120 images, and what each answers: (folders, inputs, labels)."""
    folder = tmp_path_factory.mktemp("validate")
    labels = np.sort(np.random.default_rng(1).integers(0, CLASSES, 120))
    inputs = validation.write_images(folder / "data", labels)
    dense = validation.weights(CLASSES)
    # half of the labels by chance is what noise gives: make the dense model better than that
    for label in range(CLASSES):
        dense[:, label] += 0.6 * inputs[labels == label].mean(0)
    jmp = (dense + 0.3 * validation.weights(CLASSES, seed=5)).astype(np.float32)
    validation.write_artifact(folder / "jmp", jmp)
    validation.write_artifact(folder / "dense", dense, jmp=None)
    scores = {"jmp": inputs @ jmp.astype(np.float64), "dense": inputs @ dense.astype(np.float64)}
    return folder, scores, labels


@pytest.fixture(autouse=True)
def few_processes(monkeypatch):
    """Tests that are about worker processes ask for them."""
    monkeypatch.setattr("jmp_deploy.validate.validate.default_workers", lambda: 0)


def best(scores, count):
    """The `count` best classes by a full sort in float64."""
    return np.argsort(-scores, axis=1)[:, :count]


def test_figures_are_those_of_an_independent_computation(world, tmp_path, capsys):
    folder, scores, labels = world
    command = ["validate", folder / "jmp", "--data", folder / "data", "--against", folder / "dense"]
    found = run(*command, "--workers", "2", "--json", tmp_path / "v.json")
    right = {name: best(values, 1)[:, 0] == labels for name, values in scores.items()}
    five = {name: (best(values, 5) == labels[:, None]).any(1) for name, values in scores.items()}
    same = best(scores["jmp"], 1) == best(scores["dense"], 1)
    assert found["n"] == found["images"] == 120 and found["ok"]
    assert found["top1"] == pytest.approx(100 * right["jmp"].mean())
    assert found["top5"] == pytest.approx(100 * five["jmp"].mean())
    assert found["dense"]["top1"] == pytest.approx(100 * right["dense"].mean())
    assert found["dense"]["top5"] == pytest.approx(100 * five["dense"].mean())
    assert found["agreement_with_dense"] == pytest.approx(100 * same.mean())
    assert found["drop_points"] == pytest.approx(found["dense"]["top1"] - found["top1"])
    assert found["only_dense_right"] == (right["dense"] & ~right["jmp"]).sum() > 0
    # the exact paired interval holds that of the normal approximation, too narrow for 120 images
    lost = 100.0 * (right["dense"].astype(float) - right["jmp"])
    half = 1.96 * lost.std() / np.sqrt(len(lost))
    low, high = found["ci95"]
    assert low < lost.mean() - half < lost.mean() + half < high and high - low < 4 * half
    assert (
        found["throughput"]["workers"] == 2
        and found["throughput"]["end_to_end"] > 0
        and found["throughput"]["model"] > 0
    )
    printed = capsys.readouterr().out
    assert "drop in points" in printed and f"{found['drop_points']:+.2f}" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "v.json"]  # no state is left behind


def test_without_a_dense_model_nothing_is_said_of_it(world, tmp_path):
    folder, _, _ = world
    found = run(
        "validate", folder / "jmp", "--data", folder / "data", "--json", tmp_path / "v.json"
    )
    assert found["drop_points"] is found["agreement_with_dense"] is found["ci95"] is None
    low, high = found["top1_ci95"]
    assert low < found["top1"] < high


def test_workers_batch_and_paths_change_no_figure(world, tmp_path):
    folder, _, _ = world
    command = ["validate", folder / "jmp", "--data", folder / "data", "--against", folder / "dense"]
    results = [
        run(*command, "--workers", workers, "--batch", batch, "--json", tmp_path / "v.json")
        for workers, batch in ((0, 16), (3, 7), (0, 200))
    ]
    first = {**validation.lasting(results[0]), "batch": None}
    for other in results[1:]:
        assert {**validation.lasting(other), "batch": None} == first


def test_limit_is_a_fixed_subset_over_all_classes(world, tmp_path):
    folder, _, _ = world
    command = ["validate", folder / "jmp", "--data", folder / "data", "--limit", "40"]
    command += ["--shard", "1/1", "--json", tmp_path / "v.json"]
    found, again = run(*command), run(*command)
    assert found["n"] == found["images"] == 40
    assert found["shard"]["rows"] == again["shard"]["rows"]
    assert len(set(found["shard"]["rows"]["label"])) > 5


def test_a_few_unreadable_images_are_skipped_counted_and_listed(world, tmp_path, capsys):
    folder, _, _ = world
    data = tmp_path / "data"
    validation.write_images(data, np.repeat(np.arange(CLASSES), 12))
    whole = run("validate", folder / "jmp", "--data", data, "--json", tmp_path / "v.json")
    (data / "3" / "zzz.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    (data / "3" / "notes.txt").write_text("no image, and no one claims that it is")
    found = run("validate", folder / "jmp", "--data", data, "--json", tmp_path / "v.json")
    assert found["n"] == 120 and found["images"] == 121 and found["top1"] == whole["top1"]
    assert found["unreadable"]["count"] == 1
    (entry,) = found["unreadable"]["files"]
    assert entry["image"] == "3/zzz.jpg" and "zzz.jpg" in entry["reason"]
    assert "skipped: cannot read" in capsys.readouterr().out
    (data / "4" / "link.png").symlink_to(tmp_path / "nowhere.png")
    capsys.readouterr()
    found = run("validate", folder / "jmp", "--data", data, "--json", tmp_path / "v.json", code=1)
    assert not found["ok"] and found["unreadable"]["count"] == 2 and found["n"] == 120
    assert "more than 1 % of the images are unreadable" in capsys.readouterr().err


def test_nothing_but_unreadable_images(world, tmp_path, capsys):
    folder, _, _ = world
    (tmp_path / "data" / "1").mkdir(parents=True)
    (tmp_path / "data" / "1" / "a.png").write_text("no image")
    command = ("validate", folder / "jmp", "--data", tmp_path / "data")
    fails(capsys, *command, message="none of the 1 images can be read", code=1)


def test_odd_images_are_answered_like_their_plain_twins(tmp_path):
    """EXIF-rotated, 16-bit, palette, CMYK, grey with alpha: what a camera or a scanner writes."""
    validation.write_artifact(tmp_path / "a", validation.weights(CLASSES))
    random = np.random.default_rng(3)
    data = tmp_path / "data" / "1"
    data.mkdir(parents=True)

    def noise(*shape):
        return random.integers(0, 256, (8, 8, *shape), dtype=np.uint8)

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned, deep, clear = noise(3), noise(), noise()
    palette = Image.fromarray(noise(3)).quantize(64)
    cmyk = Image.fromarray(noise(3)).convert("CMYK")
    Image.fromarray(turned).save(data / "exif-a.png", exif=exif)
    Image.fromarray(np.rot90(turned, -1).copy()).save(data / "exif-b.png")
    Image.fromarray(deep.astype(np.uint16) * 257).save(data / "16bit-a.png")
    Image.fromarray(np.stack([deep] * 3, -1)).save(data / "16bit-b.png")
    Image.merge("LA", [Image.fromarray(clear), Image.fromarray(deep)]).save(data / "la-a.png")
    Image.fromarray(np.stack([clear] * 3, -1)).save(data / "la-b.png")
    palette.save(data / "palette-a.png")
    palette.convert("RGB").save(data / "palette-b.png")
    cmyk.save(data / "cmyk-a.tif")
    cmyk.convert("RGB").save(data / "cmyk-b.tif")
    command = ["validate", tmp_path / "a", "--data", tmp_path / "data", "--shard", "1/1"]
    found = run(*command, "--json", tmp_path / "v.json")
    assert found["n"] == 10 and found["unreadable"]["count"] == 0
    answers = found["shard"]["rows"]["top1"]
    assert answers[::2] == answers[1::2] and len(set(answers)) > 2


def test_what_a_worker_makes_of_a_photo_is_timms_to_the_last_bit(photos):
    """ImageNet's usual transform and DINOv2's, for photos of several shapes."""
    from timm.data import create_transform

    from jmp_deploy.core.images import Preprocess, load_readable

    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    for crop in (0.9, 1.0):
        config = {"input_size": (3, 224, 224), "crop_pct": crop, "interpolation": "bicubic"}
        transform = create_transform(**config, **statistics, is_training=False)
        batch = load_readable(photos, Preprocess.from_timm({**config, **statistics}))
        for path, pixels in zip(photos, batch.images, strict=True):
            with Image.open(path) as photo:
                np.testing.assert_array_equal(pixels, transform(photo.convert("RGB")).numpy())


def test_outputs_that_are_not_finite_are_named(world, tmp_path, capsys):
    folder, _, _ = world
    matrix = np.ones((validation.PIXELS, CLASSES), np.float32)  # the root of a dark image is NaN
    validation.write_artifact(tmp_path / "nan", matrix, root=True)
    data = tmp_path / "data" / "1"
    data.mkdir(parents=True)
    for name, level in (("dark", 10), ("light", 250)):
        Image.new("RGB", (8, 8), (level,) * 3).save(data / f"{name}.png")
    command = ("validate", tmp_path / "nan", "--data", tmp_path / "data")
    err = fails(capsys, *command, message="are not finite for 1/dark.png", code=1)
    assert "light" not in err and "jmp_deploy compare" in err
    command = ("validate", folder / "jmp", "--data", tmp_path / "data")
    fails(capsys, *command, "--against", tmp_path / "nan", message=str(tmp_path / "nan"), code=1)


def test_random_weights_are_refused(world, tmp_path, capsys):
    folder, _, _ = world
    origin = Weights("random", seed=0)
    validation.write_artifact(tmp_path / "random", validation.weights(CLASSES), weights=origin)
    for command in (
        ("validate", tmp_path / "random", "--data", folder / "data"),
        ("validate", folder / "jmp", "--data", folder / "data", "--against", tmp_path / "random"),
    ):
        assert "--allow-random" in fails(capsys, *command, message="has random weights")
        found = run(*command, "--allow-random", "--json", tmp_path / "v.json")
        assert any("RANDOM WEIGHTS" in note for note in found["notes"])


def test_what_is_no_baseline_is_refused_and_doubts_are_noted(world, tmp_path, capsys):
    folder, _, _ = world
    command = ("validate", folder / "jmp", "--data", folder / "data", "--against")
    spec = replace(Artifact.read(folder / "jmp").preprocess, resize=9)
    validation.write_artifact(tmp_path / "other", validation.weights(CLASSES), preprocess=spec)
    err = fails(capsys, *command, tmp_path / "other", message="its preprocessing is")
    assert "--dense" in err
    found = run(*command, folder / "jmp", "--json", tmp_path / "v.json")
    assert found["drop_points"] == 0 and found["agreement_with_dense"] == 100
    assert any("is not dense" in note for note in found["notes"])
    origin = Weights("file", path="x", sha256="1" * 64)
    validation.write_artifact(
        tmp_path / "weights", validation.weights(CLASSES), weights=origin, jmp=None
    )
    found = run(*command, tmp_path / "weights", "--json", tmp_path / "v.json")
    assert found["notes"] == ["the two artifacts were built from different weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "no such folder: nowhere"),
        (["--data", "empty"], "holds no labelled images"),
        (["--data", "DATA", "--labels", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["--data", "DATA", "--backend", "engine"], "engine: none was built"),
        (["--data", "DATA", "--shard", "9/99"], "99 shards of 30 batches"),
        (["--data", "DATA", "--against", "nowhere"], "no such artifact folder"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    world, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "1").mkdir(parents=True)
    words = [str(world[0] / "data") if word == "DATA" else word for word in arguments]
    fails(capsys, "validate", world[0] / "jmp", *words, message=message)


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b"])
def test_shards_are_written_as_i_of_n(world, capsys, shard):
    assert main(["validate", str(world[0] / "jmp"), "--data", ".", "--shard", shard]) == 2
    assert "--shard" in capsys.readouterr().err


# --- Features ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Feature models, a train and a val split whose classes are far enough apart to learn."""
    folder = tmp_path_factory.mktemp("features")
    random = np.random.default_rng(7)
    prototypes = random.integers(0, 256, (3, 8, 8, 3))
    splits = {}
    for split, count in (("train", 20), ("val", 15)):
        rows = []
        for label, name in enumerate(("cat", "dog", "eel")):
            (folder / "data" / split / name).mkdir(parents=True)
            for place in range(count):
                noisy = prototypes[label] + random.normal(0, 200, (8, 8, 3))
                pixels = noisy.clip(0, 255).astype(np.uint8)
                path = folder / "data" / split / name / f"{place:03d}.png"
                Image.fromarray(pixels).save(path)
                rows.append((validation.model_input(pixels), label))
        inputs, labels = zip(*rows, strict=True)
        splits[split] = (np.array(inputs), np.array(labels))
    dense = validation.weights(12)
    jmp = (dense + 0.5 * validation.weights(12, seed=9)).astype(np.float32)
    validation.write_artifact(folder / "jmp", jmp, output="features")
    validation.write_artifact(folder / "dense", dense, output="features", jmp=None)
    return folder, splits, {"jmp": jmp.astype(np.float64), "dense": dense.astype(np.float64)}


def test_features_are_judged_by_a_probe_of_the_dense_ones(features, tmp_path, capsys):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folder, splits, matrices = features
    command = ["validate", folder / "jmp", "--data", folder / "data", "--against", folder / "dense"]
    found = run(*command, "--json", tmp_path / "v.json")
    (train, train_labels), (val, labels) = splits["train"], splits["val"]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    probe.fit(train @ matrices["dense"], train_labels)
    want = {name: probe.predict(val @ matrix) for name, matrix in matrices.items()}
    assert found["top1"] == pytest.approx(100 * (want["jmp"] == labels).mean())
    assert found["dense"]["top1"] == pytest.approx(100 * (want["dense"] == labels).mean())
    assert found["agreement_with_dense"] == pytest.approx(
        100 * (want["jmp"] == want["dense"]).mean()
    )
    assert 40 < found["top1"] < 100 and found["probe"]["kind"] == "logistic"
    assert found["probe"]["train_images"] == 60 and found["n"] == 45
    assert found["knn"]["dense"] > 40 and len(found["knn"]["ci95"]) == 2
    assert "k-NN" in capsys.readouterr().out


def test_a_dense_feature_model_is_judged_by_its_own_probe(features, tmp_path, capsys):
    folder, _, _ = features
    found = run(
        "validate", folder / "dense", "--data", folder / "data", "--json", tmp_path / "v.json"
    )
    both = run(
        *("validate", folder / "jmp", "--data", folder / "data", "--against", folder / "dense"),
        *("--json", tmp_path / "v.json"),
    )
    assert found["top1"] == both["dense"]["top1"] and found["drop_points"] is None
    command = ("validate", folder / "jmp", "--data", folder / "data")
    assert "--against DIR" in fails(capsys, *command, message="no classifier head")


def test_without_scikit_learn_pytorch_and_timm_a_ridge_probe_is_fitted(features, tmp_path):
    """On a device: the figures of the ridge probe, from an installation of the runtime alone."""
    folder, _, _ = features
    out = tmp_path / "v.json"
    arguments = ["validate", folder / "jmp", "--data", folder / "data"]
    arguments += ["--against", folder / "dense", "--workers", "1", "--json"]
    words = [str(argument) for argument in arguments]
    code = "import sys\nfrom jmp_deploy.cli.main import main\nif __name__ == '__main__':\n"
    code += f"    sys.exit(main({[*words, str(out)]!r}))"
    done = python(code, [*TOOLS, "sklearn", "scipy"])
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["probe"]["kind"] == "ridge" and found["top1"] > 40
    here = run(*words[:-1], "--probe", "ridge", "--json", tmp_path / "here.json")
    assert validation.lasting(here) == validation.lasting(found)


def test_shards_of_a_probed_model_fit_the_same_probe(features, tmp_path):
    folder, _, _ = features
    command = ["validate", folder / "jmp", "--data", folder / "data", "--against", folder / "dense"]
    whole = run(*command, "--json", tmp_path / "whole.json")
    parts = [tmp_path / f"part{index}.json" for index in (1, 2)]
    for index, part in enumerate(parts, 1):
        run(*command, "--shard", f"{index}/2", "--json", part)
    merged = run("merge", *parts, "--json", tmp_path / "merged.json")
    assert validation.lasting(merged) == validation.lasting(whole)
    run(*command, "--shard", "2/2", "--probe", "ridge", "--json", parts[1])
    assert main(["merge", *map(str, parts)]) == 2


def test_data_without_splits_is_no_data_for_a_probe(features, world, capsys):
    folder, _, _ = features
    command = ("validate", folder / "jmp", "--against", folder / "dense", "--data")
    fails(capsys, *command, world[0] / "data", message="has no train/ and val/")


# --- Interrupted and broken runs -----------------------------------------------------------------


def interrupt_after(monkeypatch, images):
    """Presses Ctrl-C once that many images of val are done."""
    from jmp_deploy.cli.show import Progress

    def update(self, words, share, detail):
        if words == "validating" and int(detail.split()[1]) >= images:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "update", update)


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(
    world, features, tmp_path, monkeypatch, capsys, kind
):
    folder = world[0] if kind == "logits" else features[0]
    data = tmp_path / "data"
    data.symlink_to(folder / "data")
    command = ["validate", folder / "jmp", "--data", data, "--against", folder / "dense"]
    command += ["--workers", "2", "--json", tmp_path / "v.json"]
    whole = run(*command)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 20)
        (tmp_path / "v.json").unlink()
        assert main([str(word) for word in command]) == 130
    err = capsys.readouterr().err
    assert "v.state.npz holds what was measured: go on with --resume" in err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"data", "v.state.npz"}  # nothing half-written
    fails(capsys, *command[:-2], "--state", tmp_path / "v.state.npz", "--resume", "--batch", "2",
          message="is the state of another run: another --batch: 4 there, 2 here")  # fmt: skip
    resumed = run(*command[:-2], "--resume", *command[-2:])
    assert resumed["resumed_batches"] >= 5
    assert validation.lasting(resumed) == validation.lasting(whole)
    assert not (tmp_path / "v.state.npz").exists()


def test_resume_without_a_state_starts_from_the_beginning(world, tmp_path, capsys):
    folder, _, _ = world
    command = ["validate", folder / "jmp", "--data", folder / "data", "--resume"]
    assert run(*command, "--json", tmp_path / "v.json")["n"] == 120
    for content in (b"", b"PK\x03\x04 cut", b"no archive"):
        (tmp_path / "v.state.npz").write_bytes(content)
        fails(capsys, *command, "--json", tmp_path / "v.json", message="is not a state")


def test_ctrl_c_in_the_whole_process_group_is_one_line(world, tmp_path):
    """What a terminal does: workers get the signal too, even while they start."""
    folder, _, _ = world
    data = tmp_path / "data" / "1"
    data.mkdir(parents=True)
    Image.new("RGB", (1500, 1500)).save(tmp_path / "large.png")
    for place in range(400):
        (data / f"{place}.png").symlink_to(tmp_path / "large.png")
    command = [sys.executable, "-m", "jmp_deploy", "validate", str(folder / "jmp")]
    command += ["--data", str(tmp_path / "data"), "--workers", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ended = time.monotonic() + 60
    while len(children.read_text().split()) < 3 and time.monotonic() < ended:
        time.sleep(0.02)  # the tracker of resources and two workers
    pids = children.read_text().split()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "error: interrupted" in err and "leaked" not in err
    assert gone(pids)


def test_workers_do_not_outlive_a_parent_that_was_killed(world, tmp_path):
    code = "import os, signal, sys, time; from pathlib import Path\n"
    code += "from jmp_deploy.validate.loader import batches\n"
    code += "from jmp_deploy.core.images import Preprocess\n"
    code += "if __name__ == '__main__':\n"
    code += "    spec = Preprocess(8, 8, 8, 'bicubic', 'center', (0.5,) * 3, (0.5,) * 3)\n"
    code += "    loaded = batches([[Path(sys.argv[1])]] * 9, spec, 1); next(loaded)\n"
    code += "    tasks = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text()\n"
    code += "    print(tasks, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    image = next((world[0] / "data").rglob("*.png"))
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(image)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    pids = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    assert gone(pids)


def gone(pids, seconds=20):
    """Whether the processes end in time; one that only waits to be reaped has ended."""
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not [s for s in states if s.exists() and ") Z " not in s.read_text()]:
            return True
        time.sleep(0.05)
    return False


def test_where_shared_memory_is_small_images_come_through_the_pipe(world, tmp_path, monkeypatch):
    folder, _, _ = world
    command = ["validate", folder / "jmp", "--data", folder / "data", "--shard", "1/1"]
    command += ["--workers", "2", "--json", tmp_path / "v.json"]
    shared = run(*command)
    asked = []

    def small(path):
        asked.append(path)
        return os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))

    monkeypatch.setattr(loader.os, "statvfs", small)
    assert run(*command)["shard"]["rows"] == shared["shard"]["rows"] and asked == ["/dev/shm"]


def test_a_worker_that_dies_is_reported(world, monkeypatch, capsys):
    folder, _, _ = world
    monkeypatch.setattr(loader, "_task", validation.die)
    command = ("validate", folder / "jmp", "--data", folder / "data", "--workers", "1")
    assert "fewer --workers" in fails(capsys, *command, message="a worker process")


# --- The real thing ------------------------------------------------------------------------------


def test_a_vision_transformer_with_jmp_against_pytorch(built, photos, tmp_path):
    """DeiT-Ti with JMP on photos labelled by what PyTorch says: 100 %, but for FP16's near ties."""
    import torch

    from jmp_deploy.core.images import load_batch
    from jmp_deploy.jmp.models import restore_model

    found = Artifact.read(built)
    batch = load_batch(photos, found.preprocess)
    said = restore_model(found)(torch.from_numpy(batch)).argmax(-1).tolist()
    synsets = found.synsets
    assert len(synsets) == 1000 and synsets[:2] == ("n01440764", "n01443537")
    for photo, label in zip(photos, said, strict=True):
        folder = tmp_path / "data" / synsets[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).write_bytes(photo.read_bytes())
    found = run("validate", built, "--data", tmp_path / "data", "--json", tmp_path / "v.json")
    assert found["labels"] == "ImageNet synsets" and found["n"] == len(photos)
    assert found["top1"] >= 80 and found["top5"] == 100
