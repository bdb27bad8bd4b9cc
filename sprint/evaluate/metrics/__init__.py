"""One file for each figure, and what it counts with."""
