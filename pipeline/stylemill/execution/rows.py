"""The rows of a shard on their way to the output. Each stage adds its results to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stylemill.errors import DecodingError, EncodingError, PoisonPairError, RowError, SamplingError
from stylemill.execution.attempt import Attempt, Run
from stylemill.images.encode import encode_image
from stylemill.images.input_image import Pixels
from stylemill.manifest import Row
from stylemill.store.retries import GenerationRows, generation_rows

if TYPE_CHECKING:
    from stylemill.engine import Distances, SampleState

# What a pair's failure in the engine is recorded as, by its stage.
_ERRORS: dict[str, type[RowError]] = {kind.stage: kind for kind in (EncodingError, SamplingError, DecodingError)}
_POISON_PAIR = (
    "every worker that processed this pair died, also when it processed the pair alone; look at its images, and try it "
    "in a run of its own"
)


@dataclass(frozen=True)
class FailureReason:
    """The stage at which a row failed, the class of the error and its message."""

    stage: str
    error: str
    message: str

    @classmethod
    def of(cls, error: RowError) -> FailureReason:
        return cls(error.stage, type(error).__name__, str(error))


@dataclass(frozen=True)
class OutputRow:
    """A row that becomes an output image or a recorded failure. A failed row passes the later stages unchanged."""

    source: Row
    content_sha256: str | None = None
    style_sha256: tuple[str, ...] = ()
    failure: FailureReason | None = None
    wanted: bool = True  # False: the row keeps its slot, but its output is in another generation of the shard
    distances: Distances | None = None  # None: not sampled yet, or failed
    image: bytes | None = None
    size: tuple[int, int] = (0, 0)  # width and height of the output image


def rows_of_attempt(run: Run, attempt: Attempt) -> list[OutputRow]:
    """The rows of a shard as they are before reading: some have a failure that is known already.

    A row that another generation of the shard has is not wanted. Raises DamagedError where an earlier generation is
    damaged.
    """
    row_range = run.rows_of(attempt.shard)
    work = generation_rows(run.paths, row_range, attempt.shard, attempt.generation, run.newest)
    sources = run.manifest.output_rows(row_range.start, row_range.stop, attempt.occurrences)
    return [_row_of_generation(source, work) for source in sources]


def _row_of_generation(source: Row, work: GenerationRows) -> OutputRow:
    known = work.known_failures.get(source.output_row)
    failure = FailureReason(known.stage, known.error, known.message) if known else None
    return OutputRow(source, failure=failure, wanted=known is not None or source.output_row in work.rows)


def with_poison_pairs_failed(attempt: Attempt, rows: list[OutputRow]) -> list[OutputRow]:
    """The rows, with the poison pairs of the attempt failed."""
    reasons = {
        place: FailureReason(stage, PoisonPairError.__name__, _POISON_PAIR)
        for place, stage in attempt.poison_pairs.items()
    }
    return [replace(row, failure=row.failure or reasons.get(place)) for place, row in enumerate(rows)]


def poison_pairs(rows: list[OutputRow]) -> dict[int, str]:
    """Place in the shard -> message of the pairs that the engine must not touch. It knows of other failures itself."""
    return {
        place: row.failure.message
        for place, row in enumerate(rows)
        if row.failure and row.failure.error == PoisonPairError.__name__
    }


def row_numbers(rows: list[OutputRow]) -> list[int]:
    """The output row numbers of the rows that have not failed so far."""
    return [row.source.output_row for row in rows if not row.failure]


def with_results_of_engine(
    rows: list[OutputRow], state: SampleState, distances: list[Distances | None]
) -> list[OutputRow]:
    """The rows with their distances and their failures in the engine; a failure that is known already is kept."""
    failures = {
        place: FailureReason.of(_ERRORS[failure.stage](failure.message)) for place, failure in state.failures.items()
    }
    return [
        replace(
            row,
            distances=distances[place],
            failure=row.failure or failures.get(place),
        )
        for place, row in enumerate(rows)
    ]


def loss_scales(rows: list[OutputRow], state: SampleState) -> dict[str, float]:
    """Output row -> the smallest loss scale of a row whose gradient overflowed at the usual one, for the record."""
    return {
        str(rows[place].source.output_row): scale
        for place, scale in sorted(state.lowered_scales.items())
        if rows[place].wanted and not rows[place].failure
    }


def with_encoded_image(run: Run, row: OutputRow, pixels: Pixels | None) -> OutputRow:
    """The row with the bytes of its output image file."""
    if row.failure or pixels is None:
        return row
    shards, (height, width, _) = run.job.shards, pixels.shape
    return replace(row, image=encode_image(pixels, shards.image_format, shards.quality), size=(width, height))


def to_json(rows: list[OutputRow]) -> list[dict[str, Any]]:
    """What reading learned of the rows, for a checkpoint."""
    return [
        {
            "content_sha256": row.content_sha256,
            "style_sha256": row.style_sha256,
            "failure": vars(row.failure) if row.failure else None,
        }
        for row in rows
    ]


def from_json(rows: list[OutputRow], values: list[dict[str, Any]]) -> list[OutputRow]:
    """The rows with what `to_json` saved."""
    return [
        replace(
            row,
            content_sha256=saved["content_sha256"],
            style_sha256=tuple(saved["style_sha256"]),
            failure=FailureReason(**saved["failure"]) if saved["failure"] else None,
        )
        for row, saved in zip(rows, values, strict=True)
    ]
