"""Low-rank factors of heads: which there are, where they begin, peft's files."""
