"""Accuracy of INT8 and FP8 against FP16 and FP32, dense and with JMP.

    # the tables of benchmarks/results/int8-validation.md; about a quarter of an hour on two cores
    python scripts/demo_weights.py artifacts/weights/dinov2_s.safetensors
    python benchmarks/quantized.py --weights artifacts/weights/dinov2_s.safetensors \
        --cache /tmp/int8 -o benchmarks/results/int8-validation

    # INT8, with attention too, and FP8 by their recipes, and what each layer costs alone
    python benchmarks/quantized.py --weights artifacts/weights/dinov2_s.safetensors \
        --cache /tmp/int8 --precisions "FP32,FP16,INT8,INT8 attention,FP8" --alone 4 \
        --calib-images 64 --limit 100 -o benchmarks/results/fp8-validation

    # does everything run? (random weights: the figures mean nothing)
    python benchmarks/quantized.py --weights random --limit 4 --calib-images 8 --forms dense

    # your own classifier on ImageNet's validation images (DIR/CLASS/IMAGE)
    python benchmarks/quantized.py --model deit_s --weights FILE.pth --data-dir val --limit 2000

Precisions: FP32; FP16; INT8 and FP8 as `build --precision int8` and `fp8` make them by the recipe
of the model's family; INT8 with `--int8-attention`; each of them with the layers in FP16 that
`--max-drop` measures ("mixed"). All run
in ONNX Runtime on the CPU, INT8 and FP8 in their form with FP32 for the rest: the same scales and
numbers as the product.

What judges: a linear probe and nearest neighbours fitted to dense FP32 features of training images
(`accuracy.py` has the data), or the model's own classifier with --data-dir. Differences are paired,
over the same images, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib import command
from jmp_deploy.core.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.lib.data import Samples, Task
    from jmp_deploy.core.images import Preprocess
    from jmp_deploy.jmp.models import LoadedModel
    from jmp_deploy.quantize.formats import Format

FORMS = ("dense", "jmp")
PRECISIONS = (
    *("FP32", "FP16", "INT8", "INT8 mixed", "INT8 attention", "INT8 attention mixed"),
    *("FP8", "FP8 mixed"),
)
DEFAULT = "FP32,FP16,INT8,INT8 mixed"
BATCH = 8


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="benchmarks/quantized.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", default="dinov2_s", help="short or timm name (dinov2_s)")
    add("--weights", default="auto", help="auto, pretrained, random, or a checkpoint's path (auto)")
    add("--schedule", default="spread", help="of the JMP form, as for build (spread)")
    add("--forms", default="dense,jmp", help="dense, jmp or both (dense,jmp)")
    add("--precisions", default=DEFAULT, help=f"which, FP32 first ({DEFAULT})")
    add("--alone", type=int, help="calibration images for what each layer costs alone (none)")
    add("--part", choices=("validation", "test"), default="validation", help="which images judge")
    add("--calib", default="sample", help="calibration images: a folder, or sample (sample)")
    add("--calib-images", type=int, default=256, help="how many (256)")
    add("--max-drop", type=float, default=0.3, help="points, for the mixed form (0.3)")
    add("--data-dir", type=Path, help="DIR/CLASS/IMAGE instead of digits and photo crops")
    add(
        "--limit", type=int, help="images that judge, at most, of each task (of --data-dir, in all)"
    )
    add("--seed", type=int, default=0, help="of the split, the crops and the bootstrap (0)")
    add("--cache", type=Path, help="folder that keeps models and features; a cut run goes on")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of ONNX Runtime (all)")
    add("-o", "--output", type=Path, help="without suffix: writes .json, .md and plots")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    options = parser().parse_args(arguments)

    def work() -> None:
        with _folder(options.cache) as folder:
            run(options, folder)

    return command.exit_code(work)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything between the parsed options and the written files; returns the JSON's content."""
    from benchmarks.lib import measures
    from benchmarks.lib import quantized_report as report
    from jmp_deploy.core.outputs import output_of
    from jmp_deploy.jmp.models import load_model

    forms = options.forms.split(",")
    if not forms or set(forms) - set(FORMS):
        raise ModelError(f"--forms {options.forms!r}", "dense, jmp, or dense,jmp")
    forms.sort()  # dense first: it is the reference
    precisions = options.precisions.split(",")
    if set(precisions) - set(PRECISIONS):
        raise ModelError(f"--precisions {options.precisions!r}", f"some of {', '.join(PRECISIONS)}")
    precisions.sort(key=PRECISIONS.index)  # FP16 before what is held against it
    loaded = load_model(options.model, options.weights, seed=options.seed)
    if loaded.origin.kind == "random":
        print("warning: random weights: the figures below mean nothing", file=sys.stderr)
    head = options.data_dir is not None and output_of(loaded.model).classifies
    if not head:
        loaded.model.reset_classifier(0)  # digits have no class among ImageNet's
    tasks = _tasks(options)
    judged = {task.name: getattr(task, options.part) for task in tasks}
    store = _Store(folder, loaded.preprocess, options.threads)

    models = {form: Models(form, loaded, options, store) for form in forms}
    dense = models.get("dense") or Models("dense", loaded, options, store)
    reference = {name: store.outputs(dense.fp32, samples) for name, samples in judged.items()}
    probes = {
        task.name: None
        if head
        else measures.fit_probe(store.outputs(dense.fp32, task.train), task.train.labels)
        for task in tasks
    }
    result: dict[str, Any] = {
        "model": loaded.name,
        "weights": command.weights_facts(loaded.origin),
        "judge": "own classifier" if head else "probe",
        "part": options.part,
        "seed": options.seed,
        "max_drop": options.max_drop,
        "calibration": {},
        "schedule": options.schedule,
        "data": {t.name: {"train": len(t.train), "judged": len(judged[t.name])} for t in tasks},
        "tools": _versions(),
        "sensitivity": {},
        "alone": {},
        "rows": [],
    }
    for form in forms:
        plain: dict[str, dict[str, NDArray[Any]]] = {}
        for precision in precisions:
            started = time.perf_counter()
            path, facts = models[form].make(precision)
            row: dict[str, Any] = {"form": form, "precision": precision, **facts}
            if "sensitivity" in row:
                result["sensitivity"][_key(form, precision)] = row.pop("sensitivity")
            if "alone" in row:
                result["alone"][f"{form} {precision}"] = row.pop("alone")
            if "calibration" in row:
                result["calibration"] = row.pop("calibration")
            plain[precision] = {}
            for name, samples in judged.items():
                found = plain[precision][name] = store.outputs(path, samples)
                args = samples.labels, probes[name]
                over: dict[str, Any] = {"seed": options.seed, "pictures": samples.pictures}
                row[name] = measures.compare(reference[name], found, *args, **over)
                if "FP16" in plain and precision not in ("FP32", "FP16"):
                    twin = plain["FP16"][name]
                    beyond = measures.compare(twin, found, *args, **over)
                    beyond["expected"] = _expected(twin, found, probes[name])
                    row[name]["beyond_fp16"] = beyond
            result["rows"].append(row)
            print(report.line(row, list(judged), time.perf_counter() - started), flush=True)
            if options.output:  # after every row, so that a cut run leaves what it has
                report.write(options.output, result)
    if options.output:
        for path in report.write(options.output, result, plots=True):
            print(f"written    {path}")
    else:
        print(report.table(result))
    return result


class Models:
    """The models of one form, each made once and kept in the store.

    Args:
        form: of FORMS.
        loaded: dense; patched for a moment and dense again.
    """

    def __init__(
        self, form: str, loaded: LoadedModel, options: argparse.Namespace, store: _Store
    ) -> None:
        from jmp_deploy.core.files import sha256
        from jmp_deploy.core.manifest import Jmp
        from jmp_deploy.export import export
        from jmp_deploy.jmp import schedule
        from jmp_deploy.jmp.patch import model_shape, patch, unpatch

        self.form, self.loaded, self.options, self.store = form, loaded, options, store
        self.jmp: Jmp | None = None
        size = loaded.preprocess.height, loaded.preprocess.width
        with tempfile.TemporaryDirectory(dir=store.folder) as folder:
            path = Path(folder) / "fp32.onnx"
            if form == "jmp":
                shape = model_shape(loaded.model)
                steps = schedule.parse(options.schedule, shape)
                patch(loaded.model, steps)
                self.jmp = schedule.to_manifest(steps)
                self.macs = schedule.macs(shape, steps)
            else:
                self.macs = schedule.macs(model_shape(loaded.model))
            try:
                export.export_onnx(loaded.model, path, image_size=size)
            finally:
                if form == "jmp":
                    unpatch(loaded.model)
            # What was exported names all that is made of it: weights, schedule, rule.
            self.key = sha256(path)[:16]
            self.fp32 = store.folder / f"{self.key}-fp32.onnx"
            path.replace(self.fp32)

    def make(self, precision: str) -> tuple[Path, dict[str, Any]]:
        """The model to run, and the facts about it."""
        from jmp_deploy.export.precision import to_low

        if precision == "FP32":
            return self.fp32, {}
        if precision == "FP16":
            target = self.store.folder / f"{self.key}-fp16.onnx"
            if not target.is_file():
                to_low(self.fp32, target, "fp16")
            return target, {}
        name, *words = precision.lower().split()
        return self._quantized(name, "attention" in words, mixed="mixed" in words)

    def _quantized(
        self, precision: str, attention: bool, *, mixed: bool
    ) -> tuple[Path, dict[str, Any]]:
        """As the build makes it: ranges by the recipe, the mixed form with the same ranges."""
        import json

        from jmp_deploy.core.files import write_json
        from jmp_deploy.quantize import cache as calibration_cache
        from jmp_deploy.quantize import qdq, stage

        options = self.options
        base = [options.calib, options.calib_images, options.seed, attention, _code()]
        name = f"{self.key}-{precision}-{_digest(base)}"
        ranges = self.store.folder / f"{name}.calibration.json"
        if mixed:
            name += f"-{options.max_drop:g}"
        target, facts_path = (self.store.folder / f"{name}{end}" for end in (".onnx", ".json"))
        if target.is_file() and facts_path.is_file():
            return target, json.loads(facts_path.read_text())
        if mixed and not ranges.is_file():
            self._quantized(precision, attention, mixed=False)
        asked = stage.QuantizeOptions(
            calib=options.calib,
            images=options.calib_images,
            cache=ranges if mixed else None,
            attention=attention,
            max_drop=options.max_drop if mixed else None,
        )
        made_in = asked.form(precision)
        assert made_in is not None
        with tempfile.TemporaryDirectory(dir=self.store.folder) as folder:
            fp32 = Path(folder) / "fp32.onnx"
            shutil.copy(self.fp32, fp32)
            made = stage.calibrate(
                made_in, asked, self.loaded, fp32, self.jmp, seed=options.seed, on_progress=_Lines()
            )
            # the product, for its facts; what is run has the same numbers, and FP32 for the rest
            stage.quantize(made, fp32, Path(folder) / "product.onnx", macs=self.macs)
            kept, scales = set(made.calibration.keep_fp16), made.calibration.scales
            qdq.quantize(fp32, target, scales, made_in, keep_float=kept, half=False)
            alone = None if mixed or not options.alone else self._alone(fp32, scales, made_in)
        if not mixed:
            calibration_cache.write(ranges, made.calibration)
        facts: dict[str, Any] = {**made.facts, "keep_fp16": made.calibration.keep_fp16}
        facts["calibration"] = made.calibration.images
        if alone is not None:
            facts["alone"] = alone
        if made.sensitivity is not None:
            facts["sensitivity"] = made.sensitivity
        write_json(facts_path, facts)
        return target, facts

    def _alone(self, fp32: Path, scales: dict[str, float], made_in: Format) -> dict[str, float]:
        """Signal-to-noise ratio of the outputs, dB: each layer alone, each kind, and all."""
        import numpy as np

        from jmp_deploy.quantize import images
        from jmp_deploy.quantize.gated import Gated

        options = self.options
        pictures = images.gather(
            options.calib, self.loaded.preprocess, count=options.alone, seed=options.seed + 1
        ).first(options.alone)
        gated = Gated(fp32, scales, made_in)
        plain = gated.run((), pictures).astype(np.float64)
        groups = {layer.name: {layer.name} for layer in gated.layers}
        for layer in gated.layers:
            groups.setdefault(f"every {layer.kind}", set()).add(layer.name)
        groups["all"] = {layer.name for layer in gated.layers}
        noise = {
            name: np.square(gated.run(layers, pictures) - plain).sum()
            for name, layers in groups.items()
        }
        return {
            name: round(float(10 * np.log10(np.square(plain).sum() / value)), 1)
            for name, value in noise.items()
        }


class _Store:
    """A folder of models and of what they gave for images."""

    def __init__(self, folder: Path, spec: Preprocess, threads: int) -> None:
        self.folder, self.spec, self.threads = folder, spec, threads

    def outputs(self, model: Path, samples: Samples) -> NDArray[Any]:
        """[n, C] float64, computed once for a model file and images."""
        import numpy as np

        from benchmarks.lib.data import batch
        from jmp_deploy.core.files import atomic_path, sha256

        digest = hashlib.sha256(repr((sha256(model), self.spec)).encode())
        for image in samples.images:
            digest.update(image.tobytes())
        path = self.folder / f"{samples.name}-{digest.hexdigest()[:20]}.npy"
        if path.is_file():
            return np.load(path)
        session = self._session(model)
        name = session.get_inputs()[0].name
        rows = [
            session.run(None, {name: batch(samples.images[start : start + BATCH], self.spec)})[0]
            for start in range(0, len(samples), BATCH)
        ]
        found = np.concatenate(rows).astype(np.float64)
        with atomic_path(path) as temporary:
            np.save(temporary, found)
        return found

    def _session(self, model: Path) -> Any:
        from jmp_deploy.core import ort

        return ort.session(model, ort.EXACT_INT8, threads=self.threads)


class _Lines:
    """Progress in lines, one now and then."""

    def __init__(self, every: float = 30.0) -> None:
        self.every, self.printed = every, time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.printed > self.every:
            self.printed = now
            print(f"  {phase} {done}/{total}", file=sys.stderr, flush=True)


def _expected(before: NDArray[Any], after: NDArray[Any], probe: Any) -> dict[str, Any]:
    """The loss with the luck of single images averaged out, see quantize/sensitivity.py."""
    from dataclasses import asdict

    import numpy as np

    from jmp_deploy.quantize import sensitivity

    if probe is not None:
        # logarithms of probabilities are logits
        before, after = (np.log(probe.probabilities(x) + 1e-300) for x in (before, after))
    return asdict(sensitivity.estimate(before, after, classifies=True))


def _tasks(options: argparse.Namespace) -> list[Task]:
    from dataclasses import replace

    from benchmarks.lib import data

    if options.data_dir is not None:
        return [data.image_folder(options.data_dir, options.seed, options.limit)]
    tasks = [data.digits(options.seed), data.photo_crops(options.seed)]
    if options.limit is None:
        return tasks
    few: Callable[[Task, str], Samples] = lambda task, part: getattr(task, part).first(  # noqa: E731
        options.limit
    )
    return [replace(t, validation=few(t, "validation"), test=few(t, "test")) for t in tasks]


def _code() -> str:
    """A hash of what makes a quantized model, so that a changed rule is run again."""
    import jmp_deploy

    package = Path(str(jmp_deploy.__file__)).parent
    files = sorted((package / "quantize").glob("*.py"))
    files += sorted((package.parent / "calibration").glob("*.toml"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _key(form: str, precision: str) -> str:
    """What results of a form are called: INT8's by the form alone, as they always were."""
    return form if precision in ("INT8", "INT8 mixed") else f"{form} {precision}"


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnx", "onnxruntime", "torch", "timm")}


@contextmanager
def _folder(cache: Path | None) -> Iterator[Path]:
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        yield cache
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
