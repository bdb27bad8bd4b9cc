"""sprint: distil a flow-matching image model into one that samples in 1 to 4 steps."""

__version__ = "0.1.0"
