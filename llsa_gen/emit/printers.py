"""Sizes of the plan as host code: what the filters `py` and `sym` of the templates print."""

import jinja2
import sympy
from sympy.printing.pycode import PythonCodePrinter

from llsa_gen.plan import Plan
from llsa_gen.plan.sizes import replaced


class HostPrinter(PythonCodePrinter):
    """Prints sizes as host code: `ceil_div(m_tokens, 256)`, tile shapes looked up in the schedule entry `tile`."""

    smaller = "min"

    def _print_Symbol(self, expr: sympy.Symbol) -> str:  # noqa: N802
        return f'tile["{expr.name}"]' if expr.name.isupper() else expr.name

    def _print_ceiling(self, expr: sympy.ceiling) -> str:
        numerator, divisor = sympy.fraction(expr.args[0])
        return f"ceil_div({self._print(numerator)}, {self._print(divisor)})"

    def _print_floor(self, expr: sympy.floor) -> str:
        numerator, divisor = sympy.fraction(expr.args[0])
        return f"(({self._print(numerator)}) // {self._print(divisor)})"  # a quotient binds no tighter than a product

    def _print_Min(self, expr: sympy.Min) -> str:  # noqa: N802
        *rest, last = [self._print(arg) for arg in sorted(expr.args, key=str)]
        return "".join(f"{self.smaller}({arg}, " for arg in rest) + last + ")" * len(rest)


class SymbolicPrinter(HostPrinter):
    """The same for lengths that may be symbols of torch.compile: `min` would ask which is the smaller, a guard each."""

    smaller = "torch.sym_min"


@jinja2.pass_context
def python(context: jinja2.runtime.Context, expr: sympy.Expr | int) -> str:
    """An expression of the plan as host code, in which `queries[l]` is T_l(M) and `keys[l]` is T_l(N)."""
    return printed(context["plan"], expr, HostPrinter())


@jinja2.pass_context
def symbolic(context: jinja2.runtime.Context, expr: sympy.Expr | int) -> str:
    """The same where lengths may be symbols of torch.compile."""
    return printed(context["plan"], expr, SymbolicPrinter())


def printed(plan: Plan, expr: sympy.Expr | int, printer: HostPrinter) -> str:
    """An expression of the plan as a printer has it."""
    named = {
        tokens(level): sympy.Symbol(f"{name}[{level}]", integer=True, nonnegative=True)
        for name, tokens in (("queries", plan.query_tokens), ("keys", plan.key_tokens))
        for level in plan.levels
    }
    return str(printer.doprint(replaced(expr, named))).replace("*", " * ").replace("*  *", "**")
