"""One short file per strategy; each only decides who runs what."""
