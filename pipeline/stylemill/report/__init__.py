"""What a run has made, to look at."""
