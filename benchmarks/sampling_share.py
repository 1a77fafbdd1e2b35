"""Share of a finished run's work that was sampling: everything else should be hidden or small.

    make quickstart && python benchmarks/sampling_share.py runs/quickstart

From the timings of the records, stage by stage. Reading ahead and encoding run beside the sampling of other shards, so
the share of wall time is at least this.
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
