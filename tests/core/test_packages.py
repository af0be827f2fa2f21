"""A package that is missing or broken ends a command in one message, whatever its import raises."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from jmp_deploy.cli import main as cli
from jmp_deploy.core import errors
from jmp_deploy.core.packages import import_failure

BUILD = ["build", "deit_t", "--weights", "random", "--engine", "none", "-o", "{out}"]
RUN = ["run", "{artifact}", "{photo}"]
COMPARE = ["compare", "{artifact}"]


def command(
    planted: Path, arguments: list[str], **names: object
) -> subprocess.CompletedProcess[str]:
    """The command line with a folder of planted packages before the installed ones."""
    return subprocess.run(
        [sys.executable, "-m", "jmp_deploy", *(a.format(**names) for a in arguments)],
        env={**os.environ, "PYTHONPATH": str(planted)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def plant(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


@pytest.mark.parametrize(
    ("package", "code", "arguments", "words"),
    [
        (
            "torchvision",
            "raise RuntimeError('operator torchvision::nms does not exist')",
            BUILD,
            ["beside torch ", "operator torchvision::nms", "install --force-reinstall torch torch"],
        ),
        ("torch", "raise OSError('libcudart.so.13: no such file')", BUILD, ["libcudart.so.13: no"]),
        ("timm", "import torch; torch.nothing_like_it", BUILD, ["no attribute 'nothing_like_it'"]),
        ("onnxscript", "import sys; sys.exit(0)", BUILD, ["cannot import onnxscript"]),
        ("torch", "raise OSError('libcudart.so.13: no such file')", COMPARE, ["libcudart.so.13"]),
        ("onnxruntime", "raise ImportError('GLIBC_2.38\\n\\x1b[31m')", RUN, ["GLIBC_2.38"]),
        ("polygraphy", "raise SyntaxError('\\x1b[31mbad')", RUN, ["bad", "--no-deps polygraphy"]),
    ],
)
def test_broken_package_is_one_clear_message(
    built: Path,
    photos: list[Path],
    tmp_path: Path,
    package: str,
    code: str,
    arguments: list[str],
    words: list[str],
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    plant(planted, package, code)
    out = tmp_path / "out"
    done = command(planted, arguments, artifact=built, photo=photos[0], out=out)
    assert done.returncode == 2, done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith(f"error: cannot import {package} {version(package)}"), done.stderr
    assert hint.startswith("hint: ") and "pip install" in hint
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr
    assert not out.exists()


def test_what_a_package_misses_is_named_as_pip_names_it(tmp_path: Path) -> None:
    """Module and distribution may differ in name; the metadata of who imports it say which."""
    plant(tmp_path, "timm", "import nowhere")
    (tmp_path / "timm-9.9.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: timm\nVersion: 9.9\nRequires-Dist: not-to-be-had>=1\n"
    (tmp_path / "timm-9.9.dist-info" / "METADATA").write_text(text)
    done = command(tmp_path, BUILD, out=tmp_path / "out")
    assert done.returncode == 2
    assert "needs nowhere, which is not installed" in done.stderr
    assert "hint: python -m pip install 'not-to-be-had>=1'" in done.stderr


def test_build_engine_names_what_broke_in_the_process_of_the_builder(tmp_path: Path) -> None:
    """TensorRT runs in a process of its own; its answer is the same."""
    plant(tmp_path, "polygraphy", "raise RuntimeError('planted')")
    code = (
        "from jmp_deploy.engine import builder as engine\n"
        "from jmp_deploy.core.errors import EngineError\n"
        "try: engine._work({'action': 'parse', 'flavour': 'rtx', 'plugin': None, 'model': ''})\n"
        "except EngineError as e: print(e.message, '|', e.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert "cannot import polygraphy" in done.stdout and ": planted |" in done.stdout, done.stdout


def test_other_errors_are_no_failed_imports() -> None:
    """Nor is what eval and exec run, which Python calls <module> as well."""
    for code in ("1 / 0", "int('x')", "{}['a']", "import jmp_deploy.no_such_module"):
        with pytest.raises(Exception) as raised:
            exec(code, {"__name__": "somebody"})
        error = raised.value
        assert import_failure(error) is None, code


def test_debug_shows_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> int:
        raise errors.EngineError("said well") from ImportError("x", name="polygraphy")

    monkeypatch.setattr(cli.doctor, "_doctor", fails)
    assert cli.main(["doctor"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("JMP_DEPLOY_DEBUG", "1")
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "cannot import polygraphy" in err
