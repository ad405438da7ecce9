"""What a run learns: batches, the loss, and the figures by which a model is judged."""
