"""Tests of tools/ablations."""
