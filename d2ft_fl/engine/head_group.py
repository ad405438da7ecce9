"""A head group: heads of one branch that run alike in neighbouring slots.

The engine runs a head group as one narrower branch: its products in, its middle, and its product
out have the columns of these heads alone. FULL and FROZEN heads run alike, forward and backward;
only gradients of weights are made for the former alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.product import Product, ProductFactors, View, views_of
from d2ft_fl.engine.product_out import ProductOut
from d2ft_fl.engine.products_in import ProductsIn

Slots = tuple[int, int]  # from which slot to before which


@dataclass
class FullPart:
    """Heads of a head group that are FULL in some of its slots.

    Attributes:
        heads: Which.
        slots: In which slots.
        inward: Their runs of rows of each product in, among the head group's columns.
        outward: Those of the product out.
        overwrite: Whether gradients replace those that are there; see ``Branch.settle``.
    """

    heads: tuple[int, ...]
    slots: Slots
    inward: list[list[View]]
    outward: list[View]
    overwrite: bool = False


class HeadGroup:
    """The products of some heads of one branch.

    Args:
        store: The block's slices.
        inward: Modules of the products in.
        outward: Module of the product out.
        heads: Which heads, in storage order.
        slots: In which slots.
        full: What of it is FULL: slots and heads.
        factors: Product -> its LoRA factors.

    Attributes:
        parts: What of it is FULL.
        depth: Columns of what goes into the product out.
    """

    def __init__(
        self,
        store: PackedHeads,
        inward: Sequence[str],
        outward: str,
        heads: tuple[int, ...],
        slots: Slots,
        full: Sequence[tuple[int, int, tuple[int, ...]]],
        factors: Mapping[str, ProductFactors],
    ):
        self.heads, self.slots = heads, slots

        def views(role: str, chosen: tuple[int, ...], factored: bool) -> list[View]:
            return views_of(store, role, chosen, heads, factors.get(role) if factored else None)

        def product(role: str) -> Product:
            with_factors = [v for v in views(role, heads, True) if v.near is not None]
            return Product(role, views(role, heads, False), with_factors, factors.get(role))

        self.parts = [
            FullPart(
                of,
                (start, stop),
                [views(role, of, True) for role in inward],
                views(outward, of, True),
            )
            for start, stop, of in full
        ]
        products, last = [product(role) for role in inward], product(outward)
        trains = bool(self.parts)
        self.inward, self.outward = ProductsIn(products, trains), ProductOut(last, trains)
        self.depth = last.width

    @property
    def mixed(self) -> bool:
        """Whether only some of it is FULL."""
        return [(part.slots, part.heads) for part in self.parts] != [(self.slots, self.heads)]
