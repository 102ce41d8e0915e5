"""Formats of weights on disk."""
