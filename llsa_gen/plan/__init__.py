"""The plan: levels, sizes, buffers and kernels of a spec, and what follows from them by counting.

`cost` and `growth` count; they are imported by themselves.
"""

from llsa_gen.plan.buffers import Buffer, Role
from llsa_gen.plan.plan import Kernel, Plan, Scalar, lower

__all__ = ["Buffer", "Kernel", "Plan", "Role", "Scalar", "lower"]
