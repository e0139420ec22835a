"""Smaller networks: what to remove, and removing it."""
