"""Hold our source against NVIDIA's own Python bindings of many TensorRT versions: no GPU needed.

    python scripts/bindings_check.py           # compare; exit code 1 where something is not as said
    python scripts/bindings_check.py --write   # and write tests/tensorrt_names.json anew

Each version's bindings are downloaded (1 MB, without TensorRT's libraries) and imported in a
process of their own, beside libraries that define the few symbols that they ask for and do
nothing. Every name of TensorRT that we use is looked up there. The table of what was found is what
the test suite compares with, without a network. Needs pip, a C compiler, and a Python for which
all these bindings exist (3.10 to 3.12).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from jmp_deploy.core.errors import ToolchainError  # noqa: E402
from jmp_deploy.core.paths import cache_dir  # noqa: E402
from jmp_deploy.plugin.toolchain import find_cxx  # noqa: E402
from tests.engine.tensorrt_names import TABLE, our_names, wrong  # noqa: E402

# The oldest that we serve, JetPack's, those where names came and went, the newest.
BINDINGS = {
    "10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "10.1.0": "tensorrt-cu12-bindings==10.1.0",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.7.0": "tensorrt-cu12-bindings==10.7.0.post1",
    "10.10.0": "tensorrt-cu12-bindings==10.10.0.31",
    "10.11.0": "tensorrt-cu12-bindings==10.11.0.33",
    "10.13.0": "tensorrt-cu12-bindings==10.13.0.35",
    "10.16.1": "tensorrt-cu12-bindings==10.16.1.11",
    "11.1.0": "tensorrt-cu12-bindings==11.1.0.106",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
SYMBOLS = (
    *(f"createInfer{what}_INTERNAL" for what in ("Builder", "Refitter", "Runtime")),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "getNvOnnxParserVersion"),
    "initLibNvInferPlugins",
)

LOOK_UP = """
import functools, json, sys
import tensorrt_bindings as trt
assert f"{trt.__version__}.".startswith(f"{sys.argv[1]}."), trt.__version__

def there(name):
    try:
        functools.reduce(getattr, name.split("."), trt)
    except AttributeError:
        return False
    return True

print(json.dumps([name for name in json.load(sys.stdin) if there(name)]))
"""


def install(version: str) -> Path:
    """The bindings of a version, unpacked in the cache with the libraries that they ask for.

    Raises:
        ToolchainError: they cannot be downloaded for this Python, or there is no C compiler.
    """
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = cache_dir() / "bindings" / f"{version}-{python}"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        run([*pip, "--only-binary=:all:", f"--dest={folder}", BINDINGS[version]])
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    source = folder / "nothing.cpp"
    source.write_text("".join(f'extern "C" void* {s}() {{ return nullptr; }}\n' for s in SYMBOLS))
    for library in LIBRARIES:
        name = f"{library}.so.{version.split('.')[0]}"
        command = [str(find_cxx()), "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        run([*command, str(source), "-o", str(folder / name)])
    return folder


def look_up(version: str, names: list[str]) -> set[str]:
    """Those of `names` that the bindings of a version have."""
    folder = install(version)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    printed = run([sys.executable, "-c", LOOK_UP, version], json.dumps(names), environment)
    return set(json.loads(printed.splitlines()[-1]))


def run(command: list[str], given: str = "", environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ToolchainError(f"{' '.join(command[:4])[:100]} ... failed: {words}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write tests/engine/{TABLE.name}")
    options = parser.parse_args(arguments)
    names = sorted(our_names())
    found = {}
    complaints = []
    try:
        for version in BINDINGS:
            found[version] = look_up(version, names)
            odd = wrong(names, found[version].__contains__, "tensorrt", version)
            print(f"TensorRT {version}: {len(found[version])} of {len(names)} names")
            complaints += [f"TensorRT {version}: {line}" for line in odd]
    except ToolchainError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    table = {name: [v for v in BINDINGS if name in found[v]] for name in names}
    text = json.dumps({"versions": list(BINDINGS), "names": table})
    # one line per name
    text = text.replace('{"versions"', '{\n"versions"').replace('], "', '],\n"')
    text = text.replace('{"', '{\n"', 2).replace("]}}", "]\n}}") + "\n"
    if options.write:
        TABLE.write_text(text, encoding="utf-8")
    elif not TABLE.is_file() or TABLE.read_text(encoding="utf-8") != text:
        complaints.append(
            f"tests/engine/{TABLE.name} is not what was found: write it anew with --write"
        )
    for line in complaints:
        print(f"not as said: {line}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
