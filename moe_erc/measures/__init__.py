"""Measures: one record each, and `registry.py`, the table of them all."""
