"""Tests of sprint/data."""
