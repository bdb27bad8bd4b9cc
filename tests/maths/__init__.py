"""Tests of sprint/maths."""
