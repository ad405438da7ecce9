"""What a client can afford in a round, and where that is known from."""
