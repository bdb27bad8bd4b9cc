"""Tests of sprint/train/plan."""
