"""Backends and sources of telemetry that are not there, and artifacts that hold next to nothing."""

from __future__ import annotations

from pathlib import Path

from jmp_deploy.backends.base import Times
from jmp_deploy.bench.host import Reading
from jmp_deploy.bench.measure import Settings
from jmp_deploy.core.manifest import Macs
from tests.fakes.artifacts import FILE_WEIGHTS, RANDOM_WEIGHTS, write_artifact

QUICK = Settings(warm_iterations=3, iterations=4, rounds=4, visit_seconds=0.0)


class FakeBackend:
    """Every inference takes `ms`, whatever the batch; on a GPU half of it is computation."""

    def __init__(
        self, ms: float, *, on_gpu: bool = False, stop_at: int | None = None, enqueue: float = 0.01
    ) -> None:
        self.enqueue = enqueue
        self.ms, self.has_graphs, self.stop_at = ms, on_gpu, stop_at
        self.library, self.closed = "Fake 1.0", False

    def prepare(self, batch, cuda_graph):
        ms = self.ms - (1.0 if cuda_graph else 0.0)

        def infer() -> Times:
            if batch == self.stop_at:
                raise KeyboardInterrupt
            if not self.has_graphs:
                return Times(start=0.0, total=ms)
            return Times(0.0, ms, self.enqueue, h2d=ms / 4, compute=ms / 2, d2h=ms / 4)

        return infer

    def close(self):
        self.closed = True


class FakeSource:
    name, live = "fake", False

    def __init__(self, *, others=(), **reading) -> None:
        self._others, self.reading = list(others), Reading(**reading)

    def facts(self):
        return {"power_of": "this test"}

    def read(self):
        return self.reading

    def others(self):
        return self._others


def artifact(folder: Path, *, kind="random", macs=4.0, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").touch()
    write_artifact(
        folder,
        **{
            "weights": RANDOM_WEIGHTS if kind == "random" else FILE_WEIGHTS,
            "batch": (1, 8, 32),
            "macs": Macs(int(macs * 1e9), int(4e9)),
            **changes,
        },
    )
    return folder
