"""The embedded model (the data files of this folder), and what writes small untrained models for tests."""
