"""Encoders by family; a builder function is found by its name."""
