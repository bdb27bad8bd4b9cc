"""Tests of tools/chaos."""
