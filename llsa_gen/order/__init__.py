"""Token orders that keep neighbours together, since attention pools consecutive tokens: docs/orders.md."""

from llsa_gen.order.grids import compactness, grid
from llsa_gen.order.measure import Compactness
from llsa_gen.order.sequence import Order, Ordered, from_codes

__all__ = ["Compactness", "Order", "Ordered", "compactness", "from_codes", "grid"]
