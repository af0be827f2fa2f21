"""What each serving stack reads: its files as text, from an artifact.

Sources of the keys: Triton's model_config.proto (the tests parse what stands here with it);
DeepStream's gstnvinfer_property_parser.h (the list of keys in the tests); Isaac ROS's
tensor_rt_node.cpp and dnn_image_encoder.launch.py in the releases 4.1 to 4.5 (the same).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from .. import __version__
from ..core.artifact import Artifact
from ..core.images import INPUT
from ..core.outputs import PROBABILITIES, output_named

TRITON_IMAGES = {
    "10.3": "24.08-py3",
    "10.5": "24.10-py3",
    "10.7": "24.12-py3",
    "10.8": "25.01-py3",
}
"""TensorRT -> tag of NVIDIA's tritonserver image that has it. Source: docs/introduction/
release_notes.md of triton-inference-server/server in the branches of these releases; later ones
name no TensorRT. The images *-trtllm-python-py3 have others, and no backend for plans."""

PLUGIN = "plugin/libjmp_deploy_plugin.so"
"""Where a bundle's configurations expect the compiled plugin: of the machine that serves."""
ENGINE = "model.plan"
DELAY_US = 2000
"""How long Triton waits for a fuller batch, in microseconds: to be tuned against the latency that
is allowed."""


SAME_INPUT = 1e-6
"""Error of a normalised input up to which one scale for all channels is exact."""
LEAST_PROBABILITY = 0.1
"""Below which nvinfer's classifier gives a frame no class."""


Plans = dict[str, str]
"""Compute capability -> file of its engine, where a bundle has several, as {"8.6":
"model.sm_86.plan"}. Empty for one engine, ENGINE, or none yet."""


@dataclass(frozen=True)
class Target:
    """A serving stack.

    Attributes:
        title: its name.
        needs: what has to be there, in words, of an artifact.
        texts: file of the bundle -> its content; of an artifact, its name and its `plans`.
        commands: of the README: what each does, and the command.
        engine: folder of the bundle's engines; None where one is built on the device.
        inside: what a command starts with that builds the engine in the server's own container.
        plans: whether it takes an engine for each kind of GPU.
        takes_patches: whether it can have features of patches, [B, M, C], or several outputs.
    """

    title: str
    needs: Callable[[Artifact], str]
    texts: Callable[[Artifact, str, Plans], dict[str, str]]
    commands: Callable[[Artifact, str], list[tuple[str, str]]]
    engine: Callable[[str], str] | None = None
    inside: Callable[[Artifact], str] | None = None
    plans: bool = False
    takes_patches: bool = True


def template(name: str) -> str:
    """A file of templates/."""
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def plans_of(artifacts: Sequence[Artifact]) -> Plans:
    """The plans of artifacts that have an engine for one kind of GPU each."""
    found = {}
    for artifact in artifacts:
        assert artifact.engine is not None
        (arch,) = artifact.engine.targets
        number = arch.removeprefix("sm_")
        found[f"{number[:-1]}.{number[-1]}"] = f"model.{arch}.plan"
    return found


def engine_command(artifact: Artifact, engine: str, inside: str) -> str:
    """trtexec's command that builds a bundle's engine on the target.

    Args:
        inside: the container's start, or "" for this machine; there trtexec lies where the packages
            of TensorRT put it, and is not on PATH.
    """
    shapes = [
        f"--{name}Shapes={INPUT}:{batch}x{'x'.join(map(str, artifact.image_shape))}"
        for name, batch in zip(("min", "opt", "max"), artifact.batch, strict=True)
    ]
    # "--stronglyTyped" is the default from TensorRT 11 on, and still known there.
    program = f"{inside}/usr/src/tensorrt/bin/trtexec" if inside else "trtexec"
    words = [program, "--onnx=artifact/model.trt.onnx", "--stronglyTyped", *shapes]
    plugin = [f"--dynamicPlugins={PLUGIN}"] if artifact.jmp else []
    return " ".join([*words, *plugin, f"--saveEngine={engine}"])


def plugin_command(artifact: Artifact, packed: str | None, several: bool) -> list[tuple[str, str]]:
    """Of the README of a stack that loads the plugin from a fixed place.

    Args:
        packed: what the library is for that the bundle has, in words; None without one.
        several: the GPUs are of more than one kind.
    """
    if artifact.jmp is None:
        return []
    build = (
        f"nvcc -shared -std=c++17 -O3 -cudart=static -arch={'all-major' if several else 'native'} "
        "-Xcompiler=-fPIC,-fvisibility=hidden -Xlinker=--version-script=exports.map *.cu *.cpp "
        "-o ../libjmp_deploy_plugin.so"
    )
    gpus = "these kinds of GPU" if several else "the GPU that is here"
    tools = "a CUDA compiler and TensorRT's headers"
    say = f"the plugin for {gpus}, by {tools}"
    if packed:
        say = f"where {PLUGIN} ({packed}) does not fit: one for {gpus}, by {tools}"
    return [(say, f"(cd plugin/src && {build})")]


def labels(artifact: Artifact) -> list[str] | None:
    """One line per class, without what would end a line; None for features."""
    if not output_named(artifact.model.output).classifies or artifact.class_names is None:
        return None
    return [re.sub(r"[;\r\n]", ",", name) for name in artifact.class_names]


# --- Triton --------------------------------------------------------------------------------------


def triton_config(
    artifact: Artifact, name: str, shapes: Mapping[str, Sequence[int]], plans: Plans
) -> str:
    """config.pbtxt: batching, CUDA graphs, warm-up, labels.

    Args:
        name: of the model in the repository.
        shapes: of its outputs for one image, by name.
    """
    # With several, none is the default: on a GPU of another kind Triton then says which is missing.
    files = (
        f'default_model_filename: "{ENGINE}"'
        if not plans
        else "\n".join(
            f'cc_model_filenames {{ key: "{capability}" value: "{plan}" }}'
            for capability, plan in plans.items()
        )
    )
    least, best, most = artifact.batch
    shape = ", ".join(map(str, artifact.image_shape))
    label = '\n    label_filename: "labels.txt"' if labels(artifact) else ""
    outputs = ",\n".join(
        f"""  {{
    name: {json.dumps(output)}
    data_type: TYPE_FP32
    dims: [ {", ".join(map(str, size))} ]{label if output_named(output).classifies else ""}
  }}"""
        for output, size in shapes.items()
    )
    # Without a batch of one in the profile Triton must not be asked for it.
    preferred = sorted({size for size in (best, most) if size > least}) or [most]
    return f"""# Made by jmp_deploy {__version__} for {artifact.model.name}.
name: {json.dumps(name)}
platform: "tensorrt_plan"
max_batch_size: {most}
{files}
input [
  {{
    name: "{INPUT}"
    data_type: TYPE_FP32
    dims: [ {shape} ]
  }}
]
output [
{outputs}
]
instance_group [
  {{
    count: 1
    kind: KIND_GPU
    profile: [ "0" ]
  }}
]
dynamic_batching {{
  preferred_batch_size: [ {", ".join(map(str, preferred))} ]
  max_queue_delay_microseconds: {DELAY_US}
}}
optimization {{
  cuda {{
    graphs: true
  }}
}}
model_warmup [
  {{
    name: "zeros"
    batch_size: {best}
    inputs {{
      key: "{INPUT}"
      value {{
        data_type: TYPE_FP32
        dims: [ {shape} ]
        zero_data: true
      }}
    }}
  }}
]
"""


def triton_image(version: str) -> str | None:
    """The tag whose TensorRT is of this version ("10.3.0" asks for 10.3), or None."""
    return TRITON_IMAGES.get(".".join(version.split(".")[:2]))


def _triton(artifact: Artifact, name: str, plans: Plans) -> dict[str, str]:
    stored = artifact.reference().outputs
    shapes = {output: values.shape[1:] for output, values in stored.items()}
    return {
        f"models/{name}/config.pbtxt": triton_config(artifact, name, shapes, plans),
        **_label_file(artifact, f"models/{name}/labels.txt"),
        "client.py": template("client.py.txt"),
    }


def _triton_tag(artifact: Artifact) -> str | None:
    return triton_image(artifact.engine.version) if artifact.engine else None


def _triton_container(artifact: Artifact) -> str:
    return (
        'docker run --rm --gpus all --network host -v "$PWD":/bundle -w /bundle '
        f"$REGISTRY/nvidia/tritonserver:{_triton_tag(artifact) or '$TAG'} "
    )


def _triton_commands(artifact: Artifact, name: str) -> list[tuple[str, str]]:
    plugins = f" --backend-config=tensorrt,plugins=/bundle/{PLUGIN}" if artifact.jmp else ""
    if artifact.engine and artifact.engine.embeds_plugin:
        plugins = " --backend-config=tensorrt,version-compatible=true"  # allows host code
    serve = f"tritonserver --model-repository=/bundle/models{plugins}"
    return [
        ("the server", _triton_container(artifact) + serve),
        (
            "a photo, elsewhere",
            f'pip install "tritonclient[http]" wheel/*.whl && python client.py {name} photo.png',
        ),
    ]


def _triton_needs(artifact: Artifact) -> str:
    needs = (
        "Docker with NVIDIA's container toolkit; `export REGISTRY=...`: NVIDIA's registry of "
        "containers (NGC)"
    )
    if _triton_tag(artifact) is None:
        engine = artifact.engine
        version = engine.version if engine else "10 or 11, in which the engine is built"
        needs += (
            f"; `export TAG=YY.MM-py3`: an image with TensorRT {version} (which has which: "
            "NVIDIA's Deep Learning Frameworks Support Matrix, and "
            "`ls /usr/lib/*/libnvinfer.so.*` in a container)"
        )
    return f"{needs}. Not an image *-trtllm-python-py3: it opens no plans."


# --- DeepStream ----------------------------------------------------------------------------------


def deepstream_scale(artifact: Artifact) -> tuple[float, tuple[float, ...], float]:
    """nvinfer's one scale and its offsets for x -> (x / 255 - mean) / std, and how far that is off:
    the largest error of an input, in units of the normalised one; 0 where all std are one."""
    given = artifact.preprocess
    std = sum(given.std) / 3
    errors = [
        max(mean, 1 - mean) * abs(1 / std - 1 / own)
        for mean, own in zip(given.mean, given.std, strict=True)
    ]
    return 1 / (255 * std), tuple(255 * mean for mean in given.mean), max(errors)


def deepstream_classifies(artifact: Artifact) -> bool:
    """Whether nvinfer's own classifier is right: it takes all that comes out for probabilities,
    wants labels, and its one scale has to be the model's."""
    exact = deepstream_scale(artifact)[2] <= SAME_INPUT
    return exact and artifact.model.outputs == (PROBABILITIES.name,) and bool(labels(artifact))


def _deepstream_output(artifact: Artifact) -> dict[str, str]:
    """Its classifier, or the tensor for the application."""
    if deepstream_classifies(artifact):
        return {"network-type": "1", "classifier-threshold": f"{LEAST_PROBABILITY}"}
    return {"network-type": "100", "output-tensor-meta": "1"}


def deepstream_config(artifact: Artifact) -> str:
    """nvinfer's configuration of a model on whole frames."""
    scale, offsets, error = deepstream_scale(artifact)
    names = labels(artifact)
    values: dict[str, str] = {
        "gpu-id": "0",
        "gie-unique-id": "1",
        "process-mode": "1",
        "onnx-file": "artifact/model.trt.onnx",
        "model-engine-file": ENGINE,
        "batch-size": str(artifact.batch[1]),
        # the types are in the ONNX: this only names them, and it has no name for BF16 and FP8
        "network-mode": {"int8": "1", "fp16": "2"}.get(artifact.precision, "0"),
        "infer-dims": ";".join(map(str, artifact.image_shape)),
        "model-color-format": "0",
        "net-scale-factor": f"{scale:.10g}",
        "offsets": ";".join(f"{value:.10g}" for value in offsets),
        "maintain-aspect-ratio": "0",
        "scaling-filter": "1",
        "output-blob-names": ";".join(artifact.model.outputs),
        **_deepstream_output(artifact),
        **({"labelfile-path": "labels.txt"} if names else {}),
        **({"custom-lib-path": PLUGIN} if artifact.jmp else {}),
    }
    lines = [f"# Made by jmp_deploy {__version__} for {artifact.model.name}."]
    if error > SAME_INPUT:
        lines += [
            "# nvinfer knows one scale for all channels, this model has three: with their mean an",
            f"# input is off by up to {error:.2g} (they reach from -2.1 to 2.6). Exact:",
            "# build --fold-normalization.",
        ]
    lines += ["[property]", *(f"{key}={value}" for key, value in values.items())]
    return "\n".join([*lines, ""])


def _deepstream(artifact: Artifact, name: str, plans: Plans) -> dict[str, str]:
    del name, plans
    return {
        "config_infer.txt": deepstream_config(artifact),
        **_label_file(artifact, "labels.txt", ";"),
    }


def _deepstream_commands(artifact: Artifact, name: str) -> list[tuple[str, str]]:
    del name
    run = (
        "gst-launch-1.0 filesrc location=video.mp4 ! qtdemux ! h264parse ! nvv4l2decoder ! "
        "m.sink_0 nvstreammux name=m batch-size=1 width=1280 height=720 ! "
        "nvinfer config-file-path=config_infer.txt ! fakesink"
    )
    if deepstream_classifies(artifact):
        meta = "each frame's class is NvDsClassifierMeta"
    else:
        meta = f"{', '.join(artifact.model.outputs)} are NvDsInferTensorMeta of each frame"
    return [(f"a video; {meta}", run)]


# --- Isaac ROS -----------------------------------------------------------------------------------


def isaac_parameters(artifact: Artifact) -> dict[str, object]:
    """Of the launch file: the encoder's and the engine's."""
    given = artifact.preprocess
    return {
        "encoder": {
            "network_image_width": given.width,
            "network_image_height": given.height,
            "image_mean": list(given.mean),
            "image_stddev": list(given.std),
        },
        "input_binding_names": [INPUT],
        "output_binding_names": list(artifact.model.outputs),
        "engine_file": ENGINE,
        "plugin": PLUGIN if artifact.jmp else "",
        "max_batch_size": artifact.batch[2],
    }


def _isaac(artifact: Artifact, name: str, plans: Plans) -> dict[str, str]:
    del name, plans
    return {
        "jmp.launch.py": template("isaac.launch.py.txt"),
        "parameters.json": json.dumps(isaac_parameters(artifact), indent=2) + "\n",
        **_label_file(artifact, "labels.txt"),
    }


def _isaac_commands(artifact: Artifact, name: str) -> list[tuple[str, str]]:
    del artifact, name
    camera = "input_image_width:=1280 input_image_height:=720"
    say = "the nodes, for a camera of that size: images in on /image, a TensorList out"
    return [(say, f"ros2 launch ./jmp.launch.py {camera}")]


# --- C++ and Jetson ------------------------------------------------------------------------------


def _cpp(artifact: Artifact, name: str, plans: Plans) -> dict[str, str]:
    del name, plans
    given = artifact.preprocess
    numbers = [given.height, given.width, given.resize, int(given.crop_mode == "squash")]
    lines = [
        " ".join(map(str, numbers)),
        given.interpolation,
        " ".join(f"{value:.9g}" for value in (*given.mean, *given.std)),
    ]
    return {
        "runner.cpp": template("runner.cpp"),
        "CMakeLists.txt": template("CMakeLists.txt"),
        "preprocess.txt": "\n".join([*lines, ""]),
        **_label_file(artifact, "labels.txt"),
    }


def _cpp_commands(artifact: Artifact, name: str) -> list[tuple[str, str]]:
    del name
    plugin = PLUGIN if artifact.jmp else "-"
    return [
        ("the runner", "cmake -S . -B build && cmake --build build"),
        (
            "a photo (of your own: `convert photo.jpg photo.ppm`)",
            f"build/runner {ENGINE} {plugin} photo.ppm",
        ),
    ]


def _jetson(artifact: Artifact, name: str, plans: Plans) -> dict[str, str]:
    del artifact, name, plans
    return {"install.sh": template("install.sh")}


def _jetson_commands(artifact: Artifact, name: str) -> list[tuple[str, str]]:
    del name
    random = " --allow-random" if artifact.is_random else ""
    return [
        (
            "an environment, the plugin, the engine, its check, its speed",
            f"bash install.sh{random}",
        ),
        ("a photo", f"./jmp run artifact photo.png{random}"),
        ("the fastest clocks, until the next start", "sudo nvpmodel -m 0 && sudo jetson_clocks"),
        ("latency, throughput and power", "./jmp bench artifact -b 1"),
    ]


def _label_file(artifact: Artifact, path: str, end: str = "\n") -> dict[str, str]:
    names = labels(artifact)
    return {path: end.join(names) + "\n"} if names else {}


TARGETS = {
    "jetson": Target(
        "Jetson",
        lambda _: "JetPack 6.1 to 7.2, `python3-libnvinfer`, `python3-venv`, and pip's network.",
        _jetson,
        _jetson_commands,
    ),
    "triton": Target(
        "Triton",
        _triton_needs,
        _triton,
        _triton_commands,
        engine=lambda name: f"models/{name}/1",
        inside=_triton_container,
        plans=True,
    ),
    "deepstream": Target(
        "DeepStream",
        lambda _: "a DeepStream with TensorRT 10 or newer.",
        _deepstream,
        _deepstream_commands,
        engine=lambda _: ".",
    ),
    "isaac-ros": Target(
        "Isaac ROS",
        lambda _: (
            "Isaac ROS 4.1 or newer, its packages isaac_ros_tensor_rt and "
            "isaac_ros_dnn_image_encoder. (3.2 and 4.0 have no custom_plugin_lib.)"
        ),
        _isaac,
        _isaac_commands,
        engine=lambda _: ".",
    ),
    "cpp": Target(
        "C++",
        lambda _: "TensorRT 10 or 11 with its headers, CUDA, CMake 3.22, a C++ compiler.",
        _cpp,
        _cpp_commands,
        engine=lambda _: ".",
        takes_patches=False,
    ),
}
