"""Tests of sprint/train/report."""
