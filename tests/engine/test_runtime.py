"""`Engine` on a CUDA and a TensorRT made of host memory: every path, and every call that fails."""

# ruff: noqa: F811 (fixtures of engine_world)
from __future__ import annotations

import ast
import ctypes
import gc
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jmp_deploy.core import artifact
from jmp_deploy.core.errors import ArtifactError, EngineError, GpuMemoryError, NonFiniteError
from jmp_deploy.core.manifest import PluginFile
from jmp_deploy.engine import arrays
from jmp_deploy.engine.pool import KEPT
from jmp_deploy.engine.runtime import Engine
from tests.fakes.cuda import PRIMARY, Status
from tests.fakes.engine import World, close_to, images, make_world, world  # noqa: F401
from tests.fakes.tensorrt import CLASSES, IMAGE, NewContext, plan

# --- Host memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8, 9, 21])
def test_any_number_of_images_comes_back_in_order(world, count):
    with Engine(world.artifact()) as engine:
        result = engine.infer({"images": images(count)})
    assert list(result) == ["logits"] and close_to(result["logits"], images(count))


def test_a_batch_below_the_profile_is_padded(world):
    with Engine(world.artifact(plan(batch=(4, 4, 8)))) as engine:
        for count in (1, 3, 9):
            assert close_to(engine.infer(images(count, count))["logits"], images(count, count))
            last = images(count, count)[-1:]
            assert np.array_equal(
                world.trt.seen[count % 8 :], np.repeat(last, 4 - count % 8, axis=0)
            )


def test_a_static_batch(world):
    with Engine(world.artifact(plan(batch=(4, 4, 4), static=True))) as engine:
        assert engine.batch == (4, 4, 4)
        assert close_to(engine.infer(images(6))["logits"], images(6))


def test_what_the_engine_says_of_itself(world):
    with Engine(world.artifact()) as engine:
        assert engine.batch == (1, 4, 8) and engine.max_batch == 8
        (image,), (logits,) = engine.inputs, engine.outputs
        assert (image.name, image.shape, image.dtype) == ("images", IMAGE, np.float32)
        assert (logits.name, logits.shape) == ("logits", (CLASSES,))


def test_a_result_is_not_overwritten_by_the_next_call(world):
    with Engine(world.artifact()) as engine:
        first = engine.infer(images(4, 1))["logits"]
        engine.infer(images(4, 2))
    assert close_to(first, images(4, 1))


def test_buffers_are_made_once(world):
    with Engine(world.artifact()) as engine:
        before = [name for name in world.cuda.calls if "lloc" in name]
        for count in (1, 5, 8, 20):
            engine.infer(images(count))
        assert [name for name in world.cuda.calls if "lloc" in name] == before


def test_max_batch_splits_smaller_and_takes_less_memory(world):
    with Engine(world.artifact()) as whole:
        full = world.cuda.used
        whole.infer(images(8))
    with Engine(world.artifact(), max_batch=2) as engine:
        assert world.cuda.used < full / 3
        assert close_to(engine.infer(images(7))["logits"], images(7))
    for wrong in (0, 9):
        with pytest.raises(EngineError, match="1 to 8"):
            Engine(world.artifact(), max_batch=wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": images(1)}, "inputs are image, expected images"),
        ({}, "inputs are none, expected images"),
        (images(1).astype(np.float64), "float64, expected float32"),
        (images(2)[:, :, :3], r"shape \(2, 3, 3, 4\)"),
        (images(0), r"B >= 1"),
        (np.float32(3), "shape"),
    ],
)
def test_inputs_that_do_not_fit_are_named(world, given, message):
    with Engine(world.artifact()) as engine:
        with pytest.raises(EngineError, match=message):
            engine.infer(given)
        assert close_to(engine.infer(images(2))["logits"], images(2))


def test_not_finite_is_named_and_a_failed_check(world):
    words = "'logits' is NaN for 1 of 5 images"
    with (
        Engine(world.artifact(plan(nan=True))) as engine,
        pytest.raises(NonFiniteError, match=words) as caught,
    ):
        engine.infer(images(5))
    assert caught.value.exit_code == 1 and caught.value.row == 4
    with Engine(world.artifact(plan(nan=True)), check_finite=False) as engine:
        assert np.isnan(engine.infer(images(5))["logits"][4]).all()


# --- CUDA graphs --------------------------------------------------------------------------------


def test_one_graph_per_batch_size_captured_on_first_use(world):
    with Engine(world.artifact()) as engine:
        assert world.cuda.count("cuGraphInstantiate") == 0
        for seed, count in enumerate((8, 3, 8, 3, 8)):
            assert close_to(engine.infer(images(count, seed))["logits"], images(count, seed))
        assert world.cuda.count("cuGraphInstantiate") == 2
        assert world.cuda.launches == 3
        assert world.cuda.count("execute_async_v3") == 4  # each size: once to run, once to record


def test_without_cuda_graphs(world):
    with Engine(world.artifact(), cuda_graph=False) as engine:
        for seed in range(3):
            assert close_to(engine.infer(images(4, seed))["logits"], images(4, seed))
    assert world.cuda.count("cuStreamBeginCapture") == 0 and world.cuda.launches == 0


@pytest.mark.parametrize(
    ("call", "which"),
    [
        ("cuStreamBeginCapture", 0),
        ("execute_async_v3", 1),  # the one that is recorded
        ("cuStreamEndCapture", 0),
        ("cuGraphInstantiate", 0),
    ],
)
def test_where_capture_fails_work_goes_on_with_one_warning(world, call, which):
    folder = world.artifact()
    with Engine(folder) as engine:
        opened = len(world.cuda.calls)
        engine.infer(images(5))
        calls = world.cuda.calls[opened:]
    with Engine(folder) as engine:
        position = [index for index, name in enumerate(calls) if name == call][which]
        world.cuda.fail_at = len(world.cuda.calls) + position
        with pytest.warns(RuntimeWarning, match="no CUDA graphs"):
            assert close_to(engine.infer(images(5))["logits"], images(5))
        assert world.cuda.failed == call
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for count in (5, 6, 2, 5):
                assert close_to(engine.infer(images(count))["logits"], images(count))
        assert world.cuda.launches == 0


def test_more_batch_sizes_than_are_kept(world):
    with Engine(world.artifact(plan(batch=(1, 4, 30)))) as engine:
        for _ in range(2):
            for count in range(1, 30):
                assert close_to(engine.infer(images(count))["logits"], images(count))
        assert world.cuda.alive["context"] <= 8


def test_tensorrt_rtx_captures_by_itself_and_keeps_its_kernels(make_world, tmp_path):
    world = make_world("rtx", "1.7.1.116")
    with Engine(world.artifact()) as engine:
        assert world.trt.graph_strategy == "whole" and world.trt.loaded_kernels is None
        for seed in range(3):
            assert close_to(engine.infer(images(4, seed))["logits"], images(4, seed))
    assert world.cuda.count("cuStreamBeginCapture") == 0
    with Engine(world.artifact(), cuda_graph=False):
        assert world.trt.graph_strategy == "off"
        assert world.trt.loaded_kernels == b"compiled by the first process"
    world.assert_clean()


def test_tensorrt_rtx_compiles_first_where_it_is_asked_to(make_world):
    """Else whoever measures would measure the kernels that it runs meanwhile."""
    world = make_world("rtx", "1.7.1.116")
    for eager, expected in ((False, "lazy"), (True, "eager")):
        with Engine(world.artifact(), eager=eager):
            assert world.trt.specialization == expected


def test_tensorrt_rtx_is_asked_whether_it_can_be_captured(make_world):
    world = make_world("rtx", "1.7.1.116")
    world.trt.capturable = False
    given, target = world.device_array(images(2)), world.device_array(np.zeros((2, CLASSES), "f4"))
    stream = world.cuda.cuStreamCreate(1)[1]
    with Engine(world.artifact(), eager=True) as engine:
        with pytest.warns(RuntimeWarning, match="no CUDA graphs.*TensorRT-RTX says"):
            assert close_to(engine.infer(images(2))["logits"], images(2))
        with pytest.warns(RuntimeWarning, match="no CUDA graphs"):
            assert not engine.bind(given, {"logits": target}, stream).is_graph
        world.trt.capturable = True
        assert engine.bind(given, {"logits": target}, stream).is_graph
    world.trt.capturable = False  # as long as it compiles in the background: no reason to warn
    with Engine(world.artifact()) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.infer(images(2))
        call = engine.bind(given, {"logits": target}, stream)
        world.cuda.cuStreamBeginCapture(stream, 1)
        with pytest.raises(EngineError, match="cannot be captured"):
            call()
        status, graph = world.cuda.cuStreamEndCapture(stream)
        assert status == 0
        world.cuda.cuGraphDestroy(graph)
    world.cuda.cuStreamDestroy(stream)
    world.free(given, target)
    world.assert_clean()


def test_tensorrt_10_0_takes_scratch_memory_by_its_old_attribute(make_world):
    world = make_world(version="10.0.1.6")
    with Engine(world.artifact()) as engine:
        assert close_to(engine.infer(images(11))["logits"], images(11))
    world.assert_clean()


# --- Device memory and streams ------------------------------------------------------------------


def test_arrays_on_the_gpu_are_used_in_place(world):
    given, target = world.device_array(images(6)), world.device_array(np.zeros((6, CLASSES), "f4"))
    with Engine(world.artifact()) as engine:
        copies = world.cuda.count("cuMemcpyAsync")
        result = engine.infer(given, out={"logits": target})
        assert result["logits"] is target and close_to(world.read(target), images(6))
        assert world.cuda.count("cuMemcpyAsync") == copies
    world.free(given, target)


def test_results_on_the_gpu_are_allocated_where_none_are_given(world):
    given = world.device_array(images(13))
    with Engine(world.artifact()) as engine:
        result = engine.infer({"images": given})["logits"]
        assert result.shape == (13, CLASSES) and close_to(world.read(result), images(13))
        del result
    world.free(given)


def test_a_short_batch_on_the_gpu_is_padded(world):
    with Engine(world.artifact(plan(batch=(4, 4, 8)))) as engine:
        for count in (1, 3, 9, 3):
            given = world.device_array(images(count, count))
            result = engine.infer(given)["logits"]
            assert close_to(world.read(result), images(count, count))
            assert (world.trt.seen[count % 8 :] == images(count, count)[-1]).all()
            world.free(given)
        del result


def test_addresses_that_come_again_get_a_graph(world):
    given, target = world.device_array(images(4)), world.device_array(np.zeros((4, CLASSES), "f4"))
    with Engine(world.artifact()) as engine:
        for _ in range(4):
            engine.infer(given, out={"logits": target})
        assert world.cuda.count("cuGraphInstantiate") == 1 and world.cuda.launches == 2
        for _ in range(12):  # fresh arrays are not worth one
            other = world.device_array(images(4, 5))
            result = engine.infer(other)["logits"]
            assert close_to(world.read(result), images(4, 5))
            del result
            world.free(other)
    world.free(given, target)


@pytest.mark.parametrize("kind", ["integer", "torch", "cupy", "pycuda", "numba", "cuda.core"])
def test_a_stream_of_any_library_is_only_enqueued_on(world, kind):
    number = world.cuda.cuStreamCreate(1)[1]
    stream = {
        "integer": number,
        "torch": SimpleNamespace(cuda_stream=number),
        "cupy": SimpleNamespace(ptr=number),
        "pycuda": SimpleNamespace(handle=number),
        "numba": SimpleNamespace(handle=ctypes.c_void_p(number)),
        "cuda.core": SimpleNamespace(__cuda_stream__=lambda: (0, number)),
    }[kind]
    given, target = world.device_array(images(5)), world.device_array(np.zeros((5, CLASSES), "f4"))
    with Engine(world.artifact(), cuda_graph=False) as engine:
        engine.infer(given, stream=stream, out={"logits": target})
        assert not world.read(target).any(), "nothing ran before somebody waited"
        world.cuda.cuStreamSynchronize(number)
        assert close_to(world.read(target), images(5))
    world.cuda.cuStreamDestroy(number)
    world.free(given, target)


def test_what_is_no_stream_is_refused(world):
    given = world.device_array(images(1))
    with Engine(world.artifact()) as engine:
        with pytest.raises(EngineError, match="no CUDA stream"):
            engine.infer(given, stream=object())
        with pytest.raises(EngineError, match="for arrays on the GPU"):
            engine.infer(images(1), stream=3)
    world.free(given)


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_two_streams_share_a_lane_without_mixing(world, done):
    """The first stream has come some steps far when the second one's work is waited for: it must
    not have taken the lane's buffers."""
    streams = [world.cuda.cuStreamCreate(1)[1] for _ in range(2)]
    given = [world.device_array(images(2, seed)) for seed in range(2)]
    targets = [world.device_array(np.zeros((2, CLASSES), "f4")) for _ in range(2)]
    with Engine(world.artifact(plan(batch=(4, 4, 8)))) as engine:  # padded: the lane's own buffers
        engine.infer(images(4))  # captures
        for index in range(2):
            out = {"logits": targets[index]}
            engine.infer(given[index], stream=streams[index], out=out)
        first = world.cuda.streams[streams[0]]
        world.cuda.drain(first, until=done)  # of two copies in, two of padding, a run, a copy out
        for index in (1, 0):
            world.cuda.cuStreamSynchronize(streams[index])
        for index in range(2):
            assert close_to(world.read(targets[index]), images(2, index))
    for stream in streams:
        world.cuda.cuStreamDestroy(stream)
    world.free(*given, *targets)


def test_work_of_the_producer_is_waited_for(world):
    """Whoever made the array on the default stream may still be at it."""
    given = world.device_array(np.zeros((3, *IMAGE), np.float32))
    address = given.__cuda_array_interface__["data"][0]
    values = images(3)
    world.cuda.enqueue(0, lambda: ctypes.memmove(address, values.ctypes.data, values.nbytes))
    with Engine(world.artifact()) as engine:
        result = engine.infer(given)["logits"]
        assert close_to(world.read(result), values)
        stream = world.cuda.cuStreamCreate(1)[1]
        given.__cuda_array_interface__["stream"] = int(stream)
        later = images(3, 9)
        world.cuda.enqueue(stream, lambda: ctypes.memmove(address, later.ctypes.data, later.nbytes))
        result = engine.infer(given)["logits"]
        assert close_to(world.read(result), later)
        del result
    world.cuda.cuStreamDestroy(stream)
    world.free(given)


def test_closing_waits_for_work_on_streams_of_others(world):
    stream = world.cuda.cuStreamCreate(1)[1]
    given, target = world.device_array(images(5)), world.device_array(np.zeros((5, CLASSES), "f4"))
    with Engine(world.artifact()) as engine:
        engine.infer(given, stream=stream, out={"logits": target})
    assert close_to(world.read(target), images(5))
    world.cuda.cuStreamDestroy(stream)
    world.free(given, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": (4, 16, 64, 256)}, "not contiguous"),
        ({"typestr": "<f2"}, "float16, expected float32"),
        ({"shape": (5, *IMAGE[:2], 2)}, "shape"),
        ({"mask": object()}, "mask"),
    ],
)
def test_arrays_on_the_gpu_that_do_not_fit(world, change, message):
    given = world.device_array(images(5))
    given.__cuda_array_interface__.update(change)
    with Engine(world.artifact()) as engine, pytest.raises(EngineError, match=message):
        engine.infer(given)
    world.free(given)


def test_outputs_that_do_not_fit(world):
    given, short = world.device_array(images(5)), world.device_array(np.zeros((4, CLASSES), "f4"))
    with Engine(world.artifact()) as engine:
        with pytest.raises(EngineError, match="4 rows, the inputs have 5"):
            engine.infer(given, out={"logits": short})
        with pytest.raises(EngineError, match="no output 'probabilities'"):
            engine.infer(given, out={"probabilities": short})
        short.__cuda_array_interface__["data"] = (1 << 20, True)
        with pytest.raises(EngineError, match="read-only"):
            engine.infer(given, out={"logits": short})
    world.cuda.allocations.clear()


# --- Streams of others: order, captures -----------------------------------------------------------


def test_work_on_the_default_stream_goes_through_a_lane_in_its_order(world):
    """TensorRT synchronises more on stream 0."""
    given, target = world.device_array(images(3)), world.device_array(np.zeros((3, CLASSES), "f4"))
    used = []
    original = NewContext._execute
    world.trt.context_type = type(
        "Context",
        (NewContext,),
        {"_execute": lambda self, stream: used.append(stream) or original(self, stream)},
    )
    address, values = given.__cuda_array_interface__["data"][0], images(3, 4)
    with Engine(world.artifact()) as engine:
        for stream in (0, 1, SimpleNamespace(cuda_stream=0)):  # 1: CU_STREAM_LEGACY
            world.cuda.enqueue(0, lambda: ctypes.memmove(address, values.ctypes.data, 576))
            engine.infer(given, stream=stream, out={"logits": target})
        world.cuda.cuStreamSynchronize(0)
        assert close_to(world.read(target), values)
    assert used and 0 not in used
    world.free(given, target)


def test_a_stream_with_the_handle_of_one_that_is_gone_waits_for_its_work(world):
    given, target = world.device_array(images(2)), world.device_array(np.zeros((2, CLASSES), "f4"))
    with Engine(world.artifact(), cuda_graph=False) as engine:
        waits = []
        for _ in range(2):
            stream = world.cuda.cuStreamCreate(1)[1]
            world.cuda._numbers = iter([int(stream), *range(1 << 40, (1 << 40) + 9)])
            before = world.cuda.count("cuStreamWaitEvent")
            engine.infer(given, stream=stream, out={"logits": target})
            waits.append(world.cuda.count("cuStreamWaitEvent") - before)
            world.cuda.cuStreamDestroy(stream)
        assert waits == [0, 1]
    world.free(given, target)


def test_infer_refuses_a_stream_that_is_captured_and_leaves_the_capture_whole(world):
    given, target = world.device_array(images(2)), world.device_array(np.zeros((2, CLASSES), "f4"))
    stream = world.cuda.cuStreamCreate(1)[1]
    with Engine(world.artifact()) as engine:
        for _ in range(3):
            engine.infer(given, stream=stream, out={"logits": target})
        other = world.device_array(images(5))  # of a size that was never run
        world.cuda.cuStreamBeginCapture(stream, 1)
        for batch in (given, other):
            with pytest.raises(EngineError, match="is being captured") as caught:
                engine.infer(batch, stream=stream)
            assert "Engine.bind" in caught.value.hint
        status, graph = world.cuda.cuStreamEndCapture(stream)
        assert status == 0 and world.cuda.objects[graph][1] == []
        engine.infer(given, stream=stream, out={"logits": target})
        world.cuda.cuGraphDestroy(graph)
        world.cuda.cuStreamSynchronize(stream)
    world.free(given, target, other)
    world.cuda.cuStreamDestroy(stream)


def test_the_default_stream_is_refused_while_a_stream_that_it_waits_for_is_captured(world):
    given = world.device_array(images(2))
    with Engine(world.artifact()) as engine:
        refuse = (Status.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, None)
        world.cuda.driver.cuStreamIsCapturing = lambda stream: refuse
        with pytest.raises(EngineError, match="is being captured"):
            engine.infer(given)
    world.free(given)


# --- Bound calls ---------------------------------------------------------------------------------


@pytest.fixture
def arrays_and_stream(world):
    given, target = world.device_array(images(3)), world.device_array(np.zeros((3, CLASSES), "f4"))
    stream = world.cuda.cuStreamCreate(1)[1]
    yield given, {"logits": target}, stream
    world.free(given, target)
    world.cuda.cuStreamDestroy(stream)


def test_a_bound_call_is_one_launch(world, arrays_and_stream):
    given, out, stream = arrays_and_stream
    with Engine(world.artifact()) as engine, world.current():
        call = engine.bind(given, out, stream)
        assert call.is_graph and call.outputs == out
        for seed in range(3):
            values = images(3, seed)
            address = given.__cuda_array_interface__["data"][0]
            ctypes.memmove(address, values.ctypes.data, values.nbytes)
            before = len(world.cuda.calls)
            call()
            # asking is no work; nothing else is between a caller's events
            assert world.cuda.calls[before:] == ["cuStreamIsCapturing", "cuGraphLaunch"]
            world.cuda.cuStreamSynchronize(stream)
            assert close_to(world.read(out["logits"]), values)
        call.close()
        with pytest.raises(EngineError, match="this bound call is closed"):
            call()
        call.close()


def test_a_bound_call_without_graphs_and_in_a_thread_without_a_context(world, arrays_and_stream):
    given, out, stream = arrays_and_stream
    with Engine(world.artifact(), cuda_graph=False, contexts=0) as engine:
        with pytest.raises(EngineError, match="contexts=0"):
            engine.infer(images(1))
        call = engine.bind(given, out, stream)
        assert not call.is_graph
        with ThreadPoolExecutor(1) as threads:
            threads.submit(call).result(10)
        world.cuda.cuStreamSynchronize(stream)
        assert close_to(world.read(out["logits"]), images(3)) and world.cuda.launches == 0
    with pytest.raises(EngineError, match="closed"):  # with its engine
        call()
    with pytest.raises(EngineError, match="closed"):
        engine.bind(given, out, stream)


def test_a_bound_call_goes_into_the_caller_s_own_graph(world, arrays_and_stream):
    given, out, stream = arrays_and_stream
    with Engine(world.artifact()) as engine, engine.bind(given, out, stream) as call:
        world.cuda.cuStreamBeginCapture(stream, 1)
        call()
        status, graph = world.cuda.cuStreamEndCapture(stream)
        assert status == 0
        values, address = images(3, 8), given.__cuda_array_interface__["data"][0]
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
        executable = world.cuda.cuGraphInstantiate(graph, 0)[1]
        world.cuda.cuGraphLaunch(executable, stream)
        engine.infer(images(8))  # shares nothing with it
        world.cuda.cuStreamSynchronize(stream)
        assert close_to(world.read(out["logits"]), values)
        world.cuda.cuGraphExecDestroy(executable)
        world.cuda.cuGraphDestroy(graph)


def test_what_cannot_be_bound_is_refused(world, arrays_and_stream):
    given, out, stream = arrays_and_stream
    wide, target = world.device_array(images(3)), world.device_array(np.zeros((9, CLASSES), "f4"))
    whole = world.device_array(images(9))
    with Engine(world.artifact(), max_batch=8) as engine:
        for arguments, message in (
            ((given, out, 0), "not the default stream"),
            ((given, {}, stream), "name an array for every output: logits"),
            ((given, {"logits": target}, stream), "9 rows, the inputs have 3"),
            ((whole, {"logits": target}, stream), "9 images: bind takes 1 to 8"),
        ):
            with pytest.raises(EngineError, match=message):
                engine.bind(*arguments)
        world.cuda.cuStreamBeginCapture(stream, 1)
        with pytest.raises(EngineError, match="is being captured"):
            engine.bind(given, out, stream)
        assert world.cuda.cuStreamEndCapture(stream)[0] == 0
        world.cuda.objects.pop(max(world.cuda.objects))
    world.free(wide, target, whole)


def test_a_bound_call_that_does_not_fit_says_what_it_needs(make_world):
    world = make_world(memory=12_000)
    given, target = world.device_array(images(8)), world.device_array(np.zeros((8, CLASSES), "f4"))
    stream = world.cuda.cuStreamCreate(1)[1]
    with (
        Engine(world.artifact(), contexts=0) as engine,
        engine.bind(given, {"logits": target}, stream),
        pytest.raises(GpuMemoryError, match="bound call of batch 8 needs 8000 bytes"),
    ):
        engine.bind(given, {"logits": target}, stream)
    world.free(given, target)
    world.cuda.cuStreamDestroy(stream)
    world.assert_clean()


# --- Threads and contexts -----------------------------------------------------------------------


@pytest.mark.parametrize("contexts", [1, 3])
def test_many_threads_at_once(world, contexts):
    with (
        Engine(world.artifact(), contexts=contexts) as engine,
        ThreadPoolExecutor(8) as threads,
    ):

        def work(seed: int) -> bool:
            count = 1 + seed % 11
            return close_to(engine.infer(images(count, seed))["logits"], images(count, seed))

        assert all(threads.map(work, range(120)))


def test_closing_waits_for_running_calls_and_refuses_later_ones(world):
    engine = Engine(world.artifact())
    inside, go = threading.Event(), threading.Event()
    original = world.cuda.cuStreamSynchronize

    def slow(stream):
        inside.set()
        assert go.wait(10)
        return original(stream)

    world.cuda.driver.cuStreamSynchronize = slow
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(engine.infer, images(2))
        assert inside.wait(10)
        closing = threads.submit(engine.close)
        assert not closing.done()
        go.set()
        assert close_to(running.result(10)["logits"], images(2))
        closing.result(10)
    with pytest.raises(EngineError, match="is closed"):
        engine.infer(images(1))
    engine.close()


def test_a_context_of_another_library_is_used_and_left_current(world):
    """pycuda: a context of its own, current in this thread only."""
    pycuda = 0xBEEF
    world.cuda.push(pycuda)
    given = world.device_array(images(3))
    engine = Engine(world.artifact())
    assert world.cuda.context() == pycuda
    with ThreadPoolExecutor(1) as threads:  # in a thread where none is current
        assert close_to(threads.submit(engine.infer, images(9)).result(10)["logits"], images(9))
        assert threads.submit(world.cuda.context).result(10) == PRIMARY
    assert close_to(world.read(engine.infer(given)["logits"]), images(3))
    world.cuda.pop()
    engine.close()
    world.cuda.push(pycuda)
    world.free(given)
    assert {owner for _, _, _, owner in world.cuda.allocations.values()} == set()


def test_the_caller_s_context_stays_current(world):
    """With none, none is left; with another one, of another GPU even, that one is."""
    with Engine(world.artifact()) as engine:
        assert world.cuda.context_stack() == []
        engine.infer(images(2))
    assert world.cuda.context_stack() == []
    pycuda = 0xBEEF
    world.cuda.push(pycuda)
    with Engine(world.artifact(), device=0) as engine:
        assert close_to(engine.infer(images(2))["logits"], images(2))
        assert world.cuda.context() == pycuda
    with pytest.raises(ArtifactError):
        Engine(world.folder / "nowhere", device=0)
    assert world.cuda.context_stack() == [pycuda]
    world.cuda.pop()


def test_arrays_of_another_gpu_are_refused(world):
    given, target = world.device_array(images(3)), world.device_array(np.zeros((3, CLASSES), "f4"))
    address = given.__cuda_array_interface__["data"][0]
    world.cuda.other_gpu.add(address)
    on_host = SimpleNamespace(
        __cuda_array_interface__={
            **given.__cuda_array_interface__,
            "data": (images(3).ctypes.data, False),
        }
    )
    with Engine(world.artifact()) as engine:
        for array in (given, arrays.DeviceArray(address, (3, *IMAGE), np.dtype("f4"))):
            with pytest.raises(EngineError, match="input 'images' lies on GPU 1, the engine") as e:
                engine.infer(array)
            assert "device=1" in e.value.hint
        producer = Producer(address, (3, *IMAGE), number=1)
        with pytest.raises(EngineError, match="lies on GPU 1"):
            engine.infer(producer)
        assert producer.streams == [], "it was never asked to synchronise with a stream of ours"
        with pytest.raises(EngineError, match="CUDA knows of no memory at 0x"):
            engine.infer(on_host)
        world.cuda.other_gpu = {target.__cuda_array_interface__["data"][0]}
        with pytest.raises(EngineError, match="output 'logits' lies on GPU 1"):
            engine.infer(given, out={"logits": target})
    world.free(given, target)


# --- Opening ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"version": "10.3.0.26"}, "TensorRT version: expected 10.3.0.26, found 10.13.0.35"),
        ({"targets": ["sm_87"]}, r"compute capability: expected sm_87, found sm_86 \(Fake GPU\)"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_deserialized(world, engine, message):
    with pytest.raises(EngineError, match=message) as caught:
        Engine(world.artifact(**engine))
    assert "--rebuild" in caught.value.hint
    assert "python -m jmp_deploy build deit_s" in caught.value.hint
    assert world.cuda.count("deserialize_cuda_engine") == 0


def test_all_that_does_not_fit_is_said_at_once(world):
    with pytest.raises(EngineError, match=r"version.*; compute capability"):
        Engine(world.artifact(version="10.3.0.26", targets=("sm_87", "sm_110")))


def test_a_plugin_of_other_sources_is_refused_and_one_of_another_compiler_taken(
    world, monkeypatch, tmp_path
):
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"compiled here")
    library.with_suffix(".json").write_text('{"sources": "abc"}')
    loaded = []
    monkeypatch.setattr(
        "jmp_deploy.plugin.library.load_plugin", lambda trt, path: loaded.append(path)
    )
    built_with = PluginFile(library.name, "0" * 64)
    with pytest.raises(EngineError, match=r"plugin: expected sha256 000000000000\.\.\., found"):
        Engine(world.artifact(plugin=built_with), plugin=library)
    with pytest.raises(EngineError, match="plugin: expected"):
        Engine(world.artifact(plugin=replace(built_with, sources="abd")), plugin=library)
    assert loaded == []
    with Engine(
        world.artifact(plugin=replace(built_with, sources="abc")), plugin=library
    ) as engine:
        assert loaded == [library]
        engine.infer(images(1))


def test_an_altered_engine_is_refused(world):
    folder = world.artifact()
    content = (folder / artifact.ENGINE).read_bytes()
    (folder / artifact.ENGINE).write_bytes(content[:-1] + b" ")
    with pytest.raises(ArtifactError, match="is not the file that was built"):
        Engine(folder)


def test_without_a_manifest_only_when_asked_and_with_a_warning(world, tmp_path):
    path = tmp_path / "alone" / "some.plan"
    path.parent.mkdir()
    path.write_bytes(plan())
    with pytest.raises(ArtifactError, match=r"no manifest\.json beside it") as caught:
        Engine(path)
    assert "--no-manifest" in caught.value.hint
    with pytest.warns(RuntimeWarning, match="without a manifest"):
        engine = Engine(path, use_manifest=False, flavour="tensorrt")
    with engine:
        assert close_to(engine.infer(images(2))["logits"], images(2))
    with pytest.raises(ArtifactError, match="no such engine"):
        Engine(tmp_path / "nowhere.plan", use_manifest=False)
    with pytest.raises(ArtifactError, match="no such engine"):
        Engine(tmp_path / "nowhere" / "model.engine")


def test_a_plan_that_tensorrt_refuses_ends_with_its_words(world, tmp_path):
    with pytest.raises(EngineError, match="cannot be opened: Serialization assertion failed"):
        Engine(world.artifact(b"not a plan"))


def test_tensorrt_rtx_says_what_does_not_fit(make_world):
    world = make_world("rtx", "1.7.1.116")
    world.trt.verdict = (2, 3)
    with pytest.raises(EngineError, match="version mismatch, unsupported cc"):
        Engine(world.artifact())
    assert world.cuda.count("deserialize_cuda_engine") == 0
    world.assert_clean()


def test_only_the_batch_may_be_dynamic(world):
    with pytest.raises(EngineError, match="only the batch may be dynamic"):
        Engine(world.artifact(plan(image=(3, -1, 4))))


def test_a_plan_is_not_copied_into_memory(world):
    """On a Jetson, GPU and CPU share it: a copy of the plan is memory that the engine lacks."""
    size = 64 << 20
    grown = []

    class Runtime(world.trt.Runtime):
        def deserialize_cuda_engine(self, serialized_engine):
            assert memoryview(serialized_engine).nbytes == size
            grown.append(anonymous_memory() - before)
            return super().deserialize_cuda_engine(bytes(serialized_engine).rstrip())

    world.trt.Runtime = Runtime
    folder = world.artifact(plan().ljust(size))
    before = anonymous_memory()
    with Engine(folder) as engine:
        assert close_to(engine.infer(images(1))["logits"], images(1))
    assert grown[0] < size / 4


def anonymous_memory() -> int:
    """Bytes of this process that are not a file's: what Linux cannot take back."""
    (line,) = (ln for ln in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in ln)
    return 1024 * int(line.split()[1])


def test_an_empty_plan_is_refused(world):
    with pytest.raises(EngineError, match="cannot be read"):
        Engine(world.artifact(b""))


# --- Memory -------------------------------------------------------------------------------------


def test_too_little_memory_names_the_batch_that_fits(make_world):
    row = 4 * (int(np.prod(IMAGE)) + CLASSES)  # input and output
    world = make_world(memory=5 * (row + 1000) + 500)
    with pytest.raises(GpuMemoryError, match=r"batch 8 needs .* per context.*; batch 5 fits") as e:
        Engine(world.artifact())
    assert "max_batch=5" in e.value.hint and "--batch 5" in e.value.hint
    del e
    world.assert_clean()
    with Engine(world.artifact(), max_batch=5) as engine:
        assert close_to(engine.infer(images(8))["logits"], images(8))
    world.assert_clean()


def test_not_even_one_image_fits(make_world):
    world = make_world(memory=1100)
    with pytest.raises(GpuMemoryError, match="not even batch 1 fits"):
        Engine(world.artifact())
    world.assert_clean()


def test_a_context_that_cannot_tell_its_scratch_memory_is_refused(world):
    """0 is TensorRT's word for an error; memory of no bytes would be written past its end."""
    with pytest.raises(EngineError, match="TensorRT refuses a batch of 8"):
        Engine(world.artifact(plan(scratch=0)))


def test_outputs_come_from_a_pool_in_the_order_of_a_stream(world):
    given = world.device_array(images(2))
    streams = [world.cuda.cuStreamCreate(1)[1] for _ in range(2)]
    with Engine(world.artifact()) as engine:

        def address(stream) -> int:
            result = engine.infer(given, stream=stream)["logits"]
            if stream is not None:
                world.cuda.cuStreamSynchronize(stream)
            assert close_to(world.read(result), images(2))
            return result.pointer

        for stream in (None, *streams):
            used = {address(stream) for _ in range(3)}
            before = world.cuda.count("cuMemAlloc"), world.cuda.count("cuMemFree")
            assert {address(stream) for _ in range(5)} <= used
            assert (world.cuda.count("cuMemAlloc"), world.cuda.count("cuMemFree")) == before
        assert not {address(streams[0])} & {address(streams[1])}
        kept = engine.infer(given)["logits"]
        assert address(None) != kept.pointer, "what is still held is nobody else's"
    assert close_to(world.read(kept), images(2)), "nor freed with the engine"
    del kept
    for stream in streams:
        world.cuda.cuStreamDestroy(stream)
    world.free(given)


def test_the_pool_keeps_a_few_pieces_only(world):
    with Engine(world.artifact()) as engine:
        results = []
        for _ in range(3 * KEPT):
            given = world.device_array(images(2))
            results.append(engine.infer(given)["logits"])
            world.free(given)
        held = len(world.cuda.allocations)
        results.clear()
        assert (
            len(world.cuda.allocations) <= held - 2 * KEPT + 1
        )  # one is the lane's, until its next


def test_the_pool_keeps_little_and_gives_it_back_before_memory_runs_out(make_world):
    world = make_world(memory=40_000)
    given = world.device_array(images(8))
    with Engine(world.artifact(plan(classes=400))) as engine:  # 12800 bytes of output
        for count in (8, 7, 6, 8):
            part = world.device_array(images(count))
            result = engine.infer(part)["logits"]
            del result
            world.free(part)
    world.free(given)
    world.assert_clean()


def test_too_little_memory_for_the_weights(make_world):
    world = make_world(memory=1 << 20)
    with pytest.raises(GpuMemoryError, match="OutOfMemory"):
        Engine(world.artifact(plan(weights=1 << 21)))
    world.assert_clean()


# --- Every call that can fail -------------------------------------------------------------------


def _session(world: World, folder: Path) -> None:
    """Touches every path: two lanes, host and device, padding, splitting, graphs, eviction."""
    with Engine(folder, contexts=2) as engine:
        engine.infer(images(9))
        engine.infer(images(9))
        result = engine.infer(world.given, out={"logits": world.target})
        engine.infer(world.given, out={"logits": world.target})
        result = engine.infer(world.given)
        del result
        call = engine.bind(world.whole, {"logits": world.outputs}, world.stream)
        call()
        call.close()
        engine.bind(world.whole, {"logits": world.outputs}, world.stream)()


@pytest.mark.parametrize("flavour", ["tensorrt", "rtx"])
def test_everything_is_freed_whichever_call_fails(make_world, flavour):
    world = make_world(flavour)
    folder = world.artifact(plan(batch=(4, 4, 8)))
    given, target = world.device_array(images(3)), world.device_array(np.zeros((3, CLASSES), "f4"))
    world.given, world.target = given, target
    world.whole = world.device_array(images(4))
    world.outputs = world.device_array(np.zeros((4, CLASSES), "f4"))
    world.stream = world.cuda.cuStreamCreate(1)[1]
    kept, objects = dict(world.cuda.allocations), dict(world.cuda.objects)
    _session(world, folder)  # makes the primary context, and TensorRT-RTX's kernels
    world.cuda.calls.clear()
    _session(world, folder)
    total = len(world.cuda.calls)
    assert total > 60
    failed = set()
    for position in range(total):
        world.cuda.calls.clear()
        world.cuda.fail_at, world.cuda.failed = position, None
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                _session(world, folder)
            except EngineError as error:
                assert error.message
            else:  # no error: a capture that fails, and what a result's end cannot raise
                words = " ".join(str(one.message) for one in warned)
                silent = ("cuMemFree", "cuGraphDestroy")
                assert "no CUDA graphs" in words or world.cuda.failed in silent
        world.cuda.fail_at = None
        failed.add(world.cuda.failed)
        assert world.cuda.violations == [], (position, world.cuda.failed)
        assert world.cuda.allocations.keys() == kept.keys(), (position, world.cuda.failed)
        assert world.cuda.objects == objects, (position, world.cuda.failed)
        assert not +world.cuda.alive, (position, world.cuda.failed)
        assert all(stream.capture is None for stream in world.cuda.streams.values())
    assert {"cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "create_execution_context"} <= failed
    assert {"cuStreamSynchronize", "execute_async_v3", "cuStreamDestroy"} <= failed


def test_an_engine_that_is_forgotten_frees_itself_and_says_so(world):
    engine = Engine(world.artifact())
    engine.infer(images(2))
    with pytest.warns(ResourceWarning, match="was not closed"):
        del engine
        gc.collect()


def test_an_error_of_the_caller_frees_everything_and_is_what_is_heard(world):
    with pytest.raises(ZeroDivisionError), Engine(world.artifact()) as engine:
        engine.infer(images(2))
        raise ZeroDivisionError


# --- DLPack -------------------------------------------------------------------------------------


class Producer:
    """An array that speaks DLPack only, as `__dlpack__` of 2021 defines it."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        *,
        kind: int = 2,
        bits: int = 32,
        number: int = 0,
        offset: int = 0,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.kind, self.number, self.released, self.streams = kind, number, 0, []
        self.dims = (ctypes.c_int64 * len(shape))(*shape)
        self.steps = (ctypes.c_int64 * len(shape))(*strides) if strides else None
        self.managed = arrays._Managed()
        self.deleter = arrays._DELETER(self._release)
        self.managed.deleter = self.deleter
        tensor = self.managed.tensor
        tensor.data, tensor.byte_offset = address - offset, offset
        tensor.device_type, tensor.ndim = kind, len(shape)
        tensor.code, tensor.bits, tensor.lanes = 2, bits, 1
        tensor.shape = ctypes.cast(self.dims, ctypes.POINTER(ctypes.c_int64))
        if self.steps:
            tensor.strides = ctypes.cast(self.steps, ctypes.POINTER(ctypes.c_int64))

    def _release(self, managed) -> None:
        self.released += 1

    def __dlpack_device__(self):
        return self.kind, self.number

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        self.capsule = new(ctypes.addressof(self.managed), b"dltensor", None)
        return self.capsule


def test_dlpack_arrays_are_used_in_place_and_given_back(world):
    given = world.device_array(images(5))
    address = given.__cuda_array_interface__["data"][0]
    producer = Producer(address, (5, *IMAGE), offset=256, strides=(48, 16, 4, 1))
    stream = world.cuda.cuStreamCreate(1)[1]
    with Engine(world.artifact()) as engine:
        result = engine.infer(producer, stream=stream)["logits"]
        world.cuda.cuStreamSynchronize(stream)
        assert close_to(world.read(result), images(5))
        assert producer.streams == [int(stream)], "the producer makes this stream wait"
        assert producer.released == 0, "the GPU may still be reading"
        is_valid = ctypes.pythonapi.PyCapsule_IsValid
        is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
        assert is_valid(producer.capsule, b"used_dltensor"), "or its end would free it again"
        engine.infer(images(1))
        assert producer.released == 1
        result = engine.infer(Producer(address, (5, *IMAGE)), stream=0)["logits"]
        world.cuda.cuStreamSynchronize(0)
        assert close_to(world.read(result), images(5))
        del result
    world.cuda.cuStreamDestroy(stream)
    world.free(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (1, 3, 12, 48)}, "not contiguous"),
        ({"bits": 16}, "float16, expected float32"),
        ({"bits": 4}, "numpy has no type"),
        ({"kind": 10}, "device of kind 10|numpy cannot read"),
    ],
)
def test_dlpack_arrays_that_do_not_fit_are_given_back_too(world, options, message):
    producer = Producer(1 << 20, (5, *IMAGE), **options)
    with Engine(world.artifact()) as engine:
        with pytest.raises(EngineError, match=message):
            engine.infer(producer)
        gc.collect()
        assert producer.released == len(producer.streams)


def test_torch_and_numpy_arrays_in_host_memory_need_no_conversion(world):
    torch = pytest.importorskip("torch")
    with Engine(world.artifact()) as engine:
        result = engine.infer(torch.from_numpy(images(3)))["logits"]
        assert isinstance(result, np.ndarray) and close_to(result, images(3))
        assert close_to(engine.infer(images(6)[::2])["logits"], images(6)[::2])


def test_torch_reads_a_device_array_s_interface():
    """What PyTorch, CuPy and Numba ask of `__cuda_array_interface__`."""
    array = arrays.DeviceArray(4096, (2, 3), np.dtype(np.float16))
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (4096, False),
        "strides": None,
        "stream": None,
        "version": 3,
    }
    assert array.nbytes == 12 and len(array) == 2


def test_importing_the_runtime_takes_the_base_install_alone():
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"  # what .pth files of the installation load
        "import jmp_deploy.engine.runtime\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "names -= set(sys.stdlib_module_names)\n"
        "print(sorted(name for name in names if not name.startswith('_')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # msgspec takes typing_extensions where it is.
    assert set(ast.literal_eval(done.stdout)) - {"typing_extensions"} == {
        "jmp_deploy",
        "msgspec",
        "numpy",
    }
