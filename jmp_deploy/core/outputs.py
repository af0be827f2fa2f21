"""What leaves a model: logits, probabilities, features, those of every patch.

How two are compared, how one is shown. In core because a device, which runs engines without
PyTorch, shows outputs too.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .errors import ModelError, one_line
from .stats import sigmoid, softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOPK = 5


@dataclass(frozen=True)
class Output(ABC):
    """A kind of output.

    Attributes:
        axes: of its shape.
        name: in ONNX models, engines and manifests.
        classifies: its values rank classes.
        heading: of `words`, in a table.
    """

    axes: ClassVar[tuple[str, ...]] = ("B", "D")

    name: str
    classifies: bool
    heading: str

    def judged(self, values: NDArray[Any]) -> NDArray[Any]:
        """What a comparison looks at, [B, D] in float64; `differences` gets this."""
        return values

    @abstractmethod
    def differences(self, x: NDArray[Any], y: NDArray[Any]) -> dict[str, Any]:
        """What a change from x to y, float64, means beyond its size: figures of `measures.Pair`."""

    @abstractmethod
    def answer(
        self,
        row: NDArray[Any],
        class_names: Sequence[str] | None = None,
        topk: int = TOPK,
        *,
        multi_label: bool = False,
    ) -> dict[str, Any]:
        """One image's output, [D] or what `axes` say, as a record for JSON.

        Args:
            multi_label: each value is a question of its own: its score is a sigmoid, as it is for
                a single class.
        """

    @abstractmethod
    def words(self, answer: dict[str, Any]) -> str:
        """Such a record in lines for people."""


class Logits(Output):
    """[B, classes] before the softmax."""

    def differences(self, x: NDArray[Any], y: NDArray[Any]) -> dict[str, Any]:
        k = min(TOPK, x.shape[1])
        best = [np.argsort(-v, axis=1, kind="stable")[:, :k] for v in (x, y)]
        shared = [len(np.intersect1d(p, q)) / k for p, q in zip(*best, strict=True)]
        log_p, log_q = _log_softmax(x), _log_softmax(y)
        divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        return {
            "top1_agreement": float((best[0][:, 0] == best[1][:, 0]).mean()),
            "top5_agreement": float(np.mean(shared)),
            "kl_mean": float(divergence.mean()),
            "kl_max": float(divergence.max()),
        }

    def answer(
        self,
        row: NDArray[Any],
        class_names: Sequence[str] | None = None,
        topk: int = TOPK,
        *,
        multi_label: bool = False,
    ) -> dict[str, Any]:
        names = class_names or ()
        scores = self._scores(np.asarray(row, dtype=np.float64), multi_label)
        return {
            "top": [
                {
                    "index": int(index),
                    "label": names[index] if index < len(names) else str(index),
                    "score": float(scores[index]),
                }
                for index in np.argsort(-scores, kind="stable")[:topk]
            ]
        }

    def _scores(self, values: NDArray[Any], multi_label: bool) -> NDArray[Any]:
        # The softmax of one value is 1 whatever it is.
        return sigmoid(values) if multi_label or len(values) == 1 else softmax(values)

    def words(self, answer: dict[str, Any]) -> str:
        return "\n".join(f"{entry['score']:6.1%}  {entry['label']}" for entry in answer["top"])


class Probabilities(Logits):
    """[B, classes] after the softmax: of a model that was built with it."""

    def judged(self, values: NDArray[Any]) -> NDArray[Any]:
        """Their logarithms, centred: the logits but for a constant, so that the tolerances of
        logits hold. (Of the probabilities themselves a cosine sees the largest alone, and of those
        of untrained weights nothing.) What FP32 has as 0 counts as its smallest normal number."""
        logs = np.log(np.maximum(values, np.finfo(np.float32).tiny))
        return np.asarray(logs - logs.mean(axis=1, keepdims=True))

    def _scores(self, values: NDArray[Any], multi_label: bool) -> NDArray[Any]:
        return values


class Features(Output):
    """[B, C], what a classifier would read."""

    def differences(self, x: NDArray[Any], y: NDArray[Any]) -> dict[str, Any]:
        return {"top1_agreement": None}

    def answer(
        self,
        row: NDArray[Any],
        class_names: Sequence[str] | None = None,
        topk: int = TOPK,
        *,
        multi_label: bool = False,
    ) -> dict[str, Any]:
        return {"features": [float(value) for value in row]}

    def words(self, answer: dict[str, Any]) -> str:
        values = answer["features"]
        norm = math.sqrt(sum(v * v for v in values))
        head = ", ".join(f"{v:.3f}" for v in values[:4])
        return f"[{head}, ...] {len(values)} values, norm {norm:.3f}"


@dataclass(frozen=True)
class Dense(Features):
    """[B, M, C], features of each patch of the image, row by row.

    Attributes:
        layer: the block that they leave; None for the last, as `forward_features` gives them.
        normed: by the model's last norm.
    """

    axes = ("B", "M", "C")

    layer: int | None = None
    normed: bool = True

    def answer(
        self,
        row: NDArray[Any],
        class_names: Sequence[str] | None = None,
        topk: int = TOPK,
        *,
        multi_label: bool = False,
    ) -> dict[str, Any]:
        lengths = np.linalg.norm(np.asarray(row, np.float64), axis=1)
        patches, channels = row.shape
        return {"patches": patches, "channels": channels, "mean_norm": float(lengths.mean())}

    def words(self, answer: dict[str, Any]) -> str:
        return (
            f"{answer['patches']} patches of {answer['channels']} values, "
            f"mean norm {answer['mean_norm']:.3f}"
        )


OF_PATCHES = "features of the patches"
LOGITS = Logits("logits", classifies=True, heading="top classes")
PROBABILITIES = Probabilities("probabilities", classifies=True, heading="top classes")
FEATURES = Features("features", classifies=False, heading="features")
DENSE = Dense("dense", classifies=False, heading=OF_PATCHES)
OUTPUTS = {output.name: output for output in (LOGITS, PROBABILITIES, FEATURES, DENSE)}
POOLED = "pooled"
"""What the model itself gives, where outputs are asked for."""
_LAYER = re.compile(r"(dense|raw)_(0|[1-9][0-9]{0,3})")
_WORD = re.compile(rf"({POOLED})|({DENSE.name})|(?:(dense|raw):)?(0|[1-9][0-9]{{0,3}})")


def asked(spelling: str, blocks: int | None = None) -> tuple[str, ...]:
    """Names of the outputs that `--output` asks for: "pooled", "dense", "dense:3,6,9,11" (blocks,
    counted from 0), "raw:3", or several, as "dense,pooled"; `POOLED` stands for what the model
    gives, and comes first.

    Args:
        blocks: how many the model has, where that is known.

    Raises:
        ModelError: it is not spelled so, names an output twice or a block that is not there, or
            leaves blocks to compute what nobody reads.
    """
    names: list[str] = []
    kind = ""
    for word in spelling.split(","):
        found = _WORD.fullmatch(word)
        pooled, dense, begins, layer = found.groups() if found else (None,) * 4
        kind = begins or (kind if layer else "")
        if not found or (layer and not kind):
            raise ModelError(
                f"--output {one_line(spelling)} asks for no output that there is",
                "pooled, dense, dense:3,6,9,11 (of blocks, counted from 0), raw:3,6,9,11 (without "
                "the last norm), or several: dense,pooled",
            )
        names.append(pooled or dense or f"{kind}_{layer}")
    if len(set(names)) < len(names):
        raise ModelError(f"--output {spelling} names an output twice", "name each once")
    if blocks is not None:
        _refuse_layers(spelling, names, blocks - 1)
    return tuple(sorted(names, key=lambda name: name != POOLED))


def _refuse_layers(spelling: str, names: Sequence[str], last: int) -> None:
    found = [output for output in map(known_output, names) if isinstance(output, Dense)]
    layers = [output.layer for output in found if output.layer is not None]
    if far := [f"{layer}" for layer in layers if layer > last]:
        raise ModelError(f"the model has blocks 0 to {last}, not {', '.join(far)}")
    if last not in layers and not {POOLED, DENSE.name} & {*names}:
        raise ModelError(
            f"--output {spelling} reads nothing behind block {max(layers)}, and the blocks after "
            "it would compute for nobody",
            f"ask for the last one too: --output {spelling},{last}",
        )
    if {DENSE.name, f"{DENSE.name}_{last}"} <= {*names}:
        raise ModelError(f"{DENSE.name} is that of block {last}", f"leave out {last}")


def output_of(model: Any) -> Output:
    """What a timm model gives."""
    return LOGITS if model.num_classes > 0 else FEATURES


def output_named(name: str) -> Output:
    """The output that a file calls so; one that is not ours counts as logits."""
    return known_output(name) or replace(LOGITS, name=name)


def known_output(name: str) -> Output | None:
    """The output of this name, if it is one of ours."""
    if found := _LAYER.fullmatch(name):
        kind, layer = found.groups()
        of = f"{OF_PATCHES}, block {layer}"
        normed = kind == DENSE.name
        return Dense(name, classifies=False, heading=of, layer=int(layer), normed=normed)
    return OUTPUTS.get(name)


def _log_softmax(values: NDArray[Any]) -> NDArray[Any]:
    shifted = values - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
