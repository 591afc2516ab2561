"""Holds what runs in the environments of `scripts/compare_peers.py`."""
