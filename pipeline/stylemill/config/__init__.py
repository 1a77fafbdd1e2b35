"""The job file and its settings: sampling and presets, schedulers, model, inputs. Imports no torch."""
