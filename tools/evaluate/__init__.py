"""Evaluators: one benchmark per file, found by its module name."""
