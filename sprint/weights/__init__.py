"""A model on disk: weights in, weights out, proved equal."""
