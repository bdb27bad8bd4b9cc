"""Tests of tools/rehearsal."""
