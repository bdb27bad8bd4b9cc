"""Tests of sprint/data/cache."""
