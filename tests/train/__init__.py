"""Tests of sprint/train."""
