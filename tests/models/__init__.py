"""Tests of sprint/models."""
