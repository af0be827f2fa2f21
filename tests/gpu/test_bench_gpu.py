"""What `bench` reads and times on a GPU: NVML, CUDA events. Needs PyTorch and timm; no TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

from jmp_deploy.core.manifest import Jmp
from tests.fakes.artifacts import make_artifact

pytestmark = pytest.mark.gpu


def test_nvml_of_a_real_driver_gives_sane_figures():
    from jmp_deploy.bench.nvml import Nvml

    gpu = Nvml()
    reading, facts = gpu.read(), gpu.facts()
    assert reading.gpu_mhz is None or 0 < reading.gpu_mhz <= facts.get("gpu_mhz_limit", 10_000)
    assert reading.temperature_c is None or 0 < reading.temperature_c < 120
    assert reading.power_w is None or 0 < reading.power_w < 2000
    assert facts["driver"]


def test_energy_counter_agrees_with_power():
    import time

    from jmp_deploy.bench import telemetry

    with telemetry.Monitor(telemetry.open_sources(gpu=True)) as monitor:
        if not monitor.can_read_power():
            pytest.skip("this GPU tells no power")
        start = monitor.clock()
        time.sleep(2.5)
    energy = monitor.energy(start, monitor.clock())
    seen = monitor.summary().get("power_w")
    assert energy is not None and energy.watts > 0
    if seen:  # an idle GPU: the counter and the sensor are the same within a wide margin
        assert 0.3 * seen["min"] < energy.watts < 3 * seen["max"]


@pytest.mark.parametrize("batch", [1, 32])
def test_pytorch_on_the_gpu_is_timed_by_events(batch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    from jmp_deploy.backends.torch import TimedModel

    jmp = Jmp("list", ((3, 138), (6, 97), (9, 68)), tau=0.7)
    model = TimedModel(make_artifact(Path(), side=224, name="deit_tiny_patch16_224", jmp=jmp), 1)
    assert model.on_gpu and "FP16" in model.library
    infer = model.prepare(batch, False)
    for _ in range(10):
        times = infer()
    assert times.compute > 0 and times.h2d > 0 and times.d2h > 0
    # events and the host's clock measure the same work
    assert times.h2d + times.compute + times.d2h < times.total * 1.1 + 0.05
    model.close()
    assert torch.cuda.is_available()


def test_events_of_cuda_bindings_have_a_time():
    pytest.importorskip("cuda.bindings")
    from jmp_deploy.engine.cuda import open_cuda

    cuda = open_cuda()
    with cuda.current():
        stream, size = cuda.stream_create(), 1 << 26
        events = [cuda.timer_create() for _ in range(2)]
        device, host = cuda.malloc(size), cuda.malloc_host(size)
        cuda.event_record(events[0], stream)
        cuda.copy(device, host, size, stream)
        cuda.event_record(events[1], stream)
        cuda.stream_synchronize(stream)
        assert 0.1 < cuda.elapsed_ms(*events) < 1000  # 64 MiB: between 600 GB/s and 60 MB/s
        cuda.free(device)
        cuda.free_host(host)
        for event in events:
            cuda.event_destroy(event)
        cuda.stream_destroy(stream)
