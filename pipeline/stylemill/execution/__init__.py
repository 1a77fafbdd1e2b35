"""Execution of a planned job: the driver, the stages of one shard, the local executor, retry and repair."""
