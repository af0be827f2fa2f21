"""Bundles: all that a target needs of an artifact, and nothing of the machine that made it."""
