"""Tunings: what of an assigned model trains, and how. None has a training loop of its own."""
