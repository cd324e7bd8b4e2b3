"""Every rule against the committed known answers, most of them computed by ByzFL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quorsum import aggregation
from quorsum import errors as common
from quorsum.aggregation import errors as own
from quorsum.aggregation import gram_matrix, known_rules, parse_rule

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "vectors" / "aggregation.json").read_text(encoding="utf-8")
)


def updates_of(entry: dict[str, Any]) -> np.ndarray:
    return np.array([[float(value) for value in row] for row in entry["updates"]])


@pytest.mark.parametrize("entry", VECTORS["valid"], ids=lambda entry: f"{entry['title']}, {entry['source']}")
def test_known_answer(entry: dict[str, Any]) -> None:
    rule, updates, reference = parse_rule(entry["rule"]), updates_of(entry), entry.get("reference")
    spread = float(np.abs(updates).max())
    if "aggregate" in entry:
        aggregate = rule.aggregate(updates, entry["f"], reference=reference)
        np.testing.assert_allclose(aggregate, entry["aggregate"], rtol=entry["rtol"], atol=entry["rtol"] * spread)
    else:
        outcome = rule.apply(gram_matrix(updates), entry["f"], reference=reference)
        np.testing.assert_allclose(outcome.weights, entry["weights"], rtol=entry["rtol"], atol=entry["rtol"])
        if "scores" in entry:
            np.testing.assert_allclose(outcome.scores, entry["scores"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entry", VECTORS["errors"], ids=lambda entry: f"{entry['rule']}, {entry['error']}")
def test_known_refusal(entry: dict[str, Any]) -> None:
    expected = getattr(own, entry["error"], None) or getattr(common, entry["error"])
    rule, updates, reference = parse_rule(entry["rule"]), updates_of(entry), entry.get("reference")
    call, argument = (rule.apply, gram_matrix(updates)) if rule.needs == "gram" else (rule.aggregate, updates)
    with pytest.raises(expected) as caught:
        call(argument, entry["f"], reference=reference)
    assert type(caught.value) is expected
    assert getattr(caught.value, "rows", ()) == tuple(entry.get("rows", ()))
    for words in entry["words"]:
        assert words in str(caught.value)


def test_every_rule_has_a_known_answer() -> None:
    seen = {part.name for entry in VECTORS["valid"] for part in parse_rule(entry["rule"]).parts}
    # Bucketing is random: its matrix is tested for what it must be instead.
    assert seen == set(known_rules()) - {"bucketing"}


def test_everything_public_is_there() -> None:
    assert len(set(aggregation.__all__)) == len(aggregation.__all__)
    for name in aggregation.__all__:
        assert hasattr(aggregation, name)
