"""Whose class is it: folders, synsets, names, tables of labels; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from timm.data import ImageNetInfo

from jmp_deploy.core.errors import ImageError
from jmp_deploy.validate import data as validate_data
from jmp_deploy.validate.data import ClassOrder, for_classifier, for_features

INFO = ImageNetInfo("imagenet-1k")
SYNSETS = INFO.label_names()
IMAGENET = ClassOrder(1000, [INFO.index_to_description(i) for i in range(1000)], SYNSETS)


def folders(root, names, count=1):
    for name in names:
        (root / name).mkdir(parents=True)
        for place in range(count):
            (root / name / f"{place}.jpg").touch()
    return root


def labels(data):
    return {sample.path.split("/")[0]: sample.label for sample in data.samples}


def test_any_subset_of_imagenets_synsets_is_recognised(tmp_path):
    chosen = [SYNSETS[5], SYNSETS[999], SYNSETS[134]]
    data = for_classifier(folders(tmp_path, chosen), None, IMAGENET)
    assert labels(data) == {SYNSETS[5]: 5, SYNSETS[999]: 999, SYNSETS[134]: 134}


def test_all_thousand_synsets_need_no_list(tmp_path):
    data = for_classifier(folders(tmp_path, SYNSETS), None, ClassOrder(1000))
    assert labels(data) == {name: index for index, name in enumerate(SYNSETS)}


def test_a_subset_without_a_list_is_refused(tmp_path):
    with pytest.raises(
        ImageError, match="nothing says which of the model's 1000 classes"
    ) as caught:
        for_classifier(folders(tmp_path, SYNSETS[:3]), None, ClassOrder(1000))
    assert "build the artifact again" in caught.value.hint


def test_class_names_whole_or_by_their_first_word(tmp_path):
    names = ["tench, Tinca tinca", "Great White_shark", "daisy"]
    data = for_classifier(folders(tmp_path, names), None, IMAGENET)
    assert sorted(labels(data).values()) == [0, 2, 985]


def test_a_name_that_two_classes_share_is_no_name(tmp_path):
    with pytest.raises(ImageError, match=r"1 classes that the model .* does not have: crane"):
        for_classifier(folders(tmp_path, ["crane", "daisy"]), None, IMAGENET)


def test_class_numbers_are_taken_at_their_word(tmp_path):
    data = for_classifier(folders(tmp_path, ["0", "2", "10", "011"]), None, ClassOrder(12))
    assert labels(data) == {"0": 0, "2": 2, "10": 10, "011": 11}
    with pytest.raises(ImageError, match=r"1 class numbers .* 11 classes does not have: 011"):
        for_classifier(tmp_path, None, ClassOrder(11))


def test_as_many_folders_as_classes_are_numbered_in_their_order(tmp_path):
    root = folders(tmp_path / "a", ["cat", "dog", "eel"])
    data = for_classifier(root, None, ClassOrder(3))
    assert labels(data) == {"cat": 0, "dog": 1, "eel": 2} and data.rule == "sorted folder names"
    with pytest.raises(ImageError, match="3 classes that the model with 4 classes"):
        for_classifier(root, None, ClassOrder(4))
    # torchvision: c1, c10, c2; timm: c1, c2, c10. Whichever we took would be wrong for someone.
    with pytest.raises(ImageError, match="ambiguous"):
        for_classifier(folders(tmp_path / "b", ["c1", "c2", "c10"]), None, ClassOrder(3))


def test_the_order_and_the_digest_depend_on_the_files_alone(tmp_path):
    a = folders(tmp_path / "a", ["1", "2"], count=3)
    b = folders(tmp_path / "b", ["2", "1"], count=3)
    first, second = (for_classifier(root, None, ClassOrder(3)) for root in (a, b))
    assert [s.path for s in first.samples] == [s.path for s in second.samples]
    assert first.digest() == second.digest()
    (b / "2" / "0.jpg").write_bytes(b"longer")
    assert for_classifier(b, None, ClassOrder(3)).digest() != first.digest()
    assert first.first(2).digest() != first.digest()


def test_nested_hidden_linked_and_other_files(tmp_path):
    root = folders(tmp_path / "data", ["1", "2"])
    (root / "1" / "more" / "deep").mkdir(parents=True)
    (root / "1" / "more" / "deep" / "x.PNG").touch()
    (root / "1" / "._0.jpg").touch()  # macOS
    (root / "1" / "list.txt").touch()
    (root / "loose.jpg").touch()
    (root / ".cache").mkdir()
    (root / ".cache" / "y.jpg").touch()
    elsewhere = folders(tmp_path / "elsewhere", ["z"])
    (root / "3").symlink_to(elsewhere / "z")
    (root / "2" / "circle").symlink_to(root / "2")
    data = for_classifier(root, None, ClassOrder(4))
    assert [s.path for s in data.samples] == ["1/0.jpg", "1/more/deep/x.PNG", "2/0.jpg", "3/0.jpg"]


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    folders(tmp_path, ["0", "1"])
    (tmp_path / "1" / "locked").mkdir()
    scandir = validate_data.os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(validate_data.os, "scandir", refuse)
    with pytest.raises(ImageError, match=r"cannot list the images in .*locked: Permission denied"):
        for_classifier(tmp_path, None, ClassOrder(2))


def test_of_splits_val_is_taken(tmp_path):
    folders(tmp_path / "train", ["0", "1"], count=5)
    folders(tmp_path / "val", ["0", "1"])
    assert len(for_classifier(tmp_path, None, ClassOrder(2)).samples) == 2
    (tmp_path / "annotations").mkdir()
    assert len(for_classifier(tmp_path, None, ClassOrder(2)).samples) == 2
    (tmp_path / "train").rename(tmp_path / "val" / "0" / "train")
    assert len(for_classifier(tmp_path / "val", None, ClassOrder(2)).samples) == 12


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images in class folders"),
        (["0/"], "no images in class folders"),
        (["0/notes.txt"], "no images in class folders"),
        (["a.jpg", "b.jpg"], "its images lie in no class folder"),
    ],
)
def test_folders_without_labelled_images_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(ImageError, match=message) as caught:
        for_classifier(tmp_path, None, ClassOrder(2))
    assert "--labels" in caught.value.hint


# --- Tables of labels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "file,label\na/1.jpg,3\nb 2.jpg,0\n",
        "\ufeffa/1.jpg,3\r\nb 2.jpg,0\r\n",
        'a/1.jpg,"3"\n\n"b 2.jpg", 0\n',
        "a/1.jpg\t3\nb 2.jpg\t0\n",
        "a/1.jpg 3\nb 2.jpg 0\n",  # as ImageNet's val.txt
        "./a/1.jpg,3\nb 2.jpg,0\na/1.jpg,3\n",
    ],
)
def test_tables_are_read_in_the_ways_that_they_are_written(tmp_path, text):
    (tmp_path / "a").mkdir()
    for name in ("a/1.jpg", "b 2.jpg", "unlabelled.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "labels.csv").write_text(text, newline="")
    data = for_classifier(tmp_path, tmp_path / "labels.csv", ClassOrder(5))
    assert [(s.path, s.label) for s in data.samples] == [("a/1.jpg", 3), ("b 2.jpg", 0)]


def test_tables_may_name_synsets_and_class_names(tmp_path):
    (tmp_path / "1.jpg").touch()
    for label in (SYNSETS[7], "cock"):
        (tmp_path / "labels.csv").write_text(f"1.jpg,{label}\n")
        data = for_classifier(tmp_path, tmp_path / "labels.csv", IMAGENET)
        assert [s.label for s in data.samples] == [7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.jpg,zebra\n2.jpg,yeti\n", "1 classes .* does not have: yeti"),
        ("1.jpg,n99999999\n", "1 synsets .* does not have: n99999999"),
        ("1.jpg,1000\n", "1 class numbers that the model with 1000 classes does not have: 1000"),
        ("1.jpg,3\n1.jpg,4\n", "gives 1.jpg two labels: 3 and 4"),
        ("1.jpg,3\nnone.jpg,4\n", "1 of 2 files that .* names are not in .*: none.jpg"),
        ("1.jpg\n", "line 1: '1.jpg' is not a file and a label"),
        ("", "holds no labels"),
        ("file,label\n", "holds no labels"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, text, message):
    (tmp_path / "1.jpg").touch()
    (tmp_path / "2.jpg").touch()
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ImageError, match=message):
        for_classifier(tmp_path, tmp_path / "labels.csv", IMAGENET)


def test_long_lists_of_offenders_are_cut(tmp_path):
    with pytest.raises(ImageError, match=r"9 classes .*: x0, x1, x2, x3, x4 and 4 more$"):
        for_classifier(folders(tmp_path, [f"x{i}" for i in range(9)]), None, IMAGENET)


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ImageError, match="cannot be read as a table of labels"):
        for_classifier(tmp_path, tmp_path / "labels.csv", IMAGENET)


# --- Splits for a probe --------------------------------------------------------------------------


def test_a_probe_gets_train_and_val_with_the_same_classes(tmp_path):
    folders(tmp_path / "train", ["dog", "cat", "eel"], count=2)
    folders(tmp_path / "val", ["eel", "cat"])
    train, val = for_features(tmp_path, None)
    assert labels(train) == {"cat": 0, "dog": 1, "eel": 2} and labels(val) == {"cat": 0, "eel": 2}
    folders(tmp_path / "val", ["yak"])
    with pytest.raises(ImageError, match="train split has no images of yak"):
        for_features(tmp_path, None)


def test_a_probe_needs_two_classes_and_both_splits(tmp_path):
    folders(tmp_path / "a", ["train/cat", "val/cat"])
    with pytest.raises(ImageError, match="has 1 class"):
        for_features(tmp_path / "a", None)
    for names in (["train/cat", "train/dog"], ["val/cat", "val/dog"], ["cat", "dog"]):
        root = folders(tmp_path / names[0].replace("/", "-"), names)
        with pytest.raises(ImageError, match="has no train/ and val/"):
            for_features(root, None)


def test_a_table_for_a_probe_names_both_splits(tmp_path):
    folders(tmp_path, ["train", "val"], count=3)
    lines = ["train/0.jpg,cat", "train/1.jpg,dog", "val/2.jpg,dog"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    train, val = for_features(tmp_path, tmp_path / "labels.csv")
    assert [s.label for s in train.samples] == [0, 1]
    assert [(s.path, s.label) for s in val.samples] == [("val/2.jpg", 1)]
    (tmp_path / "labels.csv").write_text("\n".join(lines[:2]))
    with pytest.raises(ImageError, match="names no image below val/"):
        for_features(tmp_path, tmp_path / "labels.csv")


def test_the_subset_of_a_limit_is_spread_over_the_classes(tmp_path):
    data = for_classifier(folders(tmp_path, map(str, range(10)), count=20), None, ClassOrder(10))
    part = data.first(50)
    assert len(part.samples) == 50 and set(part.samples) <= set(data.samples)
    assert len(np.unique(part.labels())) == 10 and data.first(10_000) is data
    assert [s.path for s in part.samples] == sorted(s.path for s in part.samples)


def test_digits_are_written_as_folders(tmp_path, monkeypatch, capsys):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "scripts" / "digits_folder.py"
    spec = importlib.util.spec_from_file_location("digits_folder", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "SIDE", 16)
    monkeypatch.setattr("sys.argv", ["digits_folder.py", str(tmp_path / "digits")])
    assert script.main() == 0 and "597 images in train, 1200 in val" in capsys.readouterr().out
    train, val = validate_data.for_features(tmp_path / "digits", None)
    assert (len(train.samples), len(val.samples)) == (597, 1200)
    assert train.names == tuple("0123456789")
    assert script.main() == 2 and "is there already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


def test_the_order_of_classes_is_timms(tmp_path):
    """Held against timm's own reader: where torchvision numbers otherwise, it is said."""
    from timm.data.readers.reader_image_folder import find_images_and_targets

    from jmp_deploy.core.classes import differing, lexical, natural

    names = ["b2", "B10", "a", "Zebra", "c"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    _, numbers = find_images_and_targets(str(tmp_path))
    assert natural(names) == sorted(numbers, key=numbers.get)
    assert differing(names) and not differing(["a", "b", "c"])
    with pytest.raises(ImageError, match="ambiguous: class 0 is 'B10'"):
        for_classifier(tmp_path, None, ClassOrder(5))
    known = ClassOrder(5, tuple(natural(names)))
    found = for_classifier(tmp_path, None, known)
    assert [s.label for s in found.samples] == [
        numbers[s.path.split("/")[0]] for s in found.samples
    ]
    assert lexical(names)[0] == "B10"


def test_class_names_that_are_numbers_are_names(tmp_path):
    names = tuple(sorted(map(str, range(1, 11))))  # "1", "10", "2", ...
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    found = for_classifier(tmp_path, None, ClassOrder(10, names))
    assert {s.path.split("/")[0]: s.label for s in found.samples}["10"] == 1


def test_kaggles_table_without_endings(tmp_path):
    (tmp_path / "v1.JPEG").touch()
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\nv1,n03995372 85 1 499 272 n03995372 1 2 3 4\n")
    order = ClassOrder(2, None, ("n01440764", "n03995372"))
    (sample,) = for_classifier(tmp_path, table, order).samples
    assert (sample.path, sample.label) == ("v1.JPEG", 1)
