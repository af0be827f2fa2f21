"""The process in which TensorRT parses and builds. Started by `engine.py`, never by hand.

Reads one JSON request from standard input; writes events as lines with a prefix to standard
output. Everything else that TensorRT prints is its log.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from .device import gpus
from .engine import EVENT, MODULES
from .errors import EngineError, JmpDeployError


def main() -> int:
    """Serves one request."""
    request = json.load(sys.stdin)
    try:
        _emit("result", value=ACTIONS[request["action"]](request))
    except JmpDeployError as error:
        # An error of TensorRT's own has its reason in the log, which our parent reads.
        more = type(error.__cause__).__module__.startswith("polygraphy")
        _emit("error", message=error.message, hint=error.hint, log_says_more=more)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _emit(event: str, **fields: Any) -> None:
    print(EVENT + json.dumps({"event": event, **fields}), flush=True)


def _build(request: dict[str, Any]) -> dict[str, Any]:
    from polygraphy.backend.trt import Profile, engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    trt = _tensorrt(request["flavour"])
    builder, network, parser = _parse(trt, request)
    image = tuple(request["image"])
    profile = Profile()
    for index in range(network.num_inputs):
        shapes = [(batch, *image) for batch in request["batch"]]
        profile.add(network.get_input(index).name, *shapes)
    options: dict[str, Any] = {
        "profiles": [profile],
        "progress_monitor": _progress_monitor(trt),
    }
    if request["workspace_mb"]:
        limit = request["workspace_mb"] << 20
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: limit}
    cache = request["timing_cache"]
    if cache and Path(cache).is_file():
        options["load_timing_cache"] = cache
    started = time.monotonic()
    try:
        config = _config(trt, request)(**options)(builder, network)
        plan = engine_bytes_from_network(
            (builder, network, parser), config=lambda *_: config, save_timing_cache=cache
        )
    except PolygraphyException as error:
        raise EngineError(
            f"{MODULES[request['flavour']]} could not build the engine",
            "if memory ran out, try a smaller --batch or --workspace",
        ) from error
    data = memoryview(plan)
    Path(request["engine"]).write_bytes(data)
    return {
        "builder": MODULES[request["flavour"]],
        "version": trt.__version__,
        "seconds": round(time.monotonic() - started, 2),
        "bytes": data.nbytes,
        "layers": network.num_layers,
        "plugin_layers": _count_plugins(trt, network),
        "targets": _built_for(trt, request),
    }


def _describe(request: dict[str, Any]) -> dict[str, Any]:
    trt = _tensorrt(request["flavour"])
    _, network, _ = _parse(trt, request)
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layers.append(
            {
                "name": layer.name,
                "type": layer.type.name,
                "outputs": [_tensor(tensor) for tensor in outputs if tensor is not None],
            }
        )
    return {
        "builder": MODULES[request["flavour"]],
        "version": trt.__version__,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "layers": layers,
        "plugin_layers": _count_plugins(trt, network),
    }


def _inspect(request: dict[str, Any]) -> dict[str, Any]:
    from polygraphy.backend.trt import engine_from_bytes
    from polygraphy.exception import PolygraphyException

    trt = _tensorrt(request["flavour"])
    _load_plugin(trt, request)
    try:
        engine = engine_from_bytes(Path(request["engine"]).read_bytes())
    except PolygraphyException as error:
        raise EngineError(
            f"{request['engine']} cannot be opened here",
            "an engine fits one TensorRT version and GPU architecture: build it again here",
        ) from error
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return {
        "builder": MODULES[request["flavour"]],
        "version": trt.__version__,
        # 10.0 has only the one, 11 only the other
        "device_memory": getattr(engine, "device_memory_size_v2", None)
        or engine.device_memory_size,
        "profiles": engine.num_optimization_profiles,
        "layers": layers.get("Layers", []),
    }


def _tensorrt(flavour: str) -> Any:
    import importlib

    try:
        return importlib.import_module(MODULES[flavour])
    except ImportError as error:
        raise EngineError(
            f"{MODULES[flavour]} cannot be imported: {error}", "run `python -m jmp_deploy doctor`"
        ) from error


def _parse(trt: Any, request: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Parses the model as a strongly typed network: precision is what the ONNX says."""
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    _load_plugin(trt, request)
    # TensorRT 11 knows no other kind of network; the flag may go.
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    try:
        return network_from_onnx_path(request["model"], strongly_typed=typed)
    except PolygraphyException as error:
        raise EngineError(
            f"{MODULES[request['flavour']]} cannot parse {request['model']}",
            "TensorRT takes the deployable form (model.trt.onnx), with our plugin",
        ) from error


def _load_plugin(trt: Any, request: dict[str, Any]) -> None:
    if request["plugin"]:
        from .plugin import load_plugin

        load_plugin(trt, Path(request["plugin"]))


def _config(trt: Any, request: dict[str, Any]) -> Any:
    """The class of builder configuration with what only this flavour has, bound to it."""
    from functools import partial

    if request["flavour"] == "tensorrt":
        from polygraphy.backend.trt import CreateConfig

        return CreateConfig
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    if request["use_gpu"]:
        return partial(CreateConfigRTX, use_gpu=True)
    return partial(CreateConfigRTX, compute_capabilities=_targets(trt, request))


def _targets(trt: Any, request: dict[str, Any]) -> list[tuple[int, int]]:
    """Architectures of an ahead-of-time build: those asked for, or all that there are."""
    known = [
        (int(name[2:-1]), int(name[-1]))
        for name in dir(trt.ComputeCapability)
        if name.startswith("SM")
    ]
    # TensorRT-RTX has no FP32 matrix products for Turing.
    usual = [pair for pair in known if request["precision"] != "fp32" or pair != (7, 5)]
    wanted = [(major, minor) for major, minor in request["targets"]] or usual
    for major, minor in wanted:
        if (major, minor) not in known:
            names = ",".join(f"sm_{a}{b}" for a, b in sorted(known))
            raise EngineError(
                f"TensorRT-RTX {trt.__version__} cannot build for sm_{major}{minor}",
                f"it knows {names}; for other GPUs build on the device with TensorRT",
            )
    return sorted(wanted)


def _built_for(trt: Any, request: dict[str, Any]) -> list[str]:
    if request["flavour"] == "rtx" and not request["use_gpu"]:
        return [f"sm_{major}{minor}" for major, minor in _targets(trt, request)]
    return ["sm_{}{}".format(*gpu.compute_capability) for gpu in gpus()[:1]]


def _progress_monitor(trt: Any) -> Any:
    """Sends TensorRT's phases as events. Errors in callbacks would end the process: keep simple."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            _emit("progress", phase=phase, done=0, total=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            _emit("progress", phase=phase, done=step + 1, total=self.totals.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            total = self.totals.pop(phase, 0)
            _emit("progress", phase=phase, done=total, total=total)

    return Monitor()


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _count_plugins(trt: Any, network: Any) -> int:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)


ACTIONS = {"build": _build, "parse": _describe, "inspect": _inspect}

if __name__ == "__main__":
    sys.exit(main())
