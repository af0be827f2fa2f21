"""Every kind of file that a command reads, spoiled in every way that `mutations` knows: one clear
message, no "unexpected", nothing odd on the terminal, and no waiting.

A seeded sample of the mutations runs here; all of them with JMP_DEPLOY_MUTATIONS=all.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmp_deploy.cli.main import main
from jmp_deploy.core import artifact
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import JmpDeployError, fail
from jmp_deploy.core.files import sha256
from jmp_deploy.core.manifest import Check, EngineOptions, Quantization, Speed, Stage
from jmp_deploy.jmp import latency, schedule
from jmp_deploy.quantize import cache
from jmp_deploy.quantize.ranges import Range
from jmp_deploy.tune.measure import State
from tests.fakes import mutations, validation
from tests.fakes.artifacts import ENGINE
from tests.fakes.mutations import Mutation
from tests.jmp.test_schedule import DEIT_S

SAMPLE = 25
"""Mutations of each kind that run by default."""
PATIENCE = 10
"""Seconds after which a command counts as hanging."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: where it lies, below the world's folder.
        mutations: of it.
        read: what reads it; returns an exit code.
        written: called after a mutation was written, for what stands elsewhere about the file.
    """

    file: str
    mutations: Callable[[Path], Iterator[Mutation]]
    read: Callable[[Path], int]
    written: Callable[[Path], None] = lambda folder: None


def command(*words: str) -> Callable[[Path], int]:
    """A command on the world; "@" stands for its folder."""
    return lambda folder: main([word.replace("@", str(folder)) for word in words])


def commands(*several: Callable[[Path], int]) -> Callable[[Path], int]:
    return lambda folder: max(one(folder) for one in several)


def function(read: Callable[[Path], Any]) -> Callable[[Path], int]:
    """A reader behind a command that would have to load a model first; ends as `main` does."""

    def run(folder: Path) -> int:
        try:
            read(folder)
        except JmpDeployError as error:
            return fail(error.message, error.hint, error.exit_code)
        return 0

    return run


def document(name: str) -> Callable[[Path], Iterator[Mutation]]:
    return lambda folder: mutations.of_json(json.loads((folder / name).read_text()))


def archive(name: str) -> Callable[[Path], Iterator[Mutation]]:
    return lambda folder: mutations.of_npz(dict(np.load(folder / name)))


def content(name: str) -> Callable[[Path], Iterator[Mutation]]:
    return lambda folder: mutations.of_bytes((folder / name).read_bytes())


def manifest_follows(folder: Path) -> None:
    """The manifest of who spoils a file on purpose says what is in it."""
    found = json.loads((folder / "a" / artifact.FILE).read_text())
    for name, entry in found["files"].items():
        path = folder / "a" / name
        entry.update(sha256=sha256(path), bytes=path.stat().st_size)
    (folder / "a" / artifact.FILE).write_text(json.dumps(found))


def digest_follows(folder: Path) -> None:
    """The digest of a calibration cache is that of what it holds."""
    path = folder / "calibration.json"
    try:
        data = json.loads(path.read_text())
        data.pop("sha256")
        path.write_text(json.dumps({**data, "sha256": cache._digest(data)}))
    except Exception:  # no JSON any more, or none that can be written again
        return


def resumed_state(folder: Path) -> Iterator[Mutation]:
    """A state's archive, and the JSON in its header."""
    arrays = dict(np.load(folder / "state.npz"))
    yield from mutations.of_npz(arrays)
    header = json.loads(str(arrays["header"]))
    for name, spoiled in mutations.of_json(header):
        text = np.array(spoiled.decode("utf-8", "replace").replace("\0", " "))
        yield f"header: {name}", mutations.npz({**arrays, "header": text})


VALIDATE = ("validate", "@/a", "--data", "@/data", "--workers", "0", "--allow-random")
RUN = ("run", "@/a", "@/data/0", "--backend", "onnxruntime")
KINDS = {
    "manifest": Kind(
        "a/manifest.json",
        document("a/manifest.json"),
        commands(command("report", "@/a"), command(*RUN), command(*VALIDATE)),
    ),
    "reference": Kind(
        "a/reference.npz",
        archive("a/reference.npz"),
        commands(command("compare", "@/a"), command(*VALIDATE, "--state", "@/none.npz")),
        manifest_follows,
    ),
    "model": Kind("a/model.onnx", content("a/model.onnx"), command(*RUN), manifest_follows),
    "onnx": Kind("a/model.onnx", content("a/model.onnx"), command("inspect", "@/a/model.onnx")),
    "shard": Kind("part1.json", document("part1.json"), command("merge", "@/part1.json")),
    "state": Kind(
        "state.npz", resumed_state, command(*VALIDATE, "--resume", "--state", "@/state.npz")
    ),
    "labels": Kind(
        "labels.csv",
        lambda folder: mutations.of_lines((folder / "labels.csv").read_text()),
        command(*VALIDATE, "--labels", "@/labels.csv"),
    ),
    "compared": Kind(
        "compare.json",
        document("compare.json"),
        command("report", "@/a", "--compare", "@/compare.json"),
    ),
    "latency table": Kind(
        "table.json",
        document("table.json"),
        function(lambda folder: latency.read(folder / "table.json", DEIT_S)),
    ),
    "schedule": Kind(
        "schedule.json",
        document("schedule.json"),
        function(lambda folder: schedule.parse(str(folder / "schedule.json"), DEIT_S)),
    ),
    "calibration cache": Kind(
        "calibration.json",
        document("calibration.json"),
        function(lambda folder: read_cache(folder / "calibration.json")),
        digest_follows,
    ),
    "state of tune": Kind(
        "tune.state",
        document("tune.state"),
        function(lambda folder: State(folder / "tune.state", "key", resume=True)),
    ),
    "image": Kind("data/0/00000.png", content("data/0/00000.png"), command(*RUN)),
}


def read_cache(path: Path) -> None:
    cache.check(path, cache.read(path), {"model": "m", "jmp": {"tau": 0.5}, "image_size": 8})


def make_world(folder: Path) -> None:
    """One good file of each kind."""
    validation.write_images(folder / "data", np.repeat(np.arange(10), 2))
    written = validation.write_artifact(folder / "a", validation.weights(10))
    (written / artifact.ENGINE).write_bytes(b"plan")
    made = Artifact.read(written)
    pair = {"a": "torch", "b": "onnxruntime", "output": "logits", "precision": "fp32"}
    pair |= {"cosine": 1.0, "max_abs": 0.0, "top1_agreement": 1.0, "ok": True}
    row = {"name": "head", "kept": True, "measured": True, "points": 0.1, "noise": 0.5}
    sensitivity = {
        "ranking": [{**row, "macs_share": 0.1}],
        "precision": "int8",
        "all_quantized": {"noise": 1.0, "points": 1.0},
        "groups": [{"name": "fc1", "noise": 0.5}],
        "measure": "points",
        "images": 8,
        "flips": None,
        "drop": 0.1,
        "budget": 0.3,
        "macs_share": 0.9,
    }
    quantized = Quantization(
        "max",
        {"count": 8, "source": "photos", "demonstration": False, "warnings": ["few"]},
        {"blocks.0.fc2": "why", "blocks.1.fc2": "why", "head": "why"},
        sensitivity=sensitivity,
        layers=4,
        layers_quantized=1,
        weights_bytes={"INT8": 10, "FLOAT16": 10},
        activations_bytes={"int8": 10, "fp16": 20},
        speed=Speed("fp16", "as fast", 1.0, {"int8": 1.0, "fp16": 1.0}),
        engine_bytes={"int8": 1},
    )
    replace(
        made,
        precision="int8",
        engine=ENGINE,
        engine_options=EngineOptions(("sm_86",), 256),
        no_engine=None,
        int8=quantized,
        class_names=tuple(f"class {index}" for index in range(10)),
        check=Check(True, ("r0",), (pair,), {"torch": 1.0}),
        stages=(Stage("fuse", 0.5),),
        tools={"torch": "2.14.1"},
    ).write()
    labels = [f"{path.parent.name}/{path.name},{path.parent.name}" for path in images(folder)]
    (folder / "labels.csv").write_text("\n".join(labels))
    assert command("compare", "@/a", "--json", "@/compare.json")(folder) in (0, 1)
    words = [word.replace("@", str(folder)) for word in VALIDATE]
    assert main([*words, "--shard", "1/1", "--json", str(folder / "part1.json")]) == 0
    keep_state(words, folder / "state.npz")
    rows = [
        {"batch": 1, "tokens": tokens, "attn_ms": tokens / 100, "mlp_ms": tokens / 50}
        for tokens in (197, 150, 100, 50)
    ]
    table = {"format": latency.FORMAT, "model": DEIT_S.name, "depth": 12, "num_prefix": 1}
    table |= {"num_patches": 196, "device": "Orin", "other_ms": {"1": 0.5}, "rows": rows}
    (folder / "table.json").write_text(json.dumps(table))
    steps = {"model": DEIT_S.name, "steps": [[3, 138], [6, 97]], "tau": 0.7, "merge_weight": 0.4}
    steps |= {"selection": "distinct", "last_prefix_only": True}
    (folder / "schedule.json").write_text(json.dumps(steps))
    made_cache = cache.Calibration(
        identity={"model": "m", "jmp": {"tau": 0.5}, "image_size": 8},
        method="percentile:99.99",
        images={"count": 3, "demonstration": False, "source": "x", "warnings": []},
        ranges={"blocks.0.qkv": Range(1 / 3, 0.25, 0.0078125, 196.0, 48)},
        keep_fp16={"head": "recipe default"},
        equalization={"blocks.0.qkv": [0.25, 1.0, 8.0]},
    )
    cache.write(folder / "calibration.json", made_cache)
    (folder / "tune.state").write_text(json.dumps({"key": "key", "known": {"196,5 0.7": [0.5]}}))


def keep_state(words: list[str], state: Path) -> None:
    """The state of a run that was stopped."""
    from jmp_deploy.validate import validate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate.State, "remove", lambda self: self.save())
        assert main([*words, "--state", str(state)]) == 0


def images(folder: Path) -> list[Path]:
    return sorted((folder / "data").rglob("*.png"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    make_world(folder)
    return folder


def chosen(kind: str, folder: Path) -> list[Mutation]:
    every = list(KINDS[kind].mutations(folder))
    if os.environ.get("JMP_DEPLOY_MUTATIONS") == "all":
        return every
    order = np.random.default_rng(sorted(KINDS).index(kind)).permutation(len(every))
    return [every[index] for index in order[:SAMPLE]]


def hang(number: int, frame: Any) -> None:
    raise TimeoutError("it hangs")


def ends_badly(read: Callable[[Path], int], folder: Path, capfd) -> str | None:
    """Why, or None where it ends as it should."""
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(PATIENCE)
    try:
        code = read(folder)
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    shown = capfd.readouterr()
    odd = next((line for line in shown.err.splitlines() if "unexpected" in line), None)
    if odd or "Traceback" in shown.err:
        return odd or "a traceback"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    said = [line for line in shown.err.splitlines() if "error: " in line]
    if code == 2 and not said:
        return f"exit code 2 without a word: {shown.err[:80]!r}"
    text = shown.out + shown.err
    if not text.replace("\n", "").isprintable():
        return f"control characters reach the terminal: {text!r:.80}"
    return None


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_ordinary_file_is_not_waited_for(world, name, capfd):
    kind = KINDS[name]
    path = world / kind.file
    kept = path.rename(path.with_name("kept"))
    try:
        for make in (os.mkfifo, os.mkdir, lambda place: place.symlink_to(place)):
            make(path)
            if name != "image" or make is not os.mkdir:  # a folder of images is one
                assert ends_badly(kind.read, world, capfd) is None
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)  # a state goes when a run is complete
    finally:
        kept.rename(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_spoiled_file_ends_in_one_clear_message(world, name, capfd):
    kind, bad = KINDS[name], {}
    path, manifest = world / kind.file, world / "a" / artifact.FILE
    whole, said = path.read_bytes(), manifest.read_bytes()
    spoiled_files = chosen(name, world)
    try:
        assert ends_badly(kind.read, world, capfd) is None
        for mutation, spoiled in spoiled_files:
            path.write_bytes(spoiled)
            kind.written(world)
            if why := ends_badly(kind.read, world, capfd):
                bad[mutation] = why
            if path != manifest:
                manifest.write_bytes(said)
    finally:
        path.write_bytes(whole)
        manifest.write_bytes(said)
    assert not bad, "\n".join([f"{len(bad)} end badly:", *(f"{k}: {v}" for k, v in bad.items())])
