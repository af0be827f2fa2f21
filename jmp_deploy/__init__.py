"""jmp_deploy: TensorRT engines of timm vision transformers that do a third less work.

    from jmp_deploy import BuildOptions, Engine, build, patch

Importing this package costs nothing and needs no PyTorch, ONNX or TensorRT; each name brings what
it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.artifact import Artifact
    from .core.errors import JmpDeployError
    from .engine.runtime import Engine
    from .jmp.patch import patch, unpatch
    from .pipeline import BuildOptions, build

__version__ = "0.1.0"
__all__ = ["Artifact", "BuildOptions", "Engine", "JmpDeployError", "build", "patch", "unpatch"]

_WHERE = {
    "Artifact": "core.artifact",
    "BuildOptions": "pipeline",
    "Engine": "engine.runtime",
    "JmpDeployError": "core.errors",
    "build": "pipeline",
    "patch": "jmp.patch",
    "unpatch": "jmp.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
