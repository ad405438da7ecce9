"""Partial execution: runs and trains the assigned heads of any described model."""
