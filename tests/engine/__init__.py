"""Tests of sprint/engine."""
