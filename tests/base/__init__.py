"""Tests of sprint/base."""
