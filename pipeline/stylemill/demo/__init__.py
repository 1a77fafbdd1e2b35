"""The embedded demo model (the data files of this folder), and writers of small untrained models for tests."""
