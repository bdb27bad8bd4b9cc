"""Tests of sprint/recipe."""
