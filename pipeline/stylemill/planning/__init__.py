"""Planning: manifest rows to shards, the fingerprint of a run, its cost. Writes nothing."""
