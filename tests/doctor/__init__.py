"""Tests of sprint.doctor."""
