"""What a user configures: the job file, sampling settings and presets, schedulers, input limits. Imports no torch."""
