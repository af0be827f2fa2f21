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

from ..core.device import gpus
from ..core.errors import EngineError, JmpDeployError, one_line
from ..core.packages import import_failure
from . import api
from .builder import EVENT, MODULES


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
    except Exception as error:
        failure = import_failure(error)
        if failure is None:
            raise
        _emit("error", message=failure.message, hint=failure.hint, log_says_more=False)
        return 1
    return 0


def _emit(event: str, **fields: Any) -> None:
    print(EVENT + json.dumps({"event": event, **fields}), flush=True)


def _build(request: dict[str, Any]) -> dict[str, Any]:
    trt = api.load(request["flavour"])
    try:
        return _built(trt, request, strongly_typed=True)
    except EngineError as error:
        # Parsers of 10.0 to 10.2 set a compute precision on LayerNormalization, which the headers
        # forbid in a strongly typed network; that of 10.3 is not known.
        if not api.may_fall_back(trt):
            raise
        print(f"strongly typed: {error.message}; trying a weakly typed network", flush=True)
        return _built(trt, request, strongly_typed=False)


def _built(trt: Any, request: dict[str, Any], *, strongly_typed: bool) -> dict[str, Any]:
    from polygraphy.backend.trt import Profile, engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    builder, network, parser = _parse(trt, request, strongly_typed=strongly_typed)
    image = tuple(request["image"])
    profile = Profile()
    for name in api.input_names(network):
        shapes = [(batch, *image) for batch in request["batch"]]
        profile.add(name, *shapes)
    options: dict[str, Any] = {
        "profiles": [profile],
        "progress_monitor": api.progress_monitor(trt, _emit_progress),
    }
    if request["workspace_mb"]:
        options["memory_pool_limits"] = api.workspace_limit(trt, request["workspace_mb"])
    if not strongly_typed:
        options |= api.weakly_typed_options(trt, network)
    cache = request["timing_cache"]
    if cache and Path(cache).is_file():
        options["load_timing_cache"] = cache
    started = time.monotonic()
    try:
        config = _config(trt, request, network)(**options)(builder, network)
        if request["embed_plugin"]:
            api.embed_plugin(config, request["plugin"])
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
        "plugin_layers": api.count_plugins(trt, network),
        "targets": _built_for(trt, request, network),
        "typing": "strong" if strongly_typed else "weak",
    }


def _describe(request: dict[str, Any]) -> dict[str, Any]:
    trt = api.load(request["flavour"])
    _, network, _ = _parse(trt, request)
    return {
        "builder": MODULES[request["flavour"]],
        "version": trt.__version__,
        **api.describe_network(network),
        "plugin_layers": api.count_plugins(trt, network),
    }


def _inspect(request: dict[str, Any]) -> dict[str, Any]:
    trt = api.load(request["flavour"])
    _load_plugin(trt, request)
    words: list[str] = []
    logger = api.make_logger(trt, words.append)
    # Not by Polygraphy, which lets the plan run code of its own on this machine.
    runtime = api.make_runtime(trt, logger)
    engine = api.deserialize(runtime, Path(request["engine"]).read_bytes())
    if engine is None:
        said = f": {one_line(words[-1])}" if words else ""
        raise EngineError(
            f"{request['engine']} cannot be opened here{said}",
            "an engine fits one TensorRT version and GPU architecture: build it again here",
        )
    described = api.describe_engine(trt, engine)
    del engine  # before its runtime
    return {"builder": MODULES[request["flavour"]], "version": trt.__version__, **described}


def _parse(
    trt: Any, request: dict[str, Any], *, strongly_typed: bool = True
) -> tuple[Any, Any, Any]:
    """Parses the model as a strongly typed network: precision is what the ONNX says.

    Args:
        strongly_typed: False for the fallback (see `api.weakly_typed_options`).
    """
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    _load_plugin(trt, request)
    try:
        typed = strongly_typed and api.strongly_typed(trt)
        return network_from_onnx_path(request["model"], strongly_typed=typed)
    except PolygraphyException as error:
        raise EngineError(
            f"{MODULES[request['flavour']]} cannot parse {request['model']}",
            "TensorRT takes the deployable form (model.trt.onnx), with our plugin",
        ) from error


def _load_plugin(trt: Any, request: dict[str, Any]) -> None:
    if request["plugin"]:
        from ..plugin.library import load_plugin

        load_plugin(trt, Path(request["plugin"]))


def _config(trt: Any, request: dict[str, Any], network: Any) -> Any:
    """The class of builder configuration with what only this flavour has, bound to it."""
    from functools import partial

    if request["flavour"] == "tensorrt":
        from polygraphy.backend.trt import CreateConfig

        return CreateConfig
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    if request["use_gpu"]:
        return partial(CreateConfigRTX, use_gpu=True)
    return partial(CreateConfigRTX, compute_capabilities=_targets(trt, request, network))


def _targets(trt: Any, request: dict[str, Any], network: Any) -> list[tuple[int, int]]:
    """Architectures of an ahead-of-time build: those asked for, or all that there are."""
    known = api.compute_capabilities(trt)
    # TensorRT-RTX has no matrix products for Turing but those of FP16 and INT8.
    usual = [pair for pair in known if pair != (7, 5) or api.multiplies_in_half_only(trt, network)]
    wanted = [(major, minor) for major, minor in request["targets"]] or usual
    for major, minor in wanted:
        if (major, minor) not in known:
            names = ",".join(f"sm_{a}{b}" for a, b in known)
            raise EngineError(
                f"TensorRT-RTX {trt.__version__} cannot build for sm_{major}{minor}",
                f"it knows {names}; for other GPUs build on the device with TensorRT",
            )
    return sorted(wanted)


def _built_for(trt: Any, request: dict[str, Any], network: Any) -> list[str]:
    if request["flavour"] == "rtx" and not request["use_gpu"]:
        return [f"sm_{major}{minor}" for major, minor in _targets(trt, request, network)]
    return ["sm_{}{}".format(*gpu.compute_capability) for gpu in gpus()[:1]]


def _emit_progress(phase: str, done: int, total: int) -> None:
    _emit("progress", phase=phase, done=done, total=total)


ACTIONS = {"build": _build, "parse": _describe, "inspect": _inspect}

if __name__ == "__main__":
    sys.exit(main())
