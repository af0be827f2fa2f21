"""What a backend is: something that runs an artifact's model, on this machine or not.

Nothing here, or at module level in a backend's own file, imports PyTorch, ONNX, TensorRT or numpy:
the command line asks the registry for names, and waits for nothing else.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..core.device import cpu_name
from ..core.errors import EngineError, engine_errors, install_command, one_line
from ..core.packages import importable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.artifact import Artifact, Reference
    from ..core.manifest import Precision
    from ..jmp.trace import Choice, Trace

    Images = NDArray[np.float32]

SEED = 0

Infer = Callable[["Images"], "dict[str, NDArray[Any]]"]
"""Any number of images [B, 3, H, W] to outputs: name -> [B, ...]."""


class Watch(Protocol):
    """Runs images [B, 3, H, W] and tells what happened inside.

    Raises:
        JmpDeployError: the model's inner tensors cannot be seen here.
    """

    def __call__(self, images: Images, *, blocks: bool = False) -> Trace:
        """`blocks`: with the tensors of every block."""


Replay = Callable[["Images", "Sequence[Choice]"], "dict[str, NDArray[Any]]"]
"""Images [B, 3, H, W] and what another backend chose for them, to outputs [B, ...] by name: those
of a model that keeps and merges the same tokens."""


@dataclass(frozen=True)
class Opened:
    """An artifact in a backend.

    Attributes:
        backend: which one.
        runner: Polygraphy's, a context manager with `infer`.
        watch: what happens inside; None where only outputs are known.
        replay: with another backend's choices; None where none can be put in.
        note: what a reader of results has to know of it.
    """

    backend: Backend
    runner: Any
    watch: Watch | None = None
    replay: Replay | None = None
    note: str | None = None

    @property
    def name(self) -> str:
        """As results call it: the backend's, or what stands in for it."""
        return str(self.runner.name)


class Backend(ABC):
    """One way to run a model; a subclass in a file of its own, listed in `backends.BACKENDS`.

    Attributes:
        name: of flags and results.
        title: for people.
        is_deployed: runs what was built, not the model as it was before.
        extra: of this package, that installs what it needs.
        packages: what it needs beside that, by the names of imports.
        ability: what `doctor` calls it where `packages` are all that it takes.
        launches: inferences can be launched kernel by kernel or replayed as a CUDA graph.
        shows_choices: its traces tell which tokens a reduction keeps.
    """

    name: str
    title: str
    is_deployed = True
    extra = "runtime"
    packages: tuple[str, ...] = ()
    ability: str | None = None
    launches = False
    shows_choices = False

    @property
    def file(self) -> str | None:
        """The artifact's file that it runs; None for the model as it was before its export."""
        return None

    def obstacle(self, artifact: Artifact) -> str | None:
        """Why an artifact cannot run here, as far as can be told without opening it."""
        if self.file and not artifact.path(self.file).is_file():
            return f"{self.file} is missing"
        for package in self.packages:
            if not importable(package):
                return f"{package} is not installed ({install_command(self.extra)})"
        return None

    def gpu(self) -> str | None:
        """Name of the GPU that it runs on; None where it runs on the CPU."""
        return None

    def device(self) -> str:
        """What it runs on, for people."""
        return self.gpu() or f"CPU {cpu_name()}"

    def precision(self, artifact: Artifact) -> Precision:
        """Which numbers it computes with."""
        return artifact.precision

    def timed_precision(self, artifact: Artifact) -> Precision:
        """Which numbers `timed` computes with."""
        return self.precision(artifact)

    @abstractmethod
    def open(
        self, artifact: Artifact, *, weights: str | None = None, reference: Reference | None = None
    ) -> Opened:
        """An artifact behind Polygraphy's interface, its file checked beforehand.

        Args:
            weights: where a model that is not exported takes its weights from, if not from where
                the build did.
            reference: its outputs may stand in for such a model where that cannot be had; only if
                its images are what will be run, in their order.

        Raises:
            ArtifactError: the file is missing or altered.
            EngineError: it cannot be opened here.
            MissingPackageError: Polygraphy is not installed.
        """

    @abstractmethod
    def timed(self, artifact: Artifact, *, threads: int) -> Timed:
        """An artifact for timing, called as directly as can be, its file checked beforehand.

        Args:
            threads: on a CPU.

        Raises:
            ArtifactError, EngineError: as `open`.
        """

    @contextmanager
    def running(
        self, artifact: Artifact, *, max_batch: int | None = None, cuda_graph: bool = True
    ) -> Iterator[Infer]:
        """An artifact for use.

        Args:
            max_batch: images per inference at most.
            cuda_graph: replay CUDA graphs where there are any.

        Raises:
            ArtifactError, EngineError: as `open`.
        """
        least, best, most = artifact.batch
        most = min(most, max_batch or most)
        if most < least:
            raise EngineError(f"--batch {most} is below the model's {least}")
        with self.open(artifact).runner as runner:
            yield lambda images: infer(runner, images, (least, min(best, most), most))


@dataclass(frozen=True)
class Times:
    """One inference, in ms; what a backend cannot tell apart is None.

    Attributes:
        start: when it began, by the backend's clock.
        total: end to end: from images in host memory to outputs in host memory.
        enqueue: the host's time for the call that starts the computation on the device.
        h2d, compute, d2h: copies in, computation and copies out by the device's own events.
    """

    start: float
    total: float
    enqueue: float | None = None
    h2d: float | None = None
    compute: float | None = None
    d2h: float | None = None

    @classmethod
    def of_host(cls, started: float, ended: float) -> Times:
        """From a clock's seconds."""
        return cls(start=1000 * started, total=1000 * (ended - started))

    @classmethod
    def of_device(
        cls, started: float, ended: float, enqueue: float, spent: Sequence[float]
    ) -> Times:
        """From a clock's seconds, and from milliseconds between events: (h2d, compute, d2h)."""
        return cls(1000 * started, 1000 * (ended - started), 1000 * enqueue, *spent)


class Timed(Protocol):
    """An artifact opened for timing."""

    library: str
    """What runs it, with its version."""

    @property
    def has_graphs(self) -> bool:
        """Whether it can replay inferences as CUDA graphs."""

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """A function that runs one inference of `batch` images from host memory to host memory."""

    def close(self) -> None:
        """Gives back what it holds."""


def guarded(what: str, once: Callable[[], Times]) -> Callable[[], Times]:
    """A timed inference whose errors, whoever raises them, are EngineErrors: see `engine_errors`.
    The guard is outside of what is timed."""

    def infer() -> Times:
        with engine_errors(what):
            return once()

    return infer


def noise(batch: int, shape: tuple[int, ...]) -> Images:
    """Seeded normal images [batch, *shape], float32. Shapes are static: contents change no time."""
    import numpy as np

    random = np.random.default_rng(SEED)
    return random.standard_normal((batch, *shape), dtype=np.float32)


class Outputs(dict[str, "NDArray[Any]"]):
    """Outputs by name, [B, ...]; one that the model turns out not to have is an EngineError."""

    def __missing__(self, name: str) -> NDArray[Any]:
        raise EngineError(
            f"the model has no output {name}, it has {', '.join(map(one_line, self))}",
            "its manifest speaks of another model: build the artifact again",
        )


def infer(runner: Any, images: Images, batch: tuple[int, int, int]) -> dict[str, NDArray[Any]]:
    """Runs any number of images in batches that the engine's profile allows.

    Args:
        runner: an active Polygraphy runner.
        images: [B, 3, H, W].
        batch: (min, opt, max) of the profile. Short batches are padded up to min.

    Returns:
        output name -> [B, ...].

    Raises:
        EngineError: whatever goes wrong in Polygraphy or in what it runs.
    """
    import numpy as np

    from ..core.images import INPUT, join, split

    least, _, most = batch
    parts = []
    for piece in split(images, most, least):
        with engine_errors(f"{runner.name} cannot be run"):
            outputs = runner.infer({INPUT: piece})
        # copied: a runner may write the next batch into the same buffers
        parts.append({name: np.array(value) for name, value in outputs.items()})
    return Outputs(join(parts, len(images)))


def function_runner(function: Callable[[Images], dict[str, Any]], name: str) -> Any:
    """A Polygraphy runner of a function of images [B, 3, H, W]."""
    import numpy as np
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    from ..core.images import INPUT

    class FunctionRunner(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata().add(INPUT, np.float32, (-1, -1, -1, -1))

        def infer_impl(self, feed_dict: dict[str, Any]) -> dict[str, Any]:
            started = time.perf_counter()
            outputs = function(np.asarray(feed_dict[INPUT]))
            self.inference_time = time.perf_counter() - started
            return outputs

    return FunctionRunner(name=name)
