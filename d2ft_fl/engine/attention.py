"""Which of torch's attention kernels runs."""


def fused_attention(device: str, head_dim: int, dropout: float) -> bool:
    """Whether torch's fused attention is taken: 5 products in its backward pass, else 4.

    On a CPU it knows no dropout; on CUDA it pads other widths than multiples of 8, so that the
    plain path is asked for there.
    """
    return dropout == 0 if device == "cpu" else head_dim % 8 == 0
