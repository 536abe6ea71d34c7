"""Fuzzing: bytes that nobody thought of."""
