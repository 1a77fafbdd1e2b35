"""Manifests: the Parquet tables of pairs that jobs process."""

from stylemill.manifest.build import build_manifest
from stylemill.manifest.read import Manifest, open_manifest
from stylemill.manifest.schema import KNOWN_COLUMNS, OUTPUT_COLUMNS, ImageRef, Problem, Row
from stylemill.manifest.show import show_manifest
from stylemill.manifest.validate import ValidationReport, validate_manifest

__all__ = [
    "KNOWN_COLUMNS",
    "OUTPUT_COLUMNS",
    "ImageRef",
    "Manifest",
    "Problem",
    "Row",
    "ValidationReport",
    "build_manifest",
    "open_manifest",
    "show_manifest",
    "validate_manifest",
]
