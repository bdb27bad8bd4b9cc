"""Tests of sprint/data/encode."""
