"""Which pairs of a shard kill their worker? Found by halving: what dies is cut in two, what survives is acquitted.

Policy only, as the attempt book. Nothing of it is kept on disk: after the driver's death a bisection begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stylemill.execution.attempt import Probe

MAX_POISON_PAIRS = 8  # of a shard; where more die, it is not the pairs


class Bisection:
    """Probes of a shard's pairs, one after another, each in a worker of its own.

    Reading is tried first: it is cheap, and tells at which stage a pair kills. Who survives that is sampled.
    `until` is a step by which the deaths came. A pair is blamed only if two workers die over it alone, for one may have
    been preempted, and only if others survived the same stage, here or, as `others_survive` says, in other shards: a
    machine on which all die proves nothing against a pair.
    """

    def __init__(self, places: Sequence[int], until: int, others_survive: Callable[[], bool]) -> None:
        self.poison_pairs: dict[int, str] = {}  # place -> stage
        self._all = tuple(places)
        self._until = until
        self._others_survive = others_survive
        self._stage = "read"
        self._groups = [self._all]  # to be tried, the next one last
        self._suspect: tuple[int, ...] | None = None  # a lone pair, over which a worker died once
        self._any_survived = False  # whether any group survived this stage

    @property
    def probe(self) -> Probe | None:
        """What to try next; None: the bisection is over."""
        return Probe(self._groups[-1], self._stage, self._until) if self._groups else None

    def survived(self) -> None:
        group = self._groups.pop()
        self._suspect = None
        self._any_survived = True
        if self._stage == "read" and group == self._all:
            self._stage, self._any_survived = "sample", False
            self._groups = _halves(self._all)

    def died(self) -> None:
        group = self._groups.pop()
        if len(group) > 1:
            self._groups += _halves(group)
            return
        if group != self._suspect:
            self._suspect = group
            self._groups.append(group)
            return
        self.poison_pairs[group[0]] = self._stage
        if len(self.poison_pairs) > MAX_POISON_PAIRS:
            self._groups = []

    @property
    def found(self) -> dict[int, str]:
        """The poison pairs, once the bisection is over; none where too many pairs, or all of them, killed their worker."""
        proven = (self._any_survived or self._others_survive()) and len(self.poison_pairs) <= MAX_POISON_PAIRS
        return self.poison_pairs if proven else {}


def _halves(group: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The second one first: groups are taken from the end."""
    middle = (len(group) + 1) // 2
    return [half for half in (group[middle:], group[:middle]) if half]
