"""Failpoints: where a test makes a process fail."""
