"""Tests against real architectures."""
