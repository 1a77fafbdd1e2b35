"""`validate` finds every problem of every row, and `show` describes a manifest."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stylemill.errors import ImageError, ManifestError
from stylemill.manifest import ImageRef, show_manifest, validate_manifest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("a.png", "x.png", "y.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path / "pairs.parquet"


def problems_of(file: Path, columns: dict[str, Any], **options: Any) -> list[str]:
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return [str(problem) for problem in validate_manifest(file, **options).problems]


def test_a_valid_manifest_is_summarized(file: Path) -> None:
    assert problems_of(file, {"style": ["x.png", "y.png", "x.png"], "content": ["a.png", "a.png", None]}) == []
    report = validate_manifest(file)
    assert report.ok
    assert (report.rows, report.contents, report.styles, report.rows_without_content) == (3, 1, 2, 1)
    assert str(report).endswith(
        "pairs.parquet: 3 rows, 1 unique content, 2 unique styles, 1 row without content; no problems"
    )


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("style", ["x.png", None], "is null"),
        ("style", ["x.png", ""], "is empty: neither a path nor bytes"),
        ("style", [["x.png"], []], "is an empty list; name at least one style image"),
        ("style", [["x.png"], ["x.png", None]], "item 1 is null"),
        ("style", ["x.png", "y\0.png"], "has a NUL character in its path"),
        (
            "content",
            [{"bytes": b"1", "path": None}, {"bytes": None, "path": None}],
            "is empty: neither a path nor bytes",
        ),
        ("content", ["a.png", ""], "is empty: neither a path nor bytes"),
        ("seed", [0, -1], "is -1, expected 0 to 2^63 - 1"),
        ("seed", pa.array([0, 2**63], pa.uint64()), "is 9223372036854775808, expected 0 to 2^63 - 1"),
        ("content_weight", [0.0, float("nan")], "is nan, expected a finite number, 0 or more"),
        ("content_weight", [0.0, float("inf")], "is inf, expected a finite number, 0 or more"),
        ("content_weight", [0.0, -0.5], "is -0.5, expected a finite number, 0 or more"),
        ("style_mask", [[], ["x.png", "y.png"]], "has 2 masks for 1 style; give one for each"),
        ("style_mask", [[], [None]], "has a null, an empty path or a NUL character"),
        ("content_mask", [None, ""], "is an empty path or has a NUL character"),
        ("pair_id", ["a", ""], "is empty"),
        ("pair_id", ["a", "../x"], "'../x' could be a path; use no '/', '\\', '.' or '..' as an id"),
        ("pair_id", ["a", ".."], "'..' could be a path; use no '/', '\\', '.' or '..' as an id"),
        ("pair_id", ["a", "b\\c"], "'b\\\\c' could be a path; use no '/', '\\', '.' or '..' as an id"),
        ("pair_id", ["a", "b\0c"], "'b\\x00c' has a control character"),
        ("pair_id", ["a", "b\nc"], "'b\\nc' has a control character"),
        ("pair_id", ["é" * 100, "é" * 101], f"{'é' * 40!r}… has 202 bytes, at most 200 are allowed"),
        ("pair_id", ["a", "a"], "'a' is already the id of row 0; ids must be unique"),
    ],
)
def test_every_problem_is_reported_with_row_and_column(file: Path, column: str, values: Any, problem: str) -> None:
    columns = {"style": ["x.png", "y.png"], column: values}
    assert problems_of(file, columns) == [f"row 1, column '{column}': {problem}"]


def test_all_problems_of_a_row_are_reported(file: Path) -> None:
    problems = problems_of(file, {"style": pa.nulls(1, pa.string()), "seed": [-1], "pair_id": ["a/b"]})
    assert len(problems) == 3
    assert (
        str(validate_manifest(file))
        .splitlines()[-1]
        .endswith("3 problems (pair_id 1, seed 1, style 1); rows count from 0")
    )


def test_a_missing_file_is_reported_once_at_its_first_row(file: Path) -> None:
    (file.parent / "folder").mkdir()
    columns = {"style": ["x.png", "gone.png", "gone.png", "folder", "s3://bucket/x.png", str(file.parent / "y.png")]}
    assert problems_of(file, columns) == [
        f"row 1, column 'style': {file.parent / 'gone.png'} does not exist",
        f"row 3, column 'style': {file.parent / 'folder'} is not a file",
    ]
    assert problems_of(file, columns, check_files=False) == []


def test_the_first_problems_are_returned_and_all_are_counted(file: Path) -> None:
    columns = {"style": pa.nulls(500, pa.string()), "pair_id": ["twice", "twice", *map(str, range(498))]}
    problems = problems_of(file, columns, limit=3)
    assert [problem.split(":")[0] for problem in problems] == [
        "row 0, column 'style'",
        "row 1, column 'style'",
        "row 1, column 'pair_id'",
    ]
    report = validate_manifest(file, limit=3)
    assert report.counts == {"style": 500, "pair_id": 1}
    assert "… and 498 more" in str(report)


def test_each_image_is_decoded_once_and_several_in_parallel(file: Path) -> None:
    opened: list[str] = []
    meeting = threading.Barrier(2, timeout=20)  # breaks unless two images are open at the same time

    def decode(column: str, ref: ImageRef) -> None:
        opened.append(ref.reference)
        if ref.path in ("x.png", "a.png"):
            meeting.wait()
        if ref.path == "y.png":
            raise ImageError("y.png is truncated")

    columns = {"style": ["x.png", "y.png", "y.png"], "content": ["a.png", "x.png", None]}
    assert problems_of(file, columns, decode=decode, workers=2) == ["row 1, column 'style': y.png is truncated"]
    assert sorted(opened) == ["a.png", "x.png", "y.png"]


def test_an_unexpected_error_of_decoding_is_raised(file: Path) -> None:
    def decode(column: str, ref: ImageRef) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        problems_of(file, {"style": ["x.png"]}, decode=decode)


def test_columns_with_misleading_names_give_warnings(file: Path) -> None:
    problems_of(file, {"style": ["x.png"], "contents": ["a.png"], "steps": [3], "caption": ["c"]})
    assert validate_manifest(file).warnings == (
        "column 'contents' is only carried through; did you mean 'content'?",
        "column 'steps' is only carried through: it is a setting of the job, not of a row",
    )


def test_a_missing_manifest_is_an_error_and_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        validate_manifest(tmp_path / "absent.parquet")


def test_show_describes_size_columns_rows_and_problems(file: Path) -> None:
    columns = {
        "pair_id": ["one", "two", "three"],
        "content": ["a.png", None, "a.png"],
        "style": [["x.png", "y.png"], ["x.png"], []],
        "seed": [5, None, None],
        "contents": ["", "", ""],
    }
    problems_of(file, columns)
    lines = show_manifest(file, limit=2).splitlines()
    assert "  rows            3 in 2 row groups of up to 2" in lines
    assert "  unique images   1 content, 2 styles" in lines
    assert "  contents  string: carried through to the output" in lines
    assert "     0  one  a.png × x.png + y.png  seed=5" in lines
    assert "     1  two  x.png" in lines
    assert not any("three" in line for line in lines)
    assert lines[-2].startswith("warning: column 'contents'")
    assert lines[-1] == "problems: 1; 'stylemill manifest validate' lists them"
    assert "     2  column 'style': is an empty list; name at least one style image" in show_manifest(file).splitlines()
