"""Planning a run: shards, models, fingerprint and cost. Writes nothing to the run folder."""
