"""Machine code as cuobjdump prints it: instructions, the ways through them, loops.

Enough for the kernels here: no computed jumps, no calls but of the compiler's own helpers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WIDE_LOAD, MATRIX = "LDG.E.128", "HMMA"
PRODUCTS = (MATRIX, "FFMA", WIDE_LOAD)  # what a main loop is told by, the first that there is
OVERLAP = "ACQBULK"  # griddepcontrol.wait
GLOBAL_MEMORY = re.compile(r"(LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|LDGSTS|UBLKCP|UTMA\w*)(\.|$)")


@dataclass
class Instruction:
    """One line of the disassembly.

    Attributes:
        guarded: executed under a condition.
    """

    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def jumps(self) -> bool:
        return self.name.split(".")[0] in ("BRA", "JMP")

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        return self.guarded or not re.match(r"0x[0-9a-f]+$", self.operands)


def successors(code: list[Instruction]) -> list[list[int]]:
    """Where each instruction may go on, by position. Ways for threads of a warp that have parted
    (BRA.DIV) are left out: they do the same, one lane after the other."""
    at = {instruction.address: index for index, instruction in enumerate(code)}
    ways: list[list[int]] = []
    for index, one in enumerate(code):
        kind = one.name.split(".")[0]
        following = [index + 1] if index + 1 < len(code) else []
        if one.jumps and not one.name.startswith("BRA.DIV"):
            to = [at[one.target]] if one.target in at else []
            ways.append(to + (following if one.conditional else []))
        elif kind in ("EXIT", "RET", "BRX"):
            ways.append(following if one.guarded else [])
        else:
            ways.append(following)
    return ways


def early_accesses(code: list[Instruction], ways: list[list[int]]) -> list[str]:
    """Accesses to global memory on some way from the beginning that has not passed the wait."""
    found, seen, waiting = [], set(), [0]
    while waiting:
        index = waiting.pop()
        if index in seen or code[index].name.startswith(OVERLAP):
            continue
        seen.add(index)
        if GLOBAL_MEMORY.match(code[index].name):
            found.append(f"{code[index].name} at {code[index].address:#x}")
        waiting += ways[index]
    return sorted(found)


def find_loops(code: list[Instruction], ways: list[list[int]]) -> list[Loop]:
    """The natural loops: a jump back to what all ways to it pass, and all that leads to it."""
    parts = [index for index, way in enumerate(ways) if way != [index + 1]]
    jumped_to = {way for index in parts for way in ways[index]}
    starts = sorted({0, *jumped_to, *(index + 1 for index in parts if index + 1 < len(code))})
    ends = [*starts[1:], len(code)]
    block_at = {start: number for number, start in enumerate(starts)}
    out = [[block_at[way] for way in ways[end - 1]] for end in ends]
    into: list[list[int]] = [[] for _ in out]
    for number, to in enumerate(out):
        for way in to:
            into[way].append(number)
    rank = {number: place for place, number in enumerate(reversed(_postorder(out)))}
    above = _dominators(into, rank)

    def dominates(a: int, b: int) -> bool:
        while rank[b] > rank[a]:
            b = above[b]
        return a == b

    bodies: dict[int, set[int]] = {}
    for number in rank:
        for head in out[number]:
            if dominates(head, number):
                body, waiting = bodies.setdefault(head, {head}), [number]
                while waiting:
                    one = waiting.pop()
                    if one not in body:
                        body.add(one)
                        waiting += [before for before in into[one] if before in rank]
    loops = []
    for head, body in sorted(bodies.items()):
        inside = {
            n for other, its in bodies.items() if other != head and other in body for n in its
        }
        names = [one.name for n in body - inside for one in code[starts[n] : ends[n]]]
        counts = {kind: sum(name.startswith(kind) for name in names) for kind in PRODUCTS}
        loops.append(Loop(len(names), counts))
    return loops


def _postorder(out: list[list[int]]) -> list[int]:
    """Blocks that can be reached, each after those that it leads to."""
    found: list[int] = []
    seen = {0}
    stack = [(0, iter(out[0]))]
    while stack:
        number, rest = stack[-1]
        following = next((way for way in rest if way not in seen), None)
        if following is None:
            found.append(number)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(out[following])))
    return found


def _dominators(into: list[list[int]], rank: dict[int, int]) -> dict[int, int]:
    """Block -> the nearest other that all ways to it pass (Cooper, Harvey and Kennedy, "A simple,
    fast dominance algorithm", 2001)."""
    above = {0: 0}
    changed = True
    while changed:
        changed = False
        for number in sorted(rank, key=rank.__getitem__)[1:]:
            known = [before for before in into[number] if before in above]
            nearest = known[0]
            for before in known[1:]:
                while before != nearest:
                    if rank[before] > rank[nearest]:
                        before = above[before]
                    else:
                        nearest = above[nearest]
            if above.get(number) != nearest:
                above[number], changed = nearest, True
    return above


@dataclass
class Loop:
    """Instructions of a loop, less those of loops inside, and how many of some kinds."""

    instructions: int
    products: dict[str, int]


def read_code(disassembly: str) -> dict[str, list[Instruction]]:
    """Mangled name -> instructions."""
    line_of = re.compile(
        r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;"
    )
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in disassembly.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := line_of.match(line):
            code.append(Instruction(int(match[1], 16), bool(match[2]), match[3], match[4]))
    return found
