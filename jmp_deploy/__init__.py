"""jmp_deploy: TensorRT engines of timm vision transformers that do a third less work.

Importing this package costs nothing and needs no PyTorch, ONNX or TensorRT; each module imports
what it needs when it is called.
"""

from __future__ import annotations

__version__ = "0.1.0"
