"""Bytes of an element in memory and on the wire, and of what a message has beside elements."""

ELEMENT = 4  # of a float32
TENSOR_HEADER = 160  # bytes that name, shape and place of one tensor take on the wire, at most
RANK_BYTES = 2  # of a subnet's rank, in binary
MESSAGE_HEADER = 2048  # bytes a message takes beside tensors and schedule, at most
