"""Files are whole or absent."""

from __future__ import annotations

import stat

import pytest

from jmp_deploy.core import files
from jmp_deploy.core.errors import ArtifactError


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_path(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_good_write_replaces_it_with_ordinary_permissions(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) & stat.S_IRGRP
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_places_that_cannot_be_written_are_named():
    with pytest.raises(ArtifactError, match="cannot write /dev/null/x"):
        files.write_bytes(files.Path("/dev/null/x/a"), b"")


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()
