"""Tests of the CRI services."""
