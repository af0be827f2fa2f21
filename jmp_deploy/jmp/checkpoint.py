"""A checkpoint file as some trainer left it -> one state dict, and what the file says besides.

Nothing in a file is executed: safetensors, or PyTorch's `weights_only` reader, which is told of a
few plain types more that trainers store beside the weights (`argparse.Namespace`, numpy scalars,
paths). Where the model's tensors stand is found by the name of the patch embedding, whatever was
wrapped around it: DistributedDataParallel, torch.compile, Lightning, DINO, averaged models.
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PosixPath, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import refuse_odd_strings
from ..core.errors import ArtifactError, WeightsError, one_line
from ..core.files import parse_json
from ..core.manifest import Recovered

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model", "module_ema", "teacher")
"""Names of averaged weights. timm's own reader and DINO's evaluation prefer them too."""
PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "module")
NOT_MODELS = ("optimizer", "optimizers", "optimizer_states", "lr_schedulers", "scheduler")
"""Parts of a file that hold tensors, but no model."""
BUFFERS = ("n_averaged", "num_batches_tracked")
"""What averaging and the like count beside the weights."""
HEADS = ("head", "fc", "classifier", "linear", "head_drop", "cls_head", "visual_projection")
"""Names under which trainers keep the classifier beside or in the model; timm's is the first."""
SETTINGS = ("args", "hyper_parameters", "hparams", "config", "cfg", "pretrained_cfg")
"""Where trainers keep what they were asked for."""
MOST_NESTED = 4
RECOVERED = "jmp_recover"
"""Key of `manifest.Recovered`, as JSON, in the metadata of a safetensors file."""


@dataclass(frozen=True)
class Checkpoint:
    """What was found in a file.

    Attributes:
        path: of the file.
        key: where in the file the state stands, e.g. "state_dict_ema" or "teacher.backbone"; empty
            if it is the whole file.
        others: the keys of other states of a model in the file.
        state: the model's tensors, by the names that the model itself has for them.
        left_out: names of tensors beside them that are no part of the model.
        trainer: plain settings that the trainer kept in the file.
        architecture: what the file says the model is.
        notes: what was decided, in sentences.
        recovered: what `recover` says of a file of its own.
    """

    path: Path
    key: str
    others: tuple[str, ...]
    state: dict[str, Tensor]
    left_out: tuple[str, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    notes: tuple[str, ...] = ()
    recovered: Recovered | None = None


@dataclass(frozen=True)
class _Found:
    """A candidate: all tensors of one dict in the file, and the model's prefix among them."""

    where: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.where, *self.prefix.split(".")[:-1])

    @property
    def key(self) -> str:
        return ".".join(self.parts)

    def rank(self) -> tuple[int, int, int]:
        """Averaged weights first, then what is called like a model, students last; in file order.

        The same choice as timm's `load_state_dict` where both know the names.
        """
        ema = min((EMA.index(part) for part in self.parts if part in EMA), default=len(EMA))
        plain = min((PLAIN.index(part) for part in self.parts if part in PLAIN), default=len(PLAIN))
        return "student" in self.parts, ema, plain


def read(
    path: Path, roots: Callable[[Mapping[str, Tensor]], list[str]], key: str | None = None
) -> Checkpoint:
    """Reads a checkpoint.

    Args:
        path: .safetensors, or a file of `torch.save`.
        roots: the prefixes under which a set of named tensors holds a model (see
            `families.roots`).
        key: which state to take, where the file has several: a name or the beginning of one.

    Raises:
        WeightsError: missing, truncated, holds pickled objects, or no state dict.
    """
    loaded = load(path)
    found = [
        _Found(where, prefix, tensors)
        for where, tensors in _tensors(loaded)
        for prefix in roots(tensors) or [""]
    ]
    if not found:
        kind = type(loaded).__name__
        raise WeightsError(
            f"{path} holds no state dict, but a {kind}{_keys(loaded)}",
            "save one with torch.save(model.state_dict(), FILE)",
        )
    with_model = [item for item in found if roots(item.tensors)] or found
    chosen = _choose(path, with_model, key)
    others = tuple(sorted({item.key for item in with_model} - {chosen.key}))
    prefixes = {item.prefix for item in found if item.tensors is chosen.tensors}
    state, beside = {}, {}
    for name, value in chosen.tensors.items():
        if name.startswith(chosen.prefix):
            state[name.removeprefix(chosen.prefix)] = value
        elif not any(other and name.startswith(other) for other in prefixes):
            beside[name] = value
    notes = []
    if chosen.key:
        averaged = ", averaged weights (EMA)" if _is_ema(chosen) else ""
        also = f"; the file also has {', '.join(name or 'its top' for name in others)}"
        notes.append(f"state {chosen.key!r}{averaged}{also if others else ''}")
    for name in BUFFERS:
        state.pop(name, None)
    head = _head(state, beside)
    if head:
        weight, has_bias = head
        notes.append(f"classifier from {weight}" + ("" if has_bias else ", without a bias"))
    left_out = tuple(name for name in beside if name.rsplit(".", 1)[-1] not in BUFFERS)
    if left_out:
        notes.append(f"left out, no part of the model: {_some(left_out)}")
    trainer = _settings(loaded)
    named = _first(trainer, loaded, ("arch", "architecture", "model", "model_name"))
    recovered = _recovered(path)
    if recovered:
        named = recovered.model
        notes.append(recovered.in_words())
    return Checkpoint(
        path=path,
        key=chosen.key,
        others=others,
        state=state,
        left_out=left_out,
        trainer=trainer,
        architecture=named if isinstance(named, str) else None,
        notes=tuple(notes),
        recovered=recovered,
    )


def _recovered(path: Path) -> Recovered | None:
    """What `recover` wrote beside the weights, in a file of its own.

    Raises:
        WeightsError: it is not what `recover` writes.
    """
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(RECOVERED)
    try:
        found = parse_json(text, Recovered) if text is not None else None
        if found:
            refuse_odd_strings(asdict(found), path)
        return found
    except (ValueError, ArtifactError) as error:
        raise WeightsError(
            f"{path} says what `recover` never does under {RECOVERED!r}: {one_line(error)}",
            "make it anew with `recover`, or take the metadata out",
        ) from error


def load(path: Path) -> Any:
    """What a file holds, without running anything that it might contain.

    Raises:
        WeightsError: missing, truncated, or with objects that are more than plain values.
    """
    import torch

    if not path.is_file():
        raise WeightsError(
            f"no such weights file: {path}", "use auto, pretrained, random or the path of a file"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_plain_types()):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                if "operand" not in str(error):  # an opcode of another pickle protocol
                    raise
                return torch.load(_protocol_2(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        objects = _objects(path)
        if not objects:
            raise _unreadable(path, error) from error
        raise WeightsError(
            f"{path} holds pickled objects ({_some(objects)}), which are code: it is not loaded",
            "where it was trained, save the weights alone:\n"
            f'  model = torch.load("{path.name}", weights_only=False)  # or its part of it\n'
            '  torch.save(model.state_dict(), "weights.pth")',
        ) from error
    except Exception as error:  # each library raises its own kind for a broken file
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"cannot read weights from {path}: {one_line(error) or type(error).__name__}",
        "is the file whole? Expected .safetensors, or what torch.save(model.state_dict(), FILE) "
        "writes",
    )


def _plain_types() -> list[Any]:
    """Types that hold plain values and run nothing when they are made."""
    scalar = np.float64(0).__reduce__()[0]
    paths = [
        (kind, f"{module}.{kind.__name__}")
        for kind in (PosixPath, PurePosixPath)
        for module in ("pathlib", "pathlib._local")
    ]
    return [
        argparse.Namespace,
        *paths,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
        (_latin1, "_codecs.encode"),
    ]


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What pickle protocol 2 makes bytes by; no other encoding is called."""
    del encoding
    return text.encode("latin1")


def _objects(path: Path) -> list[str]:
    """Names of the types that keep a file from being read."""
    import torch

    known = {name for _, name in filter(lambda item: isinstance(item, tuple), _plain_types())}
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # an old or a broken file
        return []
    return [name for name in found if name not in known]


def _protocol_2(path: Path) -> io.BytesIO:
    """The archive with its pickle in protocol 2, the only one that `weights_only` reads.

    The opcodes are rewritten one by one; nothing is executed.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.rsplit("/", 1)[-1] == "data.pkl":
                data = _rewritten(data)
            target.writestr(entry, data)
    copy.seek(0)
    return copy


def _rewritten(data: bytes) -> bytes:
    """A pickle of protocol 3 or 4 in the opcodes of protocol 2.

    Texts are written out wherever they are used, so that none needs a place in the memo: then the
    two that name a type are the last two opcodes before it.
    """
    codes: list[tuple[str | None, bytes]] = [(None, b"\x80\x02")]
    memo: list[str | None] = []
    steps: list[tuple[Any, Any, Any]] = list(pickletools.genops(data))
    ends = [position for _, _, position in steps[1:]] + [len(data)]
    for (opcode, argument, start), end in zip(steps, ends, strict=True):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in ("SHORT_BINUNICODE", "BINUNICODE8"):
            codes.append(_text(argument))
        elif name == "MEMOIZE":
            text = codes[-1][0]
            if text is None:
                codes.append((None, b"r" + len(memo).to_bytes(4, "little")))
            memo.append(text)
        elif name in ("BINGET", "LONG_BINGET") and (text := memo[argument]) is not None:
            codes.append(_text(text))
        elif name == "STACK_GLOBAL":
            (module, _), (attribute, _) = codes[-2:]
            if module is None or attribute is None or "\n" in module + attribute:
                raise pickle.UnpicklingError(f"odd name of a type at byte {start}")
            codes[-2:] = [(None, f"c{module}\n{attribute}\n".encode())]
        elif name in ("BINBYTES", "SHORT_BINBYTES"):
            # as protocol 2 spells bytes; see `_latin1`
            codes.append((None, b"c_codecs\nencode\n"))
            codes += [_text(argument.decode("latin1")), _text("latin1"), (None, b"\x86R")]
        else:
            codes.append((None, data[start:end]))
    return b"".join(code for _, code in codes)


def _text(text: str) -> tuple[str, bytes]:
    coded = text.encode("utf-8", "surrogatepass")
    return text, b"X" + len(coded).to_bytes(4, "little") + coded


# --- which of the tensors are the model ----------------------------------------------------------


def _tensors(
    value: Any, where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dict of named tensors, and where it stands."""
    import torch

    if not isinstance(value, Mapping) or len(where) > MOST_NESTED:
        return
    named = {k: v for k, v in value.items() if isinstance(k, str) and torch.is_tensor(v)}
    if named:
        yield where, named
    for name, inner in value.items():
        if isinstance(name, str) and name not in NOT_MODELS:
            yield from _tensors(inner, (*where, name))


def _choose(path: Path, found: list[_Found], key: str | None) -> _Found:
    if key is not None:
        wanted = tuple(key.strip(".").split("."))
        fitting = [item for item in found if item.parts[: len(wanted)] == wanted]
        if not fitting:
            names = sorted({item.key or "(the whole file)" for item in found})
            raise WeightsError(
                f"{path} has no state {key!r}", f"--weights-key takes one of {', '.join(names)}"
            )
        found = fitting
    return min(found, key=_Found.rank)


def _is_ema(found: _Found) -> bool:
    return any(part in EMA for part in found.parts)


def _head(state: dict[str, Tensor], beside: dict[str, Tensor]) -> tuple[str, bool] | None:
    """Puts the classifier where timm has it, if there is one and it is one linear layer.

    Returns:
        (the name that its weight had, whether it has a bias); None where nothing was to be done.
    """
    if "head.weight" in state:
        if state["head.weight"].ndim == 2 and "head.bias" not in state:
            return "head.weight", False
        return None
    for tensors in (state, beside):
        groups: dict[str, list[str]] = {}
        for name in tensors:
            parts = name.split(".")
            at = next((i for i, part in enumerate(parts[:-1]) if part in HEADS), None)
            if at is not None and (tensors is beside or at == 0):
                groups.setdefault(".".join(parts[: at + 1]), []).append(name)
        linear = [
            names
            for names in groups.values()
            if sum(name.endswith(".weight") and tensors[name].ndim == 2 for name in names) == 1
            and {name.rsplit(".", 1)[-1] for name in names} <= {"weight", "bias"}
            and len({name.rsplit(".", 1)[0] for name in names}) == 1
        ]
        if len(linear) == 1:
            for name in linear[0]:
                state["head." + name.rsplit(".", 1)[-1]] = tensors.pop(name)
            weight = next(name for name in linear[0] if name.endswith(".weight"))
            return weight, "head.bias" in state
    return None


# --- what else a file says -----------------------------------------------------------------------


def _settings(loaded: Any) -> dict[str, Any]:
    """Plain values that the trainer was asked for; the first mention of a name counts."""
    found: dict[str, Any] = {}
    if isinstance(loaded, Mapping):
        for name in SETTINGS:
            inner = loaded.get(name)
            inner = vars(inner) if isinstance(inner, argparse.Namespace) else inner
            for key, value in inner.items() if isinstance(inner, Mapping) else ():
                if isinstance(key, str) and _is_plain(value):
                    found.setdefault(key, value)
        for key, value in loaded.items():
            if isinstance(key, str) and key not in SETTINGS and _is_plain(value):
                found.setdefault(key, value)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (str, int, float, bool, type(None))):
        return True
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, Mapping) and all(map(_is_plain, value.values()))


def _first(trainer: dict[str, Any], loaded: Any, names: tuple[str, ...]) -> Any:
    top = loaded if isinstance(loaded, Mapping) else {}
    return next(
        (found[name] for name in names for found in (top, trainer) if _is_word(found.get(name))),
        None,
    )


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _keys(loaded: Any) -> str:
    if not isinstance(loaded, Mapping):
        return ""
    return f" of {_some(list(map(str, loaded)))}" if loaded else " of nothing"


def _some(names: Any, most: int = 3) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
