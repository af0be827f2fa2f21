"""Layers of engines that TensorRT-RTX builds ahead of time, without a GPU.

With detailed profiling verbosity the builder prints every layer of the engine that it made, with
inputs, outputs, types and the ONNX nodes that it comes from.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from jmp_deploy.core.errors import ToolchainError
from jmp_deploy.plugin import library as plugin

REPO = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
import tensorrt_rtx as trt
from jmp_deploy.plugin.library import load_plugin

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, message):
        self.lines += message.splitlines()

log = Log()
load_plugin(trt, Path(sys.argv[1]))
results = []
for model in sys.argv[4:]:
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(Path(model).read_bytes()), log.lines
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, sys.argv[2]), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for bounds in json.loads(sys.argv[3]):
        profile = builder.create_optimization_profile()
        images = network.get_input(0)
        profile.set_shape(images.name, *((n, *tuple(images.shape)[1:]) for n in bounds))
        config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config) is not None
    ours = [line for line in log.lines if "JMPTokenReduce: " in line]
    layers = [line for line in log.lines if line.startswith("Name: ")]
    results.append({"built": built, "log": ours, "layers": layers})
print("RESULT" + json.dumps(results))
"""


@dataclass(frozen=True)
class Layer:
    """One layer of the built engine."""

    name: str
    kind: str
    inputs: dict[str, tuple[str, str]]  # tensor -> type, format
    outputs: dict[str, tuple[str, str]]
    nodes: set[str]  # of the ONNX graph

    @classmethod
    def parse(cls, line: str) -> Layer:
        def tensors(part: str) -> dict[str, tuple[str, str]]:
            found = re.search(rf"{part}: \[((?: ?\{{[^{{}}]*\}},?)*)\]", line)
            each = r"\{ Name: (.*?), Dimensions: .*?Datatype: (\w+)(?:, Format: (.*?))? \}"
            return {n: (t, f) for n, t, f in re.findall(each, found[1] if found else "")}

        match = re.match(r"Name: (.*?), LayerType: (\w+)", line)
        assert match is not None, line
        nodes = set(re.findall(r"\[ONNX Layer: (.*?)\]", line))
        return cls(match[1], match[2], tensors("Inputs"), tensors("Outputs"), nodes)


def layers_of(
    folder: Path,
    models: Sequence[Path],
    *,
    capability: str = "SM86",
    profiles: Sequence[tuple[int, int, int]] = ((1, 8, 64),),
    slow: bool = False,
) -> list[list[Layer]]:
    """The layers of each deployable model's engine; skips the test where none can be built.

    Args:
        folder: for a link to the library.
        profiles: (min, opt, max) batches.
        slow: the plugin may say that the plain kernels run.
    """
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tensorrt_rtx is not installed")
    try:
        library = plugin.plugin_library()
    except ToolchainError as error:
        pytest.skip(f"no toolchain for the plugin: {error.message}")
    # The parser opens the unversioned name, which the wheel lacks.
    real = next(Path(spec.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*"))
    link = folder / "libtensorrt_rtx.so"
    if not link.is_symlink():
        link.symlink_to(real)
    bounds = json.dumps(profiles)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), capability, bounds, *map(str, models)],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=REPO,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    results = json.loads(done.stdout.split("RESULT")[-1])
    for result in results:
        assert result["built"] and (slow or not result["log"]), result["log"]
    return [[Layer.parse(line) for line in result["layers"]] for result in results]
