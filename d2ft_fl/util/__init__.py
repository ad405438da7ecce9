"""Tools that know nothing of this project: files, TOML, plug-ins, devices, numba."""
