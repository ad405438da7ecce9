"""Pages, charts and tables of runs and sweeps; units, labels and words (``format``)."""
