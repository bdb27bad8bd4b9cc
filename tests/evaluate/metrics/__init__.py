"""Tests of sprint/evaluate/metrics."""
