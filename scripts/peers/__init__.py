"""What runs in the environments of `scripts/compare_peers.py`."""
