"""Benchmarks that ship with the project: ``d2ft bench step``, ``planner`` and ``scale``."""
