"""Tests of sprint/sample."""
