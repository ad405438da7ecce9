"""Planning without training: ``d2ft plan`` and ``d2ft choose``."""
