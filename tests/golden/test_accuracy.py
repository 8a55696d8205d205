"""The accuracy gate: what may move, what may not, and that coverage cannot be lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import accuracy, regress_parts

ERRORS = st.dictionaries(st.sampled_from(["a: x", "a: y", "a: z"]), st.floats(0.001, 0.5), min_size=1)


def as_parts(errors: dict[str, float], coverage: int = 10) -> accuracy.Parts:
    return {name: {"error": error, "coverage": coverage} for name, error in errors.items()}


@given(ERRORS, st.floats(0.5, 1.04))
def test_no_more_than_allowed_is_silent(errors: dict[str, float], factor: float) -> None:
    assert accuracy.worse(as_parts({k: factor * v for k, v in errors.items()}), as_parts(errors)) == []


@given(ERRORS)
def test_all_parts_six_percent_worse_is_the_total_and_eleven_is_each_part(errors: dict[str, float]) -> None:
    [line] = accuracy.worse(as_parts({k: 1.06 * v for k, v in errors.items()}), as_parts(errors))
    assert "mean error" in line
    lines = accuracy.worse(as_parts({k: 1.11 * v for k, v in errors.items()}), as_parts(errors))
    assert len(lines) == len(errors) + 1 and all(any(name in line for line in lines) for name in errors)


def test_lost_coverage_is_named() -> None:
    known = as_parts({"a: x": 0.1, "a: y": 0.1, "b: z": 0.1})
    assert accuracy.worse(as_parts({"a: x": 0.1}), known) == ["accuracy: a: y is not measured any more"]
    [line] = accuracy.worse(as_parts({"b: z": 0.1}, 9), known)
    assert line == "accuracy: b: z rests on 9 of 10 measurements"


def test_data_that_is_not_at_hand_is_said_and_nothing_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPLANE_DATA", str(tmp_path))
    check = regress_parts.accuracy_check(True)
    assert not check.lines and len(check.notes) == 2 and all("not checked" in note for note in check.notes)


def test_blessing_keeps_what_cannot_be_measured_here(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    accuracy.bless(as_parts({"a: x": 0.1}), "one", path)
    accuracy.bless(as_parts({"b: y": 0.2}), "two", path)
    assert accuracy.read(path)["reasons"] == ["one", "two"] and set(accuracy.read(path)["parts"]) == {"a: x", "b: y"}


def test_a_measurement_that_raises_is_named_and_not_blessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "parts", lambda quick: 1 / 0)
    check = regress_parts.accuracy_check(True)
    assert check.lines == ["accuracy: raised ZeroDivisionError: division by zero"]
    assert check.broken and check.bless is None


def test_micro_without_torch_is_said_and_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blessing the matrix where kernels cannot be timed must not move the reference that they are timed against."""
    monkeypatch.setattr(regress_parts, "find_spec", lambda name: None)
    check = regress_parts.micro_check(True)
    assert check.notes == ["micro: torch is not installed, not checked"] and not check.lines and check.bless is None
