"""What a client does with an assignment: answer, refuse, train, reply."""
