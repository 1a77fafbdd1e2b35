"""Reports on a run: its status, a summary of its records and the contact sheet."""
