"""A head group: heads of one branch that do the same in neighbouring slots.

The engine runs a head group as one narrower branch: its products in, its middle, and its product
out have the columns of these heads alone.
"""

from collections.abc import Iterable, Mapping, Sequence

from d2ft_fl.engine.packed_heads import PackedHeads
from d2ft_fl.engine.product import GradientRule, Product, ProductFactors
from d2ft_fl.engine.product_out import ProductOut
from d2ft_fl.engine.products_in import ProductsIn


class HeadGroup:
    """The products of some heads of one branch.

    Args:
        store: The block's slices.
        inward: Modules of the products in.
        outward: Module of the product out.
        heads: Which heads.
        slots: From which slot to before which.
        full: Whether what trains of their weights gets gradients.
        factors: Product -> its LoRA factors.

    Attributes:
        gradients: What becomes of gradients of the weights, of all products alike.
        depth: Columns of what goes into the product out.
    """

    def __init__(
        self,
        store: PackedHeads,
        inward: Sequence[str],
        outward: str,
        heads: Iterable[int],
        slots: tuple[int, int],
        full: bool,
        factors: Mapping[str, ProductFactors],
    ):
        chosen = set(heads)
        self.heads = tuple(h for h in store.order if h in chosen)
        self.slots, self.gradients = slots, GradientRule(full)
        self.products = [
            Product.of(store, module, self.heads, self.gradients, factors.get(module))
            for module in (*inward, outward)
        ]
        self.inward = ProductsIn(self.products[:-1])
        self.outward = ProductOut(self.products[-1])
        self.depth = self.products[-1].width

    @property
    def full(self) -> bool:
        """Whether what trains of the weights gets gradients."""
        return self.gradients.wanted
