"""One watcher of reductions: it shows what the model does, and changes nothing of it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jmp_deploy.core.errors import ModelError
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.jmp.trace import deciding, owners, stages, trace_torch, watch
from tests.fakes.models import expected, tiny_vit

ROOT = Path(__file__).parents[2]
IMAGES = np.random.default_rng(5).normal(size=(6, 3, 32, 32)).astype(np.float32)
CLEAR = 1e-5
"""Decisions closer than this may differ between float32 and float64."""


@dataclass(frozen=True)
class Form:
    """A schedule, how it is patched in, and the model's options."""

    spec: str = "1:11,2:7,4:3"
    changes: tuple[tuple[str, object], ...] = ()
    tau: float | None = None
    granularity: str = "token"
    proportional: bool = True
    options: tuple[tuple[str, object], ...] = ()

    def model(self) -> torch.nn.Module:
        model = tiny_vit(**dict(self.options))
        resolved = replace(schedule.parse(self.spec, model_shape(model)), **dict(self.changes))
        return patch(
            model,
            resolved,
            tau=self.tau,
            granularity=self.granularity,
            proportional=self.proportional,
        )


FORMS = {
    "spread": Form("spread"),
    "spread, both fates": Form("spread:62", tau=0.6),
    "paper": Form("paper", tau=0.5),
    "merge weight": Form(changes=(("merge_weight", 0.4),), tau=0.3),
    "distinct": Form(changes=(("selection", "distinct"),), tau=0.3),
    "last block for the prefix alone": Form(changes=(("last_prefix_only", True),), tau=0.3),
    "by sample": Form(granularity="sample", tau=0.5),
    "all pruned": Form(tau=2.0),
    "all merged": Form(tau=-1.0),
    "not proportional": Form(tau=0.3, proportional=False),
    "no class token": Form(tau=0.3, options=(("class_token", False), ("global_pool", "avg"))),
    "registers": Form("spread", options=(("reg_tokens", 4), ("qk_norm", True))),
}


@pytest.fixture(params=list(FORMS))
def model(request):
    return FORMS[request.param].model()


@pytest.fixture
def spied(model):
    """(model, what each of its reductions is called with while nobody watches)."""
    calls, own = [], model.blocks.reduce

    def spy(*arguments):
        calls.append(arguments)
        return own(*arguments)

    model.blocks.reduce = spy
    with torch.inference_mode():
        model(torch.from_numpy(IMAGES))
    model.blocks.reduce = own
    return model, calls


def test_forms_cover_every_setting_of_a_reduction():
    """A setting that a watcher forgets is seen only where it is not at its default."""
    used = [a for form in FORMS.values() for a in form.model().blocks.reductions.values()]
    assert {a.selection for a in used} == {"importance", "distinct"}
    assert {a.granularity for a in used} == {"token", "sample"}
    assert {a.importance for a in used} == {"class", "received"}
    assert {a.proportional for a in used} == {True, False}
    assert {a.merge_weight for a in used} == {0.4, 1.0}
    assert {a.num_prefix for a in used} == {0, 1, 5}


@pytest.mark.parametrize("blocks", [False, True])
def test_a_watched_model_computes_the_same_bits(model, blocks):
    images = torch.from_numpy(IMAGES)
    outputs = []
    hook = model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    own = model.blocks.reduce
    with torch.inference_mode():
        model(images)
    trace_torch(model, IMAGES, blocks=blocks)
    with torch.inference_mode():
        model(images)
    hook.remove()
    unwatched, watched, again = outputs
    assert torch.equal(watched, unwatched) and torch.equal(again, unwatched)
    assert model.blocks.reduce is own


def test_patches_are_in_the_tokens_that_the_oracle_puts_them_in(spied):
    """Each reduction decided anew in float64, patches carried along one by one."""
    model, calls = spied
    prefix = next(iter(model.blocks.reductions.values())).num_prefix
    alike = np.ones(len(IMAGES), bool)  # images in which no decision was a near tie so far
    tokens = [[[patch] for patch in range(16)] for _ in IMAGES]
    choices = trace_torch(model, IMAGES).choices
    assert [choice.block for choice in choices] == sorted(model.blocks.reductions)
    maps = owners(choices, 16, len(IMAGES))
    pictures = stages(choices)
    for step, (x, qkv, size, attributes) in enumerate(calls):
        oracle = expected(x.numpy(), qkv.numpy(), size.numpy(), attributes)
        alike &= oracle.clear(CLEAR)
        for image in range(len(IMAGES)):
            groups = [[] for _ in range(attributes.num_keep)]
            for token in oracle.kept[image] - prefix:  # who stays comes first in its group
                groups[oracle.destination[image, token + prefix] - prefix] += tokens[image][token]
            for token, members in enumerate(tokens[image]):
                place = oracle.destination[image, token + prefix] - prefix
                if place >= 0 and token + prefix not in oracle.kept[image]:
                    groups[place] += members
            want = np.full(16, -1)
            for members in groups:
                want[members] = members[0]
            if alike[image]:
                np.testing.assert_array_equal(maps[step + 1][image], want)
                np.testing.assert_array_equal(pictures[image][step].seat, want)
            tokens[image] = groups
    assert alike.mean() >= 0.5, "too many near ties to say anything"


def test_owners_of_a_dense_model_are_the_patches_themselves():
    assert owners([], 3, 2)[-1].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_reductions_are_told_by_their_block_after_a_run_that_broke_off(model):
    told = []

    def note(block, *rest):
        told.append(block)
        if len(told) == 1:
            raise KeyboardInterrupt

    images = torch.from_numpy(IMAGES)
    own = model.blocks.reduce
    with watch(model, note), torch.inference_mode():
        with pytest.raises(KeyboardInterrupt):
            model(images)
        model(images)
    assert told[1:] == sorted(model.blocks.reductions)
    with pytest.raises(KeyboardInterrupt), watch(model, note):
        raise KeyboardInterrupt
    assert model.blocks.reduce is own


def test_a_model_can_be_made_to_decide_as_another_did():
    """Two that differ in tau alone: with the other's choices the first is the other, to the bit."""
    first, other = (Form(tau=tau).model() for tau in (2.0, 0.3))
    images = torch.from_numpy(IMAGES)
    want = other(images)
    assert not torch.equal(first(images), want)
    choices = trace_torch(other, IMAGES).choices
    with deciding(first, choices):
        assert torch.equal(first(images), want)
    some = [choice.of(slice(2, 4)) for choice in choices]
    with deciding(first, some):
        assert torch.allclose(first(images[2:4]), want[2:4], rtol=1e-5, atol=1e-6)
    assert not torch.equal(first(images), want)


def test_what_the_reference_does_not_compute_is_refused():
    """A rule of another method, a kernel: we would show decisions that the model does not take."""
    model = FORMS["spread"].model()
    model.blocks.reduce = lambda x, qkv, size, attributes: (x, size, size.log())
    with pytest.raises(ModelError, match="cannot be seen"):
        trace_torch(model, IMAGES)
    elsewhere = FORMS["spread"].model().to("meta")
    with pytest.raises(ModelError, match="cannot be seen"), watch(elsewhere, print):
        pass


def places(tree: ast.AST) -> set[str]:
    """What a module does with reductions: "replaces", "decides"."""
    found = set()
    for item in ast.walk(tree):
        targets = item.targets if isinstance(item, ast.Assign) else []
        if isinstance(item, ast.AnnAssign | ast.AugAssign):
            targets = [item.target]
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr == "reduce":
                found.add("replaces")
        if isinstance(item, ast.Call) and any(
            isinstance(value, ast.Constant) and value.value == "reduce" for value in item.args
        ):
            found.add("replaces")  # setattr(blocks, "reduce", ...)
        name = item.attr if isinstance(item, ast.Attribute) else getattr(item, "id", None)
        if name in ("make_plan", "apply_plan"):
            found.add("decides")
        if isinstance(item, ast.ImportFrom) and {a.name for a in item.names} & {
            "make_plan",
            "apply_plan",
            "planned_reduce",
        }:
            found.add("decides")
    return found


def test_nobody_else_looks_into_reductions():
    """A second watcher is a second chance to forget an attribute.

    In benchmarks other methods stand in a reduction's place; none of them watches ours.
    """
    found = {}
    for room in ("jmp_deploy", "benchmarks", "scripts", "examples"):
        for path in sorted((ROOT / room).rglob("*.py")):
            # the engine's plans for batches (lane.py) share a name with ours
            if path.parent.name == "engine":
                continue
            if what := places(ast.parse(path.read_text())):
                found[str(path.relative_to(ROOT))] = what
    assert found == {
        "jmp_deploy/jmp/patch.py": {"replaces"},  # puts in the one that was asked for
        "jmp_deploy/export/export.py": {"replaces"},  # makes the ONNX node
        "jmp_deploy/jmp/reduction.py": {"decides"},
        "jmp_deploy/jmp/trace.py": {"replaces", "decides"},
        "benchmarks/endtoend.py": {"replaces"},  # `cut_tokens`
        "benchmarks/lib/features.py": {"replaces"},  # other methods
        "benchmarks/lib/rules.py": {"decides"},  # theirs
    }
