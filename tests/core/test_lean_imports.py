"""What a device without PyTorch, timm and the ONNX tools must be able to do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jmp_deploy.core.paths import PACKAGE

HEAVY = {
    *(
        "jmp.families",
        "jmp.dense",
        "jmp.families.naming",
        "jmp.families.rope",
        "jmp.families.vit",
        "jmp.patch",
        "jmp.reduction",
        "jmp.torch_op",
    ),
    *("jmp.models", "export.export", "export.fuse", "export.numerics", "export.precision"),
    "recover.lesson",
}
"""Modules that work on PyTorch or ONNX models and may import them at once."""
RUNS = {"__main__"}  # on import; the help tests are its own

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])

sys.meta_path.insert(0, Block())
"""
TOOLS = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx_graphsurgeon", "safetensors")
BUILDERS = ("polygraphy", "tensorrt", "tensorrt_rtx", "onnxruntime")


def python(code, names, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=set(names)) + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_modules_import_with_the_base_install_alone():
    names = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    modules = {name.replace("/", ".").removesuffix(".__init__") for name in names} - {"__init__"}
    assert modules > HEAVY and len(modules) > 90
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    light = sorted(f"jmp_deploy.{name}" for name in modules - HEAVY - RUNS)
    done = python(code, TOOLS + BUILDERS, *light)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["build", "--help"], ["doctor"], ["plugin", "--help"]]
)
def test_commands_that_need_the_base_install_alone(arguments):
    code = f"from jmp_deploy.cli.main import main; sys.exit(main({arguments!r}))"
    done = python(code, TOOLS + BUILDERS)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_bare_gpu_machine_patches_and_times_without_our_packages():
    """What scripts/gpu_check.sh needs: PyTorch and timm, and none of what we install besides."""
    code = (
        "import benchmarks.kernel, benchmarks.endtoend\n"
        "from jmp_deploy import patch\n"
        "from jmp_deploy.jmp.models import load_model\n"
        "patch(load_model('deit_t', 'random').model)"
    )
    ours = ("msgspec", "rich", "onnxscript", "onnx_graphsurgeon", "pynvml", "polygraphy")
    done = python(code, ours)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = "import jmp_deploy; print([m for m in sys.modules if m in ('numpy', 'rich', 'PIL')])"
    done = python(code, TOOLS + BUILDERS)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_run_and_compare_need_no_pytorch_and_no_onnx_tools(built, photos, tmp_path):
    for arguments in (
        ["run", str(built), str(photos[0]), "--json", str(tmp_path / "run.json")],
        ["compare", str(built), "--json", str(tmp_path / "compare.json")],
    ):
        code = f"from jmp_deploy.cli.main import main; sys.exit(main({arguments!r}))"
        done = python(code, TOOLS)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run.json").read_text())[0]["top"]
    result = json.loads((tmp_path / "compare.json").read_text())
    assert result["ok"] and result["backends"][0] == "torch (stored)"


def test_build_names_the_missing_package(tmp_path):
    arguments = ["build", "deit_t", "-o", str(tmp_path / "a")]
    code = f"from jmp_deploy.cli.main import main; sys.exit(main({arguments!r}))"
    done = python(code, TOOLS)
    assert done.returncode == 2
    assert "[export]" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()
