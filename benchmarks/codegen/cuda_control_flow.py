"""Loops by control flow, for code whose blocks lie out of line: basic blocks, dominators, natural loops.

ptxas puts what it takes to be rare behind a loop, or behind the function, and branches back: there a loop is not what
lies between a label and the branch back to it. A *back edge* leads to a block that every way to its source comes
through. The *natural loop* of a block that back edges lead to, its header, are the blocks from which one of them can be
reached without passing the header, wherever they lie.

A call of another function returns to the instruction after it: what it calls is out of all loops. A "call" of a label
in the function itself is a branch, which ptxas leaves some loops by (sm_80). BSYNC goes on where the BSSY before it
says, which is the instruction after BSYNC in everything that ptxas writes; where it is not, that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .sass import Function, Instruction, ListingError

_BRANCHES = ("BRA", "JMP", "CALL")
_BY_CONVERGENCE = (".DIV", ".CONV")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")


@dataclass(frozen=True)
class Block:
    """Instructions ``begin`` to ``end`` (exclusive) of a function, entered at the first and left after the last."""

    begin: int
    end: int
    #: The blocks that may follow, by their place among the blocks.
    followers: tuple[int, ...]


@dataclass(frozen=True)
class NaturalLoop:
    """The blocks of a loop, among them those of the loops that lie directly in it."""

    header: int
    #: Where the back edges come from.
    latches: tuple[int, ...]
    blocks: frozenset[int]
    inner: tuple[NaturalLoop, ...] = ()

    @property
    def own(self) -> frozenset[int]:
        """The blocks that lie in no loop in it."""
        return self.blocks.difference(*(each.blocks for each in self.inner))

    def flat(self) -> Iterator[NaturalLoop]:
        """The loop and all that lie in it, the innermost first."""
        for each in self.inner:
            yield from each.flat()
        yield self


class ControlFlow:
    """The blocks of a function, and the order that control flow puts them in."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self.blocks = _blocks(function)

    @cached_property
    def reachable(self) -> frozenset[int]:
        """The blocks that control flow comes to. Others are called, or padding."""
        return frozenset(self._order)

    def dominates(self, one: int, other: int) -> bool:
        """Whether every way to ``other`` comes through ``one``; both can be reached."""
        while self._depth[other] > self._depth[one]:
            other = self._dominators[other]
        return one == other

    @cached_property
    def loops(self) -> tuple[NaturalLoop, ...]:
        """The outermost loops, in order."""
        return self._nested(sorted(self._natural().values(), key=lambda each: -len(each.blocks)))

    def can_be_avoided(self, block: int) -> bool:
        """Whether control flow that came to the dominator of a block need not come to the block.

        Within a loop that has both, that is in the pass that is under way.
        """
        dominator = self._dominators[block]
        around = [each for loop in self.loops for each in loop.flat() if {block, dominator} <= each.blocks]
        within = around[0].blocks if around else self.reachable
        ends = {each for each in within if not self.blocks[each].followers}
        ends.update(*(each.latches for each in around[:1]))
        seen = {dominator}
        rest = [dominator] * (block != dominator)
        while rest:
            each = rest.pop()
            if each in ends:
                return True
            new = {follower for follower in self.blocks[each].followers if follower in within} - seen - {block}
            seen |= new
            rest += new
        return False

    def instructions(self, blocks: Collection[int]) -> list[Instruction]:
        """Those of some blocks, in order."""
        found = [self.blocks[each] for each in sorted(blocks)]
        return [self._function.instructions[place] for block in found for place in range(block.begin, block.end)]

    def count(self, blocks: Collection[int]) -> int:
        """How many instructions of some blocks are work."""
        return sum(self._function.count(self.blocks[each].begin, self.blocks[each].end) for each in blocks)

    def behind(self, starts: Callable[[int], bool]) -> frozenset[int]:
        """The blocks for which ``starts`` is true and that can be avoided, and all that only those lead to."""
        found = {each for each in self.reachable if starts(each) and self.can_be_avoided(each)}
        for each in self._order:  # a block's dominator comes before it
            if self._dominators[each] in found:
                found.add(each)
        return frozenset(found)

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        """Of each block that can be reached, those that it may follow."""
        found: dict[int, list[int]] = {each: [] for each in self._order}
        for each in self._order:
            for follower in self.blocks[each].followers:
                found[follower].append(each)
        return found

    @cached_property
    def _order(self) -> list[int]:
        """The blocks that can be reached, in reverse postorder."""
        order: list[int] = []
        seen = {0}
        path: list[tuple[int, Iterator[int]]] = [(0, iter(self.blocks[0].followers))]
        while path:
            block, followers = path[-1]
            new = next((each for each in followers if each not in seen), None)
            if new is None:
                order.append(block)
                path.pop()
            else:
                seen.add(new)
                path.append((new, iter(self.blocks[new].followers)))
        return order[::-1]

    @cached_property
    def _dominators(self) -> dict[int, int]:
        """The immediate dominator of each block; of the first, itself. After Cooper, Harvey and Kennedy (2001)."""
        place = {block: i for i, block in enumerate(self._order)}
        dominators = {0: 0}

        def common(one: int, other: int) -> int:
            while one != other:
                if place[one] > place[other]:
                    one = dominators[one]
                else:
                    other = dominators[other]
            return one

        changed = True
        while changed:
            changed = False
            for block in self._order[1:]:
                known = [each for each in self.predecessors[block] if each in dominators]
                new = known[0]
                for each in known[1:]:
                    new = common(new, each)
                if dominators.get(block) != new:
                    dominators[block] = new
                    changed = True
        return dominators

    @cached_property
    def _depth(self) -> dict[int, int]:
        depth = {0: 0}
        for block in self._order[1:]:
            depth[block] = depth[self._dominators[block]] + 1
        return depth

    def _natural(self) -> dict[int, NaturalLoop]:
        """The loops by their headers."""
        place = {block: i for i, block in enumerate(self._order)}
        latches: dict[int, list[int]] = {}
        for block in self._order:
            for header in self.blocks[block].followers:
                if place[header] > place[block]:
                    continue
                if not self.dominates(header, block):
                    begin = self.blocks[header].begin
                    raise ListingError(f"{self._function.name}: the loop at instruction {begin} has two entries")
                latches.setdefault(header, []).append(block)
        return {header: self._natural_of(header, found) for header, found in latches.items()}

    def _natural_of(self, header: int, latches: Sequence[int]) -> NaturalLoop:
        found = {header}
        rest = list(latches)
        while rest:
            block = rest.pop()
            if block not in found:
                found.add(block)
                rest += self.predecessors[block]
        return NaturalLoop(header, tuple(latches), frozenset(found))

    def _nested(self, loops: Sequence[NaturalLoop]) -> tuple[NaturalLoop, ...]:
        """Natural loops of different headers have all blocks of the smaller one in common, or none."""
        found = []
        rest = list(loops)
        while rest:
            outer = rest.pop(0)
            inside = [each for each in rest if each.header in outer.blocks]
            rest = [each for each in rest if each.header not in outer.blocks]
            found.append(NaturalLoop(outer.header, outer.latches, outer.blocks, self._nested(inside)))
        return tuple(sorted(found, key=lambda each: self.blocks[each.header].begin))


def _blocks(function: Function) -> list[Block]:
    code = function.instructions
    targets = {place for place in function.labels.values() if place < len(code)}
    starts = {0, *targets, *(place + 1 for place, each in enumerate(code) if _ends(each) and place + 1 < len(code))}
    begins = sorted(starts)
    number = {begin: i for i, begin in enumerate(begins)}
    blocks = []
    for begin, end in zip(begins, [*begins[1:], len(code)], strict=True):
        blocks.append(Block(begin, end, tuple(number[each] for each in _followers(function, end - 1))))
    return blocks


def calls_function(instruction: Instruction) -> bool:
    """Whether it calls another function, such as the slow path of a division."""
    return instruction.name == "CALL" and instruction.label is None


def _ends(instruction: Instruction) -> bool:
    return instruction.name in (*_BRANCHES, *_INDIRECT, "EXIT", "RET", "BSYNC") and not calls_function(instruction)


def _followers(function: Function, place: int) -> list[int]:
    """The places of the instructions that may come after one."""
    instruction = function.instructions[place]
    following = [place + 1] if place + 1 < len(function.instructions) else []
    if instruction.name in _INDIRECT:
        raise ListingError(f"{function.name}: where does {instruction.opcode} {instruction.operands} lead?")
    if instruction.name == "BSYNC":
        _check_convergence(function, place)
    if instruction.name in ("EXIT", "RET"):
        return following if instruction.predicate or (instruction.name == "EXIT" and instruction.operands) else []
    if instruction.name not in _BRANCHES or calls_function(instruction):
        return following
    label = instruction.label
    if label is None or label not in function.labels:
        raise ListingError(f"{function.name}: a branch to nowhere: {instruction.opcode} {instruction.operands}")
    # A predicate may stand before the opcode or among the operands, or both: the branch is taken where both hold.
    # Others depend on whether the threads of a warp are together; what disassemblers print of that differs.
    conditional = (
        instruction.predicate
        or not instruction.operands.startswith("`")
        or any(each in instruction.opcode for each in _BY_CONVERGENCE)
    )
    target = [function.labels[label]] if function.labels[label] < len(function.instructions) else []
    return list(dict.fromkeys([*(following if conditional else []), *target]))


def _check_convergence(function: Function, place: int) -> None:
    register = function.instructions[place].operands.split(",")[0].strip()
    where = {
        function.labels.get(each.label or "")
        for each in function.instructions
        if each.name == "BSSY" and each.operands.split(",")[0].strip() == register
    }
    if place + 1 not in where:
        raise ListingError(f"{function.name}: BSYNC {register} at instruction {place} goes on elsewhere")
