"""Tests of sprint/evaluate."""
