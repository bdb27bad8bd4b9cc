"""Tests of sprint/weights."""
