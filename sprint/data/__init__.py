"""From positions to samples to batches."""
