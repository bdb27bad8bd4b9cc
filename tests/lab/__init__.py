"""Tests of sprint/lab."""
