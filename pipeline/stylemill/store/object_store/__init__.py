"""A run folder on an object store: requests, bucket, paths, lock, reads and uploads."""
