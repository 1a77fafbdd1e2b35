"""The share of a finished run's time that was sampling, which should be nearly all of it.

    make quickstart && python benchmarks/sampling_share.py runs/quickstart

It adds up the timings in the records, by stage. Reading and encoding of a shard overlap with the sampling of others, so
the share of the wall time is at least the printed one.
"""

from __future__ import annotations

import sys
from collections import Counter

from stylemill.store.ledger import Ledger
from stylemill.store.run_file import RunFile


def main(output: str) -> None:
    _, paths = RunFile.open(output)
    seconds: Counter[str] = Counter()
    ledger = Ledger(paths, read_only=True)
    ledger.refresh()
    for record in ledger.records():
        seconds.update(record.timings)
    total = sum(seconds.values())
    print(", ".join(f"{stage} {spent:.2f} s ({spent / total:.1%})" for stage, spent in seconds.most_common()))


if __name__ == "__main__":
    main(sys.argv[1])
