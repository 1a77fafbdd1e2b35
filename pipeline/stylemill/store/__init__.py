"""The run folder: the only part that decides what is done. Local disks so far; no torch, no ray."""
