"""How tensors travel: blobs, quantization, sizes, the client's parameter cache."""
