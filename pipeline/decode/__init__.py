"""Decoders: one protocol, one file per backend."""
