"""Tests of sprint/models/sana."""
