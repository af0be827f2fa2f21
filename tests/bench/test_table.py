"""bench --table: it adds up to what was measured, and tune reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jmp_deploy.bench import parts
from jmp_deploy.bench import table as bench_table
from jmp_deploy.cli.main import main
from jmp_deploy.core.errors import ArtifactError
from jmp_deploy.core.manifest import Jmp
from jmp_deploy.jmp import latency
from jmp_deploy.jmp.families import family_of
from jmp_deploy.jmp.schedule import ModelShape
from tests.fakes.artifacts import RANDOM_WEIGHTS
from tests.fakes.bench import FakeBackend, artifact
from tests.fakes.models import tiny_eva


def shape() -> ModelShape:
    return ModelShape(
        name="deit_small_patch16_224",
        depth=6,
        width=48,
        num_prefix=1,
        num_patches=16,
        attn_dim=48,
        head_dim=16,
        attn_weights=1,
        mlp_weights=1,
        stem_macs=1,
        head_macs=1,
        has_class_token=True,
    )


def test_attention_is_timed_with_its_rotations():
    model = tiny_eva()
    family = family_of(model)
    x = torch.randn(2, 19, 48, generator=torch.Generator().manual_seed(0))
    want = x
    for index, block in enumerate(model.blocks):
        want = family.attend(block, want, None, family.rotary(model).rows(index))[0]
    chain = parts._chain(model, parts.ATTENTION)
    assert torch.equal(chain(x), want)
    assert chain(x[:, :9]).shape == (2, 9, 48)  # as many as a reduction leaves


class Device:
    """Opens parts whose times are known; a staircase of eight tokens. Remembers what it opened."""

    attention = staticmethod(lambda tokens: 0.5 * -(-tokens // 8))
    mlp = staticmethod(lambda tokens: 0.7 * -(-tokens // 8))
    other, reduction = 3.0, 0.25

    def __init__(self, keeps=(16,) * 6) -> None:
        self.keeps, self.open, self.most_open, self.log = keeps, 0, 0, []

    def whole(self, keeps, reduction=0.0) -> float:
        total, before = self.other, 16
        for keep in keeps:
            total += self.attention(before + 1) + self.mlp(keep + 1)
            total += reduction if keep < before else 0.0
            before = keep
        return total

    def __call__(self, name, tokens):
        ms = {
            "attention": lambda: 6 * self.attention(tokens),
            "mlp": lambda: 6 * self.mlp(tokens),
            "dense": lambda: self.whole((16,) * 6),
            "artifact": lambda: self.whole(self.keeps, self.reduction),
        }[name]()
        self.log.append(tokens)
        device = self

        class Part(FakeBackend):
            def close(self):
                device.open -= 1

        self.open += 1
        self.most_open = max(self.most_open, self.open)
        return Part(ms)


JMP = Jmp("list", ((1, 11), (3, 6)), tau=0.7)
FAST = replace(bench_table.SETTINGS, visit_seconds=0.0)


def table_of(device, jmp, step=4, batches=(1, 8)):
    options = bench_table.TableOptions(Path(), step=step, settings=FAST)
    return bench_table.fill(shape(), jmp, batches, device, options)


def test_table_adds_up_to_what_was_measured_and_tune_reads_it(tmp_path):
    device = Device(keeps=(16, 11, 11, 6, 6, 6))
    table = table_of(device, JMP)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    for batch in (1, 8):
        read = latency.read(path, shape(), batch)
        assert read.latency([16] * 6) == pytest.approx(device.whole((16,) * 6))
        assert read.latency(device.keeps) == pytest.approx(device.whole(device.keeps, 0.25))
        assert read.rows[12] == pytest.approx((0.5 * 2, 0.7 * 2, 0.25))
    # right edges of the steps: 16 of 17 tokens, 15 of 16, 7 of 8
    assert read.good_counts() == (16, 15, 7)
    assert device.open == 0 and device.most_open == 2


def test_table_goes_to_and_fro_over_the_token_counts():
    device = Device()
    table_of(device, None, step=8, batches=(1,))
    sweeps = [list(group) for group in np.array_split(device.log, bench_table.SWEEPS)]
    assert sweeps[0] == [None, 17, 17, 16, 16, 8, 8] and sweeps[1] == sweeps[0][::-1]


def test_table_has_the_token_counts_of_the_artifact():
    counts = bench_table.token_counts(shape(), JMP, 8)
    assert counts == [17, 16, 12, 8, 7]
    assert bench_table.token_counts(shape(), None, 8) == [17, 16, 8]
    with pytest.raises(ArtifactError, match="leaves one row"):
        bench_table.token_counts(shape(), None, 100)


def test_table_says_where_the_parts_take_longer_than_the_whole():
    device = Device()
    device.other = -2.0
    table = table_of(device, None, batches=(1,))
    assert table["other_ms"] == {"1": 0.0}
    assert "took 2.000 ms longer than the dense model" in table["warnings"][0]


def test_table_of_a_real_model(tmp_path, monkeypatch, capsys):
    """Parts exported, run by ONNX Runtime, and a file that tune takes."""
    pytest.importorskip("torch")
    from jmp_deploy.core.images import Preprocess
    from jmp_deploy.jmp import models
    from tests.fakes.models import tiny_vit

    spec = Preprocess(32, 32, 32, "bicubic", "center", (0.5,) * 3, (0.5,) * 3)
    loaded = models.LoadedModel(tiny_vit(depth=2), "tiny", RANDOM_WEIGHTS, spec, None)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: loaded)
    folder = artifact(tmp_path / "a", side=32)
    out = tmp_path / "table.json"
    assert main(["bench", str(folder), "-b", "2", "--table", str(out), "--threads", "1"]) == 0
    table = json.loads(out.read_text())
    assert {row["tokens"] for row in table["rows"]} == {17, 16, 8}
    assert all(row["attn_ms"] > 0 and row["mlp_ms"] > 0 for row in table["rows"])
    assert "ONNX Runtime" in table["device"] and table["precision"] == "fp16"
    assert "--latency-ms" in capsys.readouterr().out


def test_table_of_two_artifacts_is_refused(tmp_path, capsys):
    command = ["bench", str(tmp_path), "--against", str(tmp_path)]
    assert main([*command, "--table", str(tmp_path / "t.json")]) == 2
    assert "--table measures one artifact" in capsys.readouterr().err
