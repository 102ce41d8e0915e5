"""Responses to files and figures."""
