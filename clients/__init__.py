"""Ways a client fine-tunes what it was assigned. None contains a training loop of its own."""
