"""Sana: presets, names of its weights, its blocks, its memory of a text."""
