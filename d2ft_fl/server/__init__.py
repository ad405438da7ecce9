"""The server's side of a run: the loop of rounds, replies, checkpoints, the record."""
