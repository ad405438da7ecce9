"""The grid of whole numbers on which updates are summed: int64 fixed point."""

SUM_BITS = 62  # of int64, that a sum may take; noise may take as many
FRACTION_BITS = 36  # at most, of these: it resolves 1.5e-11
CHANGE_BITS = 6  # at least: changes up to 64 can be summed, whatever the number of examples


def fraction_bits(examples: int) -> int:
    """Return how many bits of a sum are fractions.

    Args:
        examples: Examples that all updates together can count.
    """
    return min(FRACTION_BITS, SUM_BITS - CHANGE_BITS - examples.bit_length())
