"""What the benchmarks' commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jmp_deploy.core.errors import JmpDeployError, ModelError, fail

if TYPE_CHECKING:
    from jmp_deploy.core.manifest import Weights


def exit_code(work: Callable[[], object]) -> int:
    """Does the work; an error of ours becomes one message with a hint, and the exit code."""
    try:
        work()
    except JmpDeployError as error:
        return fail(error.message, error.hint, error.exit_code)
    return 0


def weights_facts(origin: Weights) -> dict[str, Any]:
    """Which weights they are, wherever they lie: for results, and for the names of what is kept."""
    facts = asdict(origin).items()
    return {key: value for key, value in facts if key != "path" and value is not None}


def budgets(text: str) -> list[float]:
    """The shares of `--budgets 75,62,50,40`.

    Raises:
        ModelError: they are not percentages from 5 to 100.
    """
    try:
        values = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0.05 <= value <= 1 for value in values):
        raise ModelError(
            f"--budgets {text!r}: expected percentages from 5 to 100", "for example 75,62,50,40"
        )
    return values
