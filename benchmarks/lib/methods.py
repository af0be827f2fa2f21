"""The methods that are compared, by name: JMP in its forms, and training-free baselines.

All run in the same model, in the same blocks, with the same number of tokens in every block (the
schedule of the budget), and all profit from the last block's exact saving: what differs is which
tokens stay and what becomes of the others. Written from the papers; each note says what is left
out of the original. Where a method was published with a schedule of its own, `own` names it, and
the harness can run it too (`--own-schedules`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.lib.rules import Rule
from jmp_deploy.jmp.schedule import Schedule

PACKAGE = "package"


@dataclass(frozen=True)
class Method:
    """A method and how to run it.

    Attributes:
        name: as on the command line.
        note: what it is, with its source, for the table.
        rule: settings of `rules.Rule`, or None for the package's own reduction.
        tau: for the package's own reduction; None takes the schedule's.
        first_form: the package's own reduction in the method's first form (docs/method.md).
        proportional: later attention adds log(size).
        own: the schedule that it was published with: "all" (equal steps in all blocks), "thirds"
            (blocks at 1/4, 1/2, 3/4 of the depth), or "" for the budget's.
    """

    name: str
    note: str
    rule: dict[str, object] | None = None
    tau: float | None = None
    first_form: bool = False
    proportional: bool = True
    own: str = ""

    def make_rule(self) -> Rule | None:
        """A fresh rule (random pruning counts its calls), or None for the package's own."""
        return None if self.rule is None else Rule(**self.rule)  # type: ignore[arg-type]

    def scheduled(self, schedule: Schedule) -> Schedule:
        """The schedule with this method's way to select and to merge."""
        if not self.first_form:
            return schedule
        return replace(schedule, selection="importance", tau=0.7, merge_weight=1.0)


METHODS = {
    method.name: method
    for method in (
        Method("jmp", "JMP as shipped"),
        Method("jmp-merge", "JMP, merge only (tau -1)", tau=-1.0),
        Method("jmp-prune", "JMP, prune only (tau 2)", tau=2.0),
        Method(
            "jmp-importance",
            "JMP, first form: the most attended tokens stay, tau 0.7, plain mean",
            first_form=True,
        ),
        Method(
            "tome",
            "ToMe (Bolya et al., ICLR 2023): bipartite matching of keys, merge the most similar",
            rule={"select": "bipartite"},
            own="all",
        ),
        Method(
            "evit",
            "EViT (Liang et al., ICLR 2022) without its fine-tuning: prune, one fused token",
            rule={"fate": "fuse"},
            proportional=False,
            own="thirds",
        ),
        Method(
            "prune",
            "prune by the class token's attention, nothing else",
            rule={"fate": "prune"},
            proportional=False,
        ),
        Method("merge", "keep by attention, merge the rest into their nearest", rule={}),
        Method(
            "random",
            "prune at random (seed 0)",
            rule={"fate": "prune", "importance": "random"},
            proportional=False,
        ),
        Method(
            "diffrate",
            "after DiffRate (Chen et al., ICCV 2023) without its learned rates: prune the less "
            "important half of those that go, merge the other; cosine of x, weighted by it",
            rule={"metric": "x", "fate": "rank", "tau": 0.5, "weighting": "similarity"},
        ),
    )
}
