"""The options of a run as plain data, and the files and pairs they are read from."""
