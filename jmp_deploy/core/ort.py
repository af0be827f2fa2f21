"""ONNX Runtime sessions on the CPU, all made in one place, and Polygraphy's runner of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EngineError, MissingPackageError, install_command, one_line

if TYPE_CHECKING:
    import onnx

TAKES_TURNS = ("session.force_spinning_stop", "1")
"""A setting for sessions that are timed in turns: the threads of the one that waits would spin on
otherwise, and take the other's cores."""
EXACT_INT8 = ("session.x64quantprecision", "1")
"""A setting for quantized models: a CPU without VNNI overflows in INT8 products otherwise, which no
GPU does."""


def session(
    model: Path | onnx.ModelProto,
    *settings: tuple[str, str],
    threads: int | None = None,
    keep_memory: bool = True,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: a file, or a model that is in none.
        settings: (key, value) of ONNX Runtime's session configuration.
        threads: None takes ONNX Runtime's choice.
        keep_memory: False gives memory back after a run; kept, it is the peak of every size that
            was asked for.

    Raises:
        EngineError: ONNX Runtime cannot open the model.
        ModuleNotFoundError: ONNX Runtime is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # FP16 on a CPU warns of every op that it widens
    options.enable_cpu_mem_arena = keep_memory
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    for key, value in settings:
        options.add_session_config_entry(key, value)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no public base class
        what = model if isinstance(model, Path) else "the marked model"
        reason = one_line(error)
        raise EngineError(f"ONNX Runtime cannot open {what}: {reason}") from error


def session_runner(model: Path | onnx.ModelProto, name: str = "onnxruntime") -> Any:
    """A Polygraphy runner of a portable model on the CPU; opened when it is activated."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    return OnnxrtRunner(lambda: session(model), name=name)


def quiet_polygraphy() -> None:
    """Lets Polygraphy say only what is wrong; progress is ours to show."""
    try:
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingPackageError(
            "polygraphy is not installed", install_command("runtime")
        ) from error
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
