"""Tests of sprint/evaluate/search."""
