"""The ``d2ft`` command: one file a group of commands, and what they print."""
