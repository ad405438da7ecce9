"""What is learnt: loss, weights and metrics of a model's outputs."""
