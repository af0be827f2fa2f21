"""What leaves a model, told apart once."""

from __future__ import annotations

import numpy as np
import pytest

from jmp_deploy.core.outputs import FEATURES, LOGITS, output_named


def test_features_are_no_classes():
    row = np.array([3.0, 4.0, 0.0, 0.0, 0.0], np.float32)
    answer = output_named("features").answer(row, topk=1)
    assert answer == {"features": [3, 4, 0, 0, 0]}
    assert FEATURES.words(answer) == "[3.000, 4.000, 0.000, 0.000, ...] 5 values, norm 5.000"
    assert FEATURES.differences(row[None], row[None]) == {"top1_agreement": None}


def test_logits_are_shown_as_the_best_classes():
    row = np.log(np.array([0.1, 0.6, 0.3]))
    first, second = LOGITS.answer(row, ["ant", "bee", "cow"], topk=2)["top"]
    assert (first["index"], first["label"], second["label"]) == (1, "bee", "cow")
    assert (first["score"], second["score"]) == pytest.approx((0.6, 0.3))
    assert LOGITS.words({"top": [first, second]}) == " 60.0%  bee\n 30.0%  cow"


def test_an_engine_from_elsewhere_keeps_its_outputs_name():
    found = output_named("scores")
    assert found.name == "scores" and found.classifies
