"""Run folders on an object store: requests, paths, the lock, uploads."""
