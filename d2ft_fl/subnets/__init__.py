"""The vocabulary: which slice of which parameter is whose, and what it does in a round."""
