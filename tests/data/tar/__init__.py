"""Tests of sprint/data/tar."""
