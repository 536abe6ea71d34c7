"""Tests of ``relay/demo/``."""
