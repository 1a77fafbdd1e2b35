"""Find the poison pairs of a shard: the pairs that kill the worker that processes them.

Policy only, without Ray or files. The state is not saved: after the death of the driver a bisection starts over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stylemill.execution.attempt import Probe

MAX_POISON_PAIRS = 8  # per shard; if more pairs kill their workers, the pairs are not the cause


class Bisection:
    """A sequence of probes of the pairs of one shard. A group of pairs that kills its worker is split in two.

    All pairs are only read first: that is cheap, and it shows the stage at which a pair kills. If the worker survives,
    groups of pairs are sampled up to step `until`, which the worker had not passed when it died.

    A pair counts as a poison pair only if two workers died when they processed it alone, since one of them may have
    been preempted, and only if workers survived the same stage with other pairs of this shard or, if
    `other_shards_committed()`, with other shards. On a machine where every worker dies, no pair is to blame.
    """

    def __init__(self, places: Sequence[int], until: int, other_shards_committed: Callable[[], bool]) -> None:
        self._all = tuple(places)
        self._until = until
        self._other_shards_committed = other_shards_committed
        self._stage = "read"
        self._groups = [self._all]  # still to be probed, the next one last
        self._killed_once: tuple[int, ...] | None = None  # a group of one pair that is probed a second time
        self._killed_twice: dict[int, str] = {}  # place -> stage
        self._any_survived = False  # whether a worker survived a probe of the current stage

    @property
    def probe(self) -> Probe | None:
        """The next probe, or None when the bisection is finished."""
        return Probe(self._groups[-1], self._stage, self._until) if self._groups else None

    def worker_survived(self) -> None:
        group = self._groups.pop()
        self._killed_once = None
        self._any_survived = True
        if self._stage == "read" and group == self._all:
            self._stage, self._any_survived = "sample", False
            self._groups = _halves(self._all)

    def worker_died(self) -> None:
        group = self._groups.pop()
        if len(group) > 1:
            self._groups += _halves(group)
            return
        if group != self._killed_once:
            self._killed_once = group
            self._groups.append(group)
            return
        self._killed_twice[group[0]] = self._stage
        if len(self._killed_twice) > MAX_POISON_PAIRS:
            self._groups = []

    @property
    def poison_pairs(self) -> dict[int, str]:
        """Place and stage of each poison pair. Empty if too many pairs, or all of them, killed their workers."""
        proven = self._any_survived or self._other_shards_committed()
        return self._killed_twice if proven and len(self._killed_twice) <= MAX_POISON_PAIRS else {}


def _halves(group: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The two halves, the second one first: groups are taken from the end of the list."""
    middle = (len(group) + 1) // 2
    return [half for half in (group[middle:], group[:middle]) if half]
