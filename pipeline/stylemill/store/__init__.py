"""The run folder, on a disk or an object store: only this package decides what is committed. No torch, no ray."""
