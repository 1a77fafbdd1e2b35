"""Measure the time and the memory that opening a run with many shards takes.

    python benchmarks/ledger.py /tmp/ledger 1000000

Creates a run folder whose records are compacted, except the last ones, by the function that a run uses. Opens it in a
new process as the driver does (`Ledger`), and as `stylemill status` does. The data files are empty, because opening a
run only looks at their sizes. A folder of an earlier call is used again. Then measures what the driver does for each
commit, and compares it with a run of a thousandth of the shards.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from stylemill.store.compaction import write_segment
from stylemill.store.paths import RunPaths
from stylemill.store.records import FileEntry, Record
from stylemill.store.run_file import RunFile, create_run_folder
from stylemill.store.segments import RECORDS_PER_SEGMENT

PAIRS = 256
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
MEASURE = """
import resource, sys, time
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
print(f"{{seconds:.1f}} s, {{time.process_time():.1f}} of CPU;", end=" ")
print(f"{{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}} MB peak: {{result}}")
"""
DRIVER = """
from stylemill.store.ledger import Ledger
from stylemill.store.run_file import RunFile
_, paths = RunFile.open(sys.argv[1])
result = f"{len(Ledger(paths).open_shards(paths.shards)):,} shards open"
"""
STATUS = """
from stylemill.report.status import status
result = f"{status(sys.argv[1]).summary.rows_ok:,} images"
"""
COMMITS = """
from stylemill.store.commit import confirm
from stylemill.store.ledger import Ledger
from stylemill.store.run_file import RunFile
_, paths = RunFile.open(sys.argv[1])
ledger = Ledger(paths)
ledger.refresh()
ledger.totals()
start = time.perf_counter()
for _ in range(200):
    confirm(paths, ledger.read(paths.shards - 1))
    ledger.totals()
print((time.perf_counter() - start) / 200)
"""


def create_run(output: Path, shards: int) -> None:
    """Create a finished run with `shards` shards, of which every hundredth has a failed row."""
    paths = RunPaths(output, shards)
    create_run_folder(paths)
    numerics = {"device": "cpu", "dtype": "float32", "threads": 1, "micro_batch": 4, "torch": "2.6.0"}
    paths.job.write_bytes(RunFile({}, "f" * 64, shards * PAIRS, shards, PAIRS, {"manifest": "m"}, {}).to_bytes())
    records: list[Record] = []
    for shard in range(shards):
        failed = shard % 100 == 0
        for path in (paths.data(shard), paths.failures(shard))[: 1 + failed]:
            path.touch()
        record = Record(
            shard=shard,
            fingerprint="f" * 64,
            first_row=shard * PAIRS,
            stop_row=(shard + 1) * PAIRS,
            attempt=os.urandom(6).hex(),
            rows_ok=PAIRS - failed,
            rows_failed=int(failed),
            data=FileEntry(paths.relative(paths.data(shard)), PAIRS - failed, 0, os.urandom(32).hex()),
            failures=FileEntry(paths.relative(paths.failures(shard)), 1, 0, EMPTY_SHA256) if failed else None,
            failed_by_class={"ImageError": 1} if failed else {},
            numerics=numerics,
            timings={"read": 1.25, "sample": 812.5, "decode": 20.25, "write": 3.125},
        )
        records.append(record)
        if len(records) == RECORDS_PER_SEGMENT:
            write_segment(paths, records)
            records.clear()
    for record in records:
        paths.record(record.shard).write_bytes(record.to_bytes())


def main(folder: str, count: str) -> None:
    output, shards = Path(folder) / f"run-{count}", int(count)
    create_once(output, shards)
    records = output / "records"
    size = sum(entry.stat().st_size for entry in os.scandir(records)) / 2**20
    print(f"{platform.machine()}, {os.cpu_count()} cores; {len(os.listdir(records)):,} record files, {size:.0f} MB")
    for name, code in (("driver", DRIVER), ("status", STATUS)):
        print(f"{name}: {in_new_process(MEASURE.format(code=code), output)}")
    small = Path(folder) / f"run-{shards // 1000}"
    create_once(small, shards // 1000)
    seconds = {path: float(in_new_process("import sys, time\n" + COMMITS, path)) for path in (small, output)}
    print(
        f"commit: {seconds[output] * 1e6:.0f} us with {shards:,} shards, {seconds[output] / seconds[small]:.1f} times "
        f"that with {shards // 1000:,}"
    )


def create_once(output: Path, shards: int) -> None:
    if (output / "done").exists():
        return
    start = time.perf_counter()
    create_run(output, shards)
    (output / "done").touch()
    print(f"created {shards:,} records in {time.perf_counter() - start:.0f} s")


def in_new_process(code: str, output: Path) -> str:
    process = subprocess.run([sys.executable, "-c", code, output], capture_output=True, text=True, check=True)
    return process.stdout.strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
