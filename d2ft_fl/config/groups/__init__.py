"""The options of a run, one dataclass a group; :class:`.RunConfig` inherits from all of them."""
