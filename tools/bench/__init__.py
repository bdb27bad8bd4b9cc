"""Speed, memory, FLOPs and precision, measured as ratios in one run."""
