"""Latents and embedded text in shards, read."""
