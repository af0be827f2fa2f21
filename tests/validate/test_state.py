"""Shards put together, and every way in which they do not fit."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jmp_deploy.cli import validate as cli
from jmp_deploy.cli.main import main
from jmp_deploy.core.errors import ArtifactError
from jmp_deploy.validate import state as validate_state
from jmp_deploy.validate.state import State, merge
from tests.fakes import validation


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(folder with jmp, dense, data, whole.json and part1.json to part3.json)."""
    folder = tmp_path_factory.mktemp("shards")
    validation.write_images(folder / "data", np.repeat(np.arange(10), 10))
    (folder / "data" / "4" / "broken.png").write_text("no image")
    validation.write_artifact(folder / "jmp", validation.weights(10))
    validation.write_artifact(folder / "dense", validation.weights(10, seed=2), jmp=None)
    run(folder, "whole.json")
    for index in (1, 2, 3):
        run(folder, f"part{index}.json", "--shard", f"{index}/3")
    return folder


def run(folder, name, *more, data="data"):
    command = ["validate", folder / "jmp", "--data", folder / data, "--against", folder / "dense"]
    command += ["--workers", "0", *more, "--json", folder / name]
    assert main([str(word) for word in command]) == 0


def read(folder, name):
    return json.loads((folder / name).read_text())


def files(folder, *numbers):
    return [folder / f"part{number}.json" for number in numbers]


def test_merged_shards_are_the_whole_run(parts, tmp_path, capsys):
    found = tmp_path / "merged.json"
    words = [*map(str, files(parts, 3, 1, 2)), "--json", str(found)]
    assert main(["merge", *words]) == 0
    merged, whole = json.loads(found.read_text()), read(parts, "whole.json")
    assert validation.lasting(merged) == validation.lasting(whole)
    assert merged["n"] == 100 and merged["unreadable"]["files"][0]["image"] == "4/broken.png"
    assert [shard["index"] for shard in merged["shards"]] == [1, 2, 3]
    assert sum(shard["n"] for shard in merged["shards"]) == 100
    printed = capsys.readouterr().out
    assert "shard 2:" in printed and "drop in points" in printed


def test_shards_share_no_image(parts):
    rows = [read(parts, f"part{number}.json")["shard"]["rows"]["index"] for number in (1, 2, 3)]
    assert sorted(index for part in rows for index in part) == [
        i for i in range(101) if i != rows_of_broken(parts)
    ]
    assert min(map(len, rows)) >= 25


def rows_of_broken(parts):
    (entry,) = [
        entry
        for number in (1, 2, 3)
        for entry in read(parts, f"part{number}.json")["shard"]["unreadable"]
    ]
    return entry[0]


def test_a_missing_shard_is_named(parts):
    with pytest.raises(ArtifactError, match=r"not all shards are there: 1/3, 3/3"):
        merge(files(parts, 2))


def test_a_shard_given_twice_is_named(parts):
    with pytest.raises(ArtifactError, match=r"part2.json and .*part2.json are both shard 2/3"):
        merge(files(parts, 1, 2, 2, 3))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--batch", "2"], "another --batch: 2 there, 4 here"),
        (["--limit", "90"], "other images or labels"),
    ],
)
def test_a_shard_of_another_run_is_refused(parts, options, why):
    run(parts, "part9.json", "--shard", "3/3", *options)
    with pytest.raises(ArtifactError, match=f"part9.json is a shard of another run .*: {why}"):
        merge(files(parts, 1, 2, 9))


def test_a_shard_of_another_number_of_shards_is_refused(parts):
    run(parts, "part8.json", "--shard", "3/4")
    with pytest.raises(
        ArtifactError, match=r"part8.json is one of 4 shards, .*part1.json one of 3"
    ):
        merge(files(parts, 1, 2, 8))


def test_shards_of_another_artifact_are_refused(parts, tmp_path):
    validation.write_artifact(tmp_path / "jmp", validation.weights(10, seed=8))
    (tmp_path / "dense").symlink_to(parts / "dense")
    (tmp_path / "data").symlink_to(parts / "data")
    run(tmp_path, "part3.json", "--shard", "3/3")
    with pytest.raises(ArtifactError, match="another artifact, or one that was built again"):
        merge([*files(parts, 1, 2), *files(tmp_path, 3)])


def test_what_is_no_shard_is_refused(parts, tmp_path, capsys):
    for content in ("[]", "{}", "no JSON", '{"shard": null}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ArtifactError, match=r"x.json is not a partial result"):
            merge([tmp_path / "x.json"])
    with pytest.raises(ArtifactError, match=r"whole.json is not a partial result"):
        merge([parts / "whole.json"])
    with pytest.raises(ArtifactError, match="no such partial result"):
        merge([tmp_path / "nowhere.json"])
    assert main(["merge", str(tmp_path / "x.json")]) == 2
    assert "--shard i/n" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["length", "twice", "lost"])
def test_a_damaged_shard_is_refused(parts, tmp_path, damage):
    part = read(parts, "part2.json")
    rows = part["shard"]["rows"]
    if damage == "length":
        rows["top1"].pop()
    elif damage == "twice":
        rows["index"][0] = rows["index"][1]
    else:
        for column in rows.values():
            column.pop()
        part["n"] -= 1
    (tmp_path / "x.json").write_text(json.dumps(part))
    message = "numbers do not fit" if damage == "length" else "the shards hold 100 of 101 images"
    with pytest.raises(ArtifactError, match=message):
        merge([*files(parts, 1, 3), tmp_path / "x.json"])


def test_too_many_unreadable_images_over_all_shards(parts, tmp_path):
    for number in (1, 2, 3):
        part = read(parts, f"part{number}.json")
        if number == 2:  # one more image that could not be read: 2 of 101
            rows = part["shard"]["rows"]
            index = rows["index"][-1]
            rows = {name: column[:-1] for name, column in rows.items()}
            part["shard"]["rows"] = rows
            part["shard"]["unreadable"].append([index, "a.png", "cannot read a.png"])
            part["n"] -= 1
        (tmp_path / f"part{number}.json").write_text(json.dumps(part))
    merged = merge(files(tmp_path, 1, 2, 3))
    assert not merged["ok"] and merged["unreadable"]["count"] == 2 and merged["n"] == 99


# --- The state -----------------------------------------------------------------------------------


def filled(path, batches):
    state = State(path, {"batch": 4}, resume=False)
    for place in range(batches):
        index = np.arange(4 * place, 4 * place + 3)
        values = {"model": np.repeat(index[:, None], 2, axis=1).astype(np.float32)}
        state.split("val").done.append((index, values, ((4 * place + 3, "cannot read x"),)))
    return state


def test_the_state_comes_back_as_it_was(tmp_path):
    path = tmp_path / "s.npz"
    state = filled(path, 3)
    # a batch of which nothing could be read
    state.split("val").done.append((np.zeros(0, np.int64), {}, ((12, "a"), (13, "b"))))
    state.save()
    again = State(path, {"batch": 4}, resume=True)
    before, after = state.split("val"), again.split("val")
    assert again.resumed == 4 and after.unreadable() == before.unreadable()
    np.testing.assert_array_equal(after.index(), before.index())
    np.testing.assert_array_equal(after.outputs()["model"], before.outputs()["model"])
    assert after.outputs()["model"].dtype == np.float32
    assert State(path, {"batch": 4}, resume=False).resumed == 0


def test_a_save_that_fails_leaves_the_state_of_before(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    filled(path, 1).save()
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validate_state.np, "savez", full)
    with pytest.raises(ArtifactError, match="No space left"):
        filled(path, 2).save()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_it_is_saved_now_and_then_and_only_if_anything_is_new(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(validate_state.time, "monotonic", lambda: clock[0])
    path = tmp_path / "s.npz"
    state = filled(path, 1)
    state.save_if_due()
    assert not path.exists()
    clock[0] = 11.0
    state.save_if_due()
    assert path.exists()
    path.unlink()
    clock[0] = 30.0
    state.save_if_due()  # nothing new
    assert not path.exists()
    without = State(None, {}, resume=True)
    without.save()
    without.remove()


def test_the_commands_for_clusters_number_shards_as_validate_does():
    """Slurm and torchrun count from 0: what docs/serving.md and --help write, as bash reads it."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text() + cli.MORE
    written = re.findall(r"--shard (.*\$\w+) ", text)
    assert len(written) == 4
    for rank in ("0", "1"):
        env = {"SLURM_PROCID": rank, "RANK": rank, "SLURM_NTASKS": "2", "WORLD_SIZE": "2"}
        for shard in written:
            done = subprocess.run(
                ["bash", "-c", f"echo {shard}"], env=env, capture_output=True, text=True, check=True
            )
            assert cli._shard(done.stdout.strip()) == (int(rank) + 1, 2), shard
