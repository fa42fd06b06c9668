"""A Python module that layers keep a setting in."""

SHIFT = 0.0
