"""Tests of sprint/cli."""
