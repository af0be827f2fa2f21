"""Bundles: made, carried elsewhere, checked; and what the serving stacks read in them.

Triton's own proto judges its configuration where `tritonclient` is installed. Nothing here starts a
server, a device or an engine.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from jmp_deploy.cli import package as cli
from jmp_deploy.cli.main import main
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import ArtifactError, CheckError, EngineError, ToolchainError
from jmp_deploy.package import bundle, targets
from jmp_deploy.package.bundle import BundleOptions, make_bundle, verify_bundle
from jmp_deploy.plugin import toolchain
from tests.fakes.artifacts import ENGINE, JMP, RANDOM_WEIGHTS, make_artifact

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def artifact_at(folder: Path, **changes) -> Artifact:
    """A JMP classifier of three classes, whose files are there; its engine is no engine."""
    import numpy as np

    folder.mkdir(parents=True)
    for name in ("model.onnx", "model.trt.onnx", "model.engine"):
        (folder / name).write_bytes(name.encode())
    images = np.zeros((2, 3, 8, 8), np.float32)
    output = np.zeros((2, 3), np.float32)
    names = np.array(["a", "b"])
    np.savez_compressed(folder / "reference.npz", images=images, output=output, names=names)
    given = {"jmp": JMP, "class_names": ("tench", "a; b", "c"), "engine": TENSORRT, **changes}
    return make_artifact(folder, **given).write()


TENSORRT = dataclasses.replace(ENGINE, flavour="tensorrt", version="10.3.0")


def test_the_command_line_knows_the_targets() -> None:
    assert tuple(targets.TARGETS) == cli.NAMES


@pytest.mark.parametrize("target", targets.TARGETS)
def test_a_bundle_is_whole_elsewhere_and_tells_nothing_of_here(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder with spaces, by the command line; checked by it, and by sha256sum alone."""
    made_in = tmp_path / "made here"
    weights = dataclasses.replace(
        make_artifact(tmp_path).weights, path=str(made_in / "secret" / "w.safetensors")
    )
    rebuild = (
        f"cd '{made_in}' && python -m jmp_deploy build deit_s "
        f"--weights '{made_in}/secret/w.safetensors'"
    )
    folder = made_in / "my model"
    artifact_at(folder, weights=weights, rebuild=f"{rebuild} -o='{folder}'")
    out = tmp_path / "out of here" / "bundle"
    assert main(["package", str(folder), "--for", target, "-o", str(out)]) == 0
    shutil.rmtree(made_in)
    moved = tmp_path / "elsewhere.tar"
    out.with_name("bundle.tar").rename(moved)
    shutil.rmtree(out)
    assert main(["package", str(moved), "--verify", "-o", str(out)]) == 0
    check = ["sha256sum", "--quiet", "-c", "SHA256SUMS"]
    subprocess.run(check, cwd=out, check=True)
    assert main(["package", str(out), "--verify"]) == 0
    for path in (p for p in out.rglob("*") if p.is_file()):
        assert (
            b"secret" not in path.read_bytes() and tmp_path.name.encode() not in path.read_bytes()
        )
    found = Artifact.read(out / "artifact")
    found.verify()
    assert found.engine is None and found.weights.path == "w.safetensors"
    assert (
        found.rebuild == "python -m jmp_deploy build deit_s --weights w.safetensors '-o=my model'"
    )
    plans = [path.read_bytes() for path in out.rglob("model.plan")]
    assert plans == ([] if target == "jetson" else [b"model.engine"])
    readme = (out / "README.md").read_text()
    assert readme.count("```\n   ") <= 10 and "sha256sum" in readme
    capsys.readouterr()


def test_the_wheel_of_a_bundle_installs_and_runs(tmp_path: Path) -> None:
    out = tmp_path / "b"
    make_bundle(artifact_at(tmp_path / "a"), BundleOptions("jetson", out))
    (wheel,) = (out / "wheel").glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    code = (
        "import jmp_deploy; from jmp_deploy.plugin.library import sources_dir; "
        "from jmp_deploy.core.artifact import Artifact; import sys; "
        "print(jmp_deploy.__file__, sources_dir()); Artifact.read(sys.argv[1]).verify()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out / "artifact")],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(site / "jmp_deploy" / "__init__.py"),
        str(site / "jmp_deploy" / "_plugin_src"),
    ]
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "__pycache__" in name]


REFUSED = {
    "no engine": ({"engine": None}, {}, EngineError, "no engine: none was asked for"),
    "rtx": ({"engine": ENGINE}, {}, EngineError, "TensorRT-RTX, Triton runs those of TensorRT"),
    "version": ({}, {"tensorrt": "10.13"}, EngineError, "TensorRT 10.3.0, the target has 10.13"),
    "random": ({"weights": RANDOM_WEIGHTS}, {}, ArtifactError, "random weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_run_there_is_refused(case: str, tmp_path: Path) -> None:
    changes, options, kind, words = REFUSED[case]
    artifact = artifact_at(tmp_path / "a", **changes)
    out = tmp_path / "out" / "b"
    with pytest.raises(kind, match=words) as caught:
        make_bundle(artifact, BundleOptions("triton", out, **options))
    way_out = {"allow_random": True} if case == "random" else {"with_engine": False}
    assert "--" + "-".join(["no", "engine"] if case != "random" else ["allow", "random"]) in (
        caught.value.hint or ""
    )
    assert not out.parent.exists()
    made = make_bundle(
        artifact, BundleOptions("triton", out, with_wheel=False, **options | way_out)
    )
    readme = (made.folder / "README.md").read_text()
    assert ("trtexec" in readme) == (case != "random")
    assert ("Random weights" in readme) == (case == "random")


def test_nothing_is_overwritten_and_nothing_half_made(tmp_path: Path) -> None:
    artifact = artifact_at(tmp_path / "a")
    for name in ("b", "b.tar"):
        (tmp_path / name).mkdir()
        with pytest.raises(ArtifactError, match="exists already"):
            make_bundle(artifact, BundleOptions("cpp", tmp_path / "b"))
        (tmp_path / name).rmdir()
    (tmp_path / "a" / "model.onnx").write_text("altered")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        make_bundle(artifact, BundleOptions("cpp", tmp_path / "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def whole(tmp_path: Path) -> bundle.Bundle:
    options = BundleOptions("cpp", tmp_path / "b", with_wheel=False)
    return make_bundle(artifact_at(tmp_path / "a"), options)


def test_an_altered_or_missing_file_fails_the_check(whole: bundle.Bundle) -> None:
    file = whole.folder / "runner.cpp"
    text = file.read_text()
    file.write_text(text + " ")
    with pytest.raises(CheckError, match=r"1 files altered, first runner\.cpp"):
        verify_bundle(whole.folder)
    assert main(["package", str(whole.folder), "--verify"]) == 1
    file.unlink()
    file.symlink_to("/etc/hostname")
    with pytest.raises(CheckError, match=r"1 files missing, first runner\.cpp"):
        verify_bundle(whole.folder)
    file.unlink()
    file.write_text(text)
    (whole.folder / ".venv").mkdir()  # what install.sh leaves there is no fault
    assert verify_bundle(whole.folder).files == whole.files


def repacked(source: Path, target: Path, change) -> Path:
    """A bundle's archive with its members changed; `change` returns (member, content) or None."""
    with tarfile.open(source) as before, tarfile.open(target, "w") as after:
        for member in before:
            content = before.extractfile(member).read()
            for changed, data in change(member, content):
                changed.size = len(data)
                after.addfile(changed, io.BytesIO(data))
    return target


def extra(name: str, **fields):
    def change(member, content):
        yield member, content
        if member.name.endswith("README.md"):
            added = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(added, field, value)
            yield added, b""

    return change


HOSTILE = {
    "foreign": (extra("b/x"), CheckError),
    "above": (extra("b/../../x"), ArtifactError),
    "absolute": (extra("/tmp/x"), ArtifactError),
    "another root": (extra("c/x"), ArtifactError),
    "link": (extra("b/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ArtifactError),
    "device": (extra("b/x", type=tarfile.CHRTYPE), ArtifactError),
    "twice": (extra("b/runner.cpp"), ArtifactError),
    "control character": (extra("b/\x1b[2J"), ArtifactError),
    "altered": (lambda m, c: [(m, c + b" " if m.name == "b/runner.cpp" else c)], CheckError),
    "no sums": (lambda m, c: [] if m.name == "b/SHA256SUMS" else [(m, c)], ArtifactError),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_of_a_hostile_archive_is_unpacked(
    case: str, whole: bundle.Bundle, tmp_path: Path
) -> None:
    change, kind = HOSTILE[case]
    archive = repacked(whole.tar, tmp_path / "c.tar", change)
    with pytest.raises(kind) as caught:
        verify_bundle(archive, tmp_path / "unpacked")
    assert caught.value.message.isprintable()
    assert not (tmp_path / "unpacked").exists() and not list(tmp_path.glob(".bundle-*"))


def test_what_is_no_bundle_is_one_message(tmp_path: Path, whole: bundle.Bundle) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.tar.read_bytes()[:3000])
    noise = tmp_path / "noise.tar"
    noise.write_bytes(os.urandom(4096))
    for path in (cut, noise, tmp_path / "none.tar", tmp_path):
        assert main(["package", str(path), "--verify"]) in (1, 2)
    assert main(["package", str(tmp_path / "a")]) == 2  # neither --for nor --verify


# --- What the stacks read ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton_config():
    """Triton's ModelConfig by its own proto, of text; scripts/test.sh installs it."""
    from google.protobuf import text_format

    spec = find_spec("tritonclient")
    if spec is None:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient")
    # By its path: the package around it asks for grpcio, which the proto does not need.
    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = spec_from_file_location("model_config_pb2", path)
    proto = module_from_spec(spec)
    spec.loader.exec_module(proto)
    return lambda text: text_format.Parse(text, proto.ModelConfig())


def test_triton_parses_its_configuration(triton_config, tmp_path: Path) -> None:
    for changes in ({}, {"batch": (1, 1, 1)}, {"output": "features", "class_names": None}):
        artifact = artifact_at(tmp_path / str(len(changes)) / "a", **changes)
        files = targets.TARGETS["triton"].texts(artifact, "deit", {})
        config = triton_config(files["models/deit/config.pbtxt"])
        assert config.name == "deit" and config.platform == "tensorrt_plan"
        assert config.default_model_filename == "model.plan" and not config.cc_model_filenames
        assert config.max_batch_size == artifact.batch[2]
        assert list(config.input[0].dims) == [3, 8, 8] and list(config.output[0].dims) == [3]
        assert max(config.dynamic_batching.preferred_batch_size) <= config.max_batch_size
        assert config.optimization.cuda.graphs and config.model_warmup[0].batch_size <= 8
        assert bool(config.output[0].label_filename) == ("models/deit/labels.txt" in files)
        shutil.rmtree(tmp_path / str(len(changes)))


def test_features_of_patches_go_along(triton_config, tmp_path: Path, capsys) -> None:
    """Beside an answer per image; not to the program that prints the best five of one."""
    import numpy as np

    made = artifact_at(tmp_path / "a")
    model = dataclasses.replace(made.model, also=("dense_1", "raw_4"))
    with np.load(made.path("reference.npz")) as stored:
        patches = {name: np.zeros((2, 4, 5), np.float32) for name in model.also}
        np.savez_compressed(made.path("reference.npz"), **{**stored, **patches})
    made = dataclasses.replace(made, model=model).write()
    files = targets.TARGETS["triton"].texts(made, "deit", {})
    outputs = triton_config(files["models/deit/config.pbtxt"]).output
    shapes = {output.name: list(output.dims) for output in outputs}
    assert shapes == {"logits": [3], "dense_1": [4, 5], "raw_4": [4, 5]}
    assert [bool(output.label_filename) for output in outputs] == [True, False, False]
    rows = dict(
        row.split("=", 1) for row in targets.deepstream_config(made).splitlines() if "=" in row
    )
    assert rows["output-blob-names"] == "logits;dense_1;raw_4" and rows["network-type"] == "100"
    assert targets.isaac_parameters(made)["output_binding_names"] == [*shapes]
    out = tmp_path / "b"
    assert main(["package", str(made.folder), "--for", "jetson", "--no-wheel", "-o", str(out)]) == 0
    assert "`logits`, `dense_1`, `raw_4`" in (out / "README.md").read_text()
    other = tmp_path / "c"
    assert main(["package", str(made.folder), "--for", "cpp", "-o", str(other)]) == 2
    assert "one answer per image" in capsys.readouterr().err and not other.exists()


def engine_for(arch: str, **changes):
    return dataclasses.replace(TENSORRT, targets=(arch,), **changes)


def test_triton_takes_each_gpus_own_engine(triton_config, tmp_path: Path) -> None:
    folders = {}
    for arch in ("sm_86", "sm_120"):
        folders[arch] = artifact_at(tmp_path / arch, engine=engine_for(arch)).folder
        (folders[arch] / "model.engine").write_text(arch)
        Artifact.read(folders[arch]).write()
    out = tmp_path / "b"
    more = ["--also", str(folders["sm_120"]), "--no-wheel", "-o", str(out)]
    assert main(["package", str(folders["sm_86"]), "--for", "triton", *more]) == 0
    (repository,) = (out / "models").iterdir()
    config = triton_config((repository / "config.pbtxt").read_text())
    # https://github.com/triton-inference-server/server, model_configuration.md: by capability
    plans = {key: (repository / "1" / plan) for key, plan in config.cc_model_filenames.items()}
    assert {key: plan.read_text() for key, plan in plans.items()} == {
        "8.6": "sm_86",
        "12.0": "sm_120",
    }
    assert not config.default_model_filename and not (repository / "1" / "model.plan").exists()
    assert "-arch=all-major" in (out / "README.md").read_text()
    verify_bundle(out)


NOT_ALSO = {
    "the same kind": ({"engine": engine_for("sm_86")}, {}, "for sm_86, as .* has"),
    "another TensorRT": ({"engine": engine_for("sm_90", version="10.3.1")}, {}, "differ in Tensor"),
    "another batch": ({"engine": engine_for("sm_90"), "batch": (1, 2, 2)}, {}, "differ in"),
    "no engine": ({"engine": None}, {}, "no engine"),
    "another target": ({"engine": engine_for("sm_90")}, {"target": "cpp"}, "which triton takes"),
    "none at all": ({"engine": engine_for("sm_90")}, {"with_engine": False}, "beside the first"),
}


@pytest.mark.parametrize("case", [*NOT_ALSO, "another model"])
def test_engines_that_one_server_cannot_have_are_refused(case: str, tmp_path: Path) -> None:
    default = ({"engine": engine_for("sm_90")}, {}, "is not the model of")
    changes, options, words = NOT_ALSO.get(case, default)
    first = artifact_at(tmp_path / "a", engine=engine_for("sm_86"))
    other = artifact_at(tmp_path / "c", **changes)
    if case == "another model":
        (other.folder / "model.trt.onnx").write_text("another")
        other.write()
    given = {"target": "triton", "out": tmp_path / "out" / "b", **options}
    with pytest.raises((ArtifactError, EngineError), match=words):
        make_bundle(first, BundleOptions(also=(other.folder,), **given))
    assert not (tmp_path / "out").exists()


def test_triton_images_are_looked_up_by_the_engines_tensorrt(tmp_path: Path) -> None:
    assert targets.triton_image("10.3.0") == "24.08-py3"
    assert targets.triton_image("10.7.0.23") == "24.12-py3"
    assert targets.triton_image("10.30.0") is None and targets.triton_image("11.1.0") is None
    # Triton's images for TensorRT-LLM have no backend for plans
    assert all(re.fullmatch(r"\d\d\.\d\d-py3", tag) for tag in targets.TRITON_IMAGES.values())
    for version, tag in (("10.3.0", ":24.08-py3 "), ("10.13.3", ":$TAG ")):
        engine = dataclasses.replace(TENSORRT, version=version)
        artifact = make_artifact(tmp_path, engine=engine)
        ((_, server), _) = targets.TARGETS["triton"].commands(artifact, "m")
        assert tag in server
        needs = targets.TARGETS["triton"].needs(artifact)
        assert ("export TAG" in needs and version in needs) == ("$TAG" in tag)


NVINFER_KEYS = {
    *("gie-unique-id", "process-mode", "labelfile-path", "gpu-id", "output-tensor-meta"),
    *("batch-size", "network-mode", "model-engine-file", "output-blob-names", "network-type"),
    *("infer-dims", "model-color-format", "net-scale-factor", "offsets", "maintain-aspect-ratio"),
    *("scaling-filter", "custom-lib-path", "onnx-file", "classifier-threshold", "interval"),
}
"""Of gstnvinfer_property_parser.h: those that a classifier or a feature extractor may use."""


def test_deepstream_gets_keys_that_its_parser_knows(tmp_path: Path) -> None:
    base = make_artifact(tmp_path).preprocess
    artifact = make_artifact(tmp_path, jmp=JMP, preprocess=dataclasses.replace(base, **IMAGENET))
    text = targets.deepstream_config(artifact)
    rows = dict(re.findall(r"^([a-z-]+)=(.*)$", text, re.MULTILINE))
    assert rows.keys() <= NVINFER_KEYS and "--fold-normalization" in text
    # nvinfer computes y = scale * (x - offset): what that is off by, on every 8-bit value
    scale, offsets, error = targets.deepstream_scale(artifact)
    worst = 0.0
    for mean, std, offset in zip(*IMAGENET.values(), offsets, strict=True):
        differences = [scale * (x - offset) - (x / 255 - mean) / std for x in range(256)]
        worst = max(worst, *map(abs, differences))
    assert worst == pytest.approx(error) and 0.01 < error < 0.2
    folded = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    raw = dataclasses.replace(artifact, preprocess=dataclasses.replace(base, **folded))
    text = targets.deepstream_config(raw)
    assert "net-scale-factor=1\n" in text and "offsets=0;0;0" in text and "fold" not in text


def test_deepstream_classifies_what_comes_as_probabilities_of_a_true_input(tmp_path: Path) -> None:
    """Else the application gets the tensor: nvinfer would take logits for probabilities."""
    base = make_artifact(tmp_path)
    three = dataclasses.replace(base.preprocess, **IMAGENET)
    raw = dataclasses.replace(base.preprocess, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    names = ("tench", "a; b", "c")
    for output in ("logits", "probabilities", "features"):
        model = dataclasses.replace(base.model, output=output)
        for given, labelled in itertools.product((raw, three), (names, None)):
            made = dataclasses.replace(base, model=model, preprocess=given, class_names=labelled)
            text = targets.deepstream_config(made)
            rows = dict(re.findall(r"^([a-z-]+)=(.*)$", text, re.MULTILINE))
            classifies = (output, given, labelled) == ("probabilities", raw, names)
            assert rows["network-type"] == ("1" if classifies else "100")
            assert ("output-tensor-meta" in rows) is not classifies
            assert rows["output-blob-names"] == output and rows.keys() <= NVINFER_KEYS
            ((say, _),) = targets.TARGETS["deepstream"].commands(made, "m")
            assert ("NvDsClassifierMeta" in say) is classifies
    bf16 = dataclasses.replace(base, precision="bf16")
    assert "network-mode=0\n" in targets.deepstream_config(bf16)


ENCODER_ARGUMENTS = {
    *("input_image_width", "input_image_height", "network_image_width", "network_image_height"),
    *("image_mean", "image_stddev", "final_tensor_name", "tensor_name", "image_input_topic"),
    *("camera_info_input_topic", "tensor_output_topic", "dnn_image_encoder_namespace"),
    *("attach_to_shared_component_container", "component_container_name"),
}
"""That dnn_image_encoder.launch.py of Isaac ROS 4.1 to 4.5 reads, in one of them or in all."""
TENSOR_RT_PARAMETERS = {
    *("model_file_path", "engine_file_path", "custom_plugin_lib", "input_tensor_names"),
    *("input_binding_names", "input_tensor_formats", "output_tensor_names", "verbose"),
    *("output_binding_names", "output_tensor_formats", "force_engine_update", "max_batch_size"),
}
"""Of those that tensor_rt_node.cpp declares, in each of these releases."""


def launched(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """What a launch file makes, by class: stand-ins for ROS's keep what they are given."""
    made: dict[str, dict] = {}

    def recorder(name: str):
        def make(*args, **given):
            made[name] = given | {"args": args}
            return made[name]

        return make

    for module, names in {
        "ament_index_python.packages": ["get_package_share_directory"],
        "launch": ["LaunchDescription"],
        "launch.actions": ["DeclareLaunchArgument", "IncludeLaunchDescription"],
        "launch.launch_description_sources": ["PythonLaunchDescriptionSource"],
        "launch.substitutions": ["LaunchConfiguration"],
        "launch_ros.actions": ["ComposableNodeContainer"],
        "launch_ros.descriptions": ["ComposableNode"],
    }.items():
        fake = ModuleType(module)
        for name in names:
            setattr(fake, name, recorder(name))
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setitem(sys.modules, module.partition(".")[0], fake)
    sys.modules["launch"].LaunchDescription = recorder("LaunchDescription")
    sys.modules["ament_index_python.packages"].get_package_share_directory = lambda _: "/share"
    space = {"__file__": str(path)}
    exec(compile(path.read_text(), path.name, "exec"), space)
    space["generate_launch_description"]()
    return made


def test_isaac_ros_gets_what_its_nodes_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_artifact(tmp_path).preprocess
    preprocess = dataclasses.replace(base, **IMAGENET)
    artifact = artifact_at(tmp_path / "a", preprocess=preprocess)
    folder = tmp_path / "b"
    folder.mkdir()
    for name, text in targets.TARGETS["isaac-ros"].texts(artifact, "m", {}).items():
        (folder / name).write_text(text)
    made = launched(folder / "jmp.launch.py", monkeypatch)
    encoder = dict(made["IncludeLaunchDescription"]["launch_arguments"])
    assert encoder.keys() == ENCODER_ARGUMENTS  # the node throws where the camera's size is none
    assert encoder["image_mean"] == "[0.485, 0.456, 0.406]"
    assert encoder["network_image_width"] == "8"
    (engine,) = made["ComposableNode"]["parameters"]
    assert engine.keys() == TENSOR_RT_PARAMETERS
    assert engine["force_engine_update"] is False  # its default is to build anew
    assert engine["engine_file_path"] == str(folder / "model.plan")
    assert engine["custom_plugin_lib"] == str(folder / "plugin" / "libjmp_deploy_plugin.so")
    assert engine["input_tensor_names"] == [encoder["tensor_name"]]
    assert engine["output_binding_names"] == ["logits"] and engine["max_batch_size"] == 8
    name = made["ComposableNodeContainer"]["name"]
    assert encoder["component_container_name"] == f"/{name}"


def test_the_clients_and_scripts_are_well_formed() -> None:
    compile(targets.template("client.py.txt"), "client.py", "exec")
    subprocess.run(["bash", "-n"], input=targets.template("install.sh"), text=True, check=True)


def header_sets() -> list[Path]:
    more = os.environ.get("JMP_TENSORRT_HEADERS")
    return sorted(Path(more).glob("*/include")) if more else []


@pytest.mark.parametrize("headers", [None, *header_sets()], ids=lambda p: p and p.parent.name)
def test_the_cpp_runner_compiles_without_a_warning(headers: Path | None, tmp_path: Path) -> None:
    """Against TensorRT's headers at hand (10.14), and those of JMP_TENSORRT_HEADERS/*/include."""
    try:
        tools = toolchain.find_toolchain()
    except ToolchainError as error:
        pytest.skip(error.message)
    source = tmp_path / "runner.cpp"
    source.write_text(targets.template("runner.cpp"))
    command = [*toolchain.nvcc_command(tools.nvcc), "-std=c++17", "-c", str(source)]
    warnings = "-Xcompiler=-Wall,-Wextra,-Werror"
    include = ["-isystem", str(headers or tools.headers)]
    done = subprocess.run(
        [*command, warnings, *include, "-o", str(tmp_path / "runner.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


FAKE_PYTHON = """#!/bin/bash
# Stands for JetPack's python3 and for the environment's: notes what it is asked for.
printf '%s\\n' "$(basename "$(dirname "$0")") $* [${JMP_DEPLOY_PLUGIN##*/plugin/}]" >>"$LOG"
case "$*" in
  *"import tensorrt"*) exit "$TENSORRT_MISSING" ;;
  "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


def install(bundle_folder: Path, fakes: Path, missing: int = 0) -> tuple[int, str, list[str]]:
    """install.sh with a Python that only notes: (exit code, standard error, notes)."""
    fakes.mkdir(exist_ok=True)
    for name, text in (("python3", FAKE_PYTHON), ("uname", "#!/bin/bash\necho aarch64\n")):
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    log = fakes / "log"
    log.write_text("")
    done = subprocess.run(
        ["bash", str(bundle_folder / "install.sh"), "--topk", "1"],
        env=os.environ
        | {
            "PATH": f"{fakes}:{os.environ['PATH']}",
            "LOG": str(log),
            "TENSORRT_MISSING": str(missing),
        },
        cwd=fakes,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, log.read_text().splitlines()


@pytest.mark.parametrize("compiled", [False, True])
def test_install_sh_goes_its_five_steps(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with a space; what it leaves is found by `./jmp` from anywhere."""
    libraries = {12: None, 13: None}
    for major in libraries if compiled else ():
        libraries[major] = tmp_path / f"cache{major}" / "libjmp_deploy_plugin.so"
        libraries[major].parent.mkdir()
        libraries[major].write_bytes(b"library")
        sidecar = {"architectures": ["87"], "machine": "aarch64", "cuda": f"{major}.0.1"}
        libraries[major].with_suffix(".json").write_text(json.dumps(sidecar))
    monkeypatch.setattr(bundle, "prebuilt_for", lambda machine, cuda: libraries[cuda])
    made = make_bundle(artifact_at(tmp_path / "a"), BundleOptions("jetson", tmp_path / "my b"))
    code, said, notes = install(made.folder, tmp_path / "fakes", missing=1)
    assert code == 2 and "no TensorRT 10" in said and "python3-libnvinfer" in said
    assert not (made.folder / ".venv").exists() and len(notes) == 2
    code, said, notes = install(made.folder, tmp_path / "fakes")
    assert (code, said) == (0, "")
    own = [note.removeprefix("bin -m ") for note in notes if note.startswith("bin -m ")]
    library = "cuda13/libjmp_deploy_plugin.so" if compiled else ""
    wheel = next((made.folder / "wheel").glob("*.whl")).name
    assert own == [
        f"pip install --quiet --disable-pip-version-check wheel/{wheel}[runtime] []",
        *([] if compiled else ["jmp_deploy plugin build []"]),
        f"jmp_deploy run artifact photo.png --rebuild --topk 1 [{library}]",
        f"jmp_deploy compare artifact --backends torch,engine [{library}]",
        f"jmp_deploy bench artifact -b 1 [{library}]",
    ]
    assert verify_bundle(made.folder).files == made.files
    code, said, notes = install(made.folder, tmp_path / "fakes")
    assert code == 0 and not [note for note in notes if "-m venv" in note]
