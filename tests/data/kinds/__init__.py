"""Tests of sprint/data/kinds."""
