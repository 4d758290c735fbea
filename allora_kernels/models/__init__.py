"""Adapters on a whole model: where they go, how they are saved, loaded and merged."""
