"""Operators that act on each element: every position broadcasts to the output."""

from __future__ import annotations

from shardwise.graph.dims import Size
from shardwise.graph.rules import order
from shardwise.graph.rules.context import OpContext, Operand
from shardwise.graph.rules.table import rule, rules

UNARY = [
    "abs", "acos", "asin", "atan", "atanh", "asinh", "acosh", "ceil", "cos", "cosh", "erf", "erfc", "exp", "exp2",
    "expm1", "floor", "log", "log10", "log1p", "log2", "logical_not", "bitwise_not", "not_", "reciprocal", "relu",
    "relu6", "round", "rsqrt", "sigmoid", "sign", "silu", "sin", "sinh", "softplus", "sqrt", "square", "tan", "tanh",
    "trunc", "frac", "gelu", "elu", "celu", "selu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "mish",
    "log_sigmoid", "softsign", "threshold", "clamp", "clamp_min", "clamp_max", "clip", "isnan", "isinf", "isfinite",
    "nan_to_num", "logit", "lgamma", "digamma", "special_erf", "glu_", "hardshrink", "softshrink", "tanhshrink",
    "isneginf", "isposinf",
]  # fmt: skip

BINARY = [
    "atan2", "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum", "pow", "fmod",
    "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift",
    "bitwise_right_shift", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "fmax", "fmin", "hypot",
    "where", "masked_fill", "lerp", "addcmul", "addcdiv", "xlogy", "prelu_", "isclose", "logaddexp", "copysign",
    "copy", "fill", "masked_fill_",
]  # fmt: skip

LINEAR_UNARY = [
    "neg", "clone", "contiguous", "_to_copy", "to", "detach", "alias", "lift_fresh_copy", "positive",
    "real", "_to_dense", "conj", "resolve_conj", "resolve_neg",
]  # fmt: skip


@rules(UNARY + BINARY)
def pointwise(c: OpContext) -> None:
    c.elementwise(c.inputs)


@rules(["floor_divide", "remainder"])
def whole_division(c: OpContext) -> None:
    c.elementwise(c.inputs)
    if len(c.inputs) == 1:
        divided_rows(c, c.node_name() == "aten.remainder")


def divided_rows(c: OpContext, rest: bool) -> None:
    """Numbers of rows become numbers of groups of rows, or places in these, where ranks have whole groups."""
    x, by = c.inputs[0], c.arguments.get("other")
    meaning = c.rows.means.get(x.slot)
    if meaning is None or meaning.kind != order.NUMBERS or not isinstance(by, int) or by < 1:
        return
    each = meaning.each * by
    groups = x.value.numel().divide(each)
    if x.ndim != 1 or groups is None or c.inputs[1:]:
        return
    c.only_major(x, 0, groups)
    c.only_major(c.out, 0, groups)
    if not rest:
        c.rows.means[c.out.slot] = meaning._replace(each=each)
    elif not meaning.each.one:
        return
    order.arrange_as(c, c.out, 0, x)
    c.rows.followed = True


@rules(LINEAR_UNARY)
def pointwise_linear(c: OpContext) -> None:
    c.elementwise(c.inputs[:1])
    c.linear_in(c.inputs[0])


@rules(["add", "sub", "rsub"])
def addition(c: OpContext) -> None:
    c.elementwise(c.inputs)
    # Adding a number to a partial sum would add it once per rank.
    if len(c.inputs) == 2:
        c.linear_in(c.inputs)


@rules(["mul", "div", "true_divide"])
def multiplication(c: OpContext) -> None:
    c.elementwise(c.inputs)
    if c.arguments.get("rounding_mode") is not None:
        divided_rows(c, rest=False)
        return
    first_only = c.node_name().startswith(("aten.div", "aten.true_divide")) or len(c.inputs) == 1
    c.linear_in(*(c.inputs[:1] if first_only else c.inputs))


@rules(["polar", "complex"])
def complex_of(c: OpContext) -> None:
    c.elementwise(c.inputs)
    if c.node_name() == "aten.complex":
        c.linear_in(c.inputs)


@rules(["view_as_complex", "view_as_real", "view_as_real_copy", "view_as_complex_copy"])
def pairs(c: OpContext) -> None:
    """Complex numbers as pairs of real ones in a last dim of two, and back."""
    x = c.inputs[0]
    for i in range(min(x.ndim, c.out.ndim)):
        c.tie(x, i, c.out, i)
    c.linear_in(x)


@rules(["_fft_c2c", "_fft_r2c", "_fft_c2r"])
def fourier(c: OpContext) -> None:
    x = c.inputs[0]
    c.same(x, c.out, but=[int(d) for d in c.arguments["dim"]])
    c.linear_in(x)


@rules(["prelu", "_prelu_kernel"])
def prelu(c: OpContext) -> None:
    x, weight = c.inputs
    c.same(x, c.out)
    if weight.ndim == 1:
        if x.ndim > 1 and not weight.size(0).one:
            c.tie(weight, 0, x, 1)
    else:
        c.elementwise([weight])


@rules(["glu"])
def glu(c: OpContext) -> None:
    x = c.the("self")
    dim = int(c.arguments.get("dim", -1)) % x.ndim
    c.same(x, c.out, but=[dim])
    c.tie_products([(x, dim)], [(c.out, dim)], skip_left=Size(2))
    c.special(c.out, dim, "glu")


@rule("aten.broadcast_tensors")
def broadcast_tensors(c: OpContext) -> None:
    for out in c.outputs:
        c.elementwise(c.inputs, out)
        c.same(c.outputs[0], out)


@rules(["full_like", "zeros_like", "ones_like", "empty_like"])
def like(c: OpContext) -> None:
    c.elementwise(c.inputs)


@rules(["zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"])
def constant(c: OpContext) -> None:
    c.size_args["size"] = c.out.slot
    for pos in range(c.out.ndim):
        c.fresh(c.out, pos)


@rule("aten.arange")
def arange(c: OpContext) -> None:
    c.fresh(c.out, 0)
    c.special(c.out, 0, "arange")


@rules(["eye", "tril_indices", "triu_indices", "linspace"])
def whole(c: OpContext) -> None:
    """Runs whole on every rank: small tables of numbers."""


@rules(["tril", "triu"])
def triangle(c: OpContext) -> None:
    x = c.the("self")
    c.same(x, c.out, but=[-1, -2])
    c.linear_in(x)


@rules(["softmax", "_softmax", "log_softmax", "_log_softmax", "softmin"])
def softmax(c: OpContext) -> None:
    x = c.inputs[0]
    c.same(x, c.out, but=[int(c.arguments["dim"])])


@rules(["sort", "argsort"])
def sort(c: OpContext) -> None:
    """Rows are sorted wherever they are; of several dims, those besides the sorted one are tied."""
    x = c.inputs[0]
    if x.ndim == 1:
        order.sort(c, x, c.outputs[0] if c.outputs[1:] else None, c.outputs[-1], not c.arguments.get("descending"))
        return
    for out in c.outputs:
        c.same(x, out, but=[int(c.arguments.get("dim", -1))])


@rule("shardwise.inverse")
def inverse(c: OpContext) -> None:
    x = c.inputs[0]
    c.tie(x, 0, c.out, 0)
    meaning = c.rows.means.get(x.slot)
    if meaning is None or meaning.kind != order.NUMBERS or not meaning.each.one:
        c.block(x, 0)
        return
    c.rows.means[c.out.slot] = order.Meaning(order.NUMBERS, meaning.into, meaning.order)
    if meaning.into is not None:
        c.rows.orders[c.out.slot, 0] = meaning.into
    c.rows.followed = True


@rules(["histc"])
def histogram(c: OpContext) -> None:
    """Between given bounds; of whole numbers, with a bin for each of 0, 1, 2, ..., it counts these."""
    x, low, high = c.inputs[0], c.arguments.get("min", 0), c.arguments.get("max", 0)
    if low == high:
        return
    for pos in range(x.ndim):
        c.sum_over(x, pos)
    whole_numbers = not c.rows.source(x.value).dtype.is_floating_point
    if x.ndim == 1 and low == 0 and high == c.out.size(0).coefficient - 1 and whole_numbers:
        order.count(c, x, c.out)


@rules(["cumsum", "cumprod", "logcumsumexp", "flip", "roll", "topk", "cummax", "diff", "kthvalue"])
def along(c: OpContext) -> None:
    x = c.inputs[0]
    spec = c.arguments.get("dims", c.arguments.get("dim", -1))
    listed = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    if c.node_name() == "aten.roll" and not listed:
        listed = list(range(x.ndim))
    for out in c.outputs:
        c.same(x, out, but=[int(d) for d in listed])
    for other in c.inputs[1:]:
        c.same(x, other, but=[int(d) for d in listed])
    if c.node_name() in ("aten.cumsum", "aten.flip", "aten.roll"):
        c.linear_in(x)
    meaning = c.rows.means.get(x.slot)
    if c.node_name() == "aten.cumsum" and x.ndim == 1 and meaning is not None and meaning.kind == order.COUNTS:
        c.rows.means[c.out.slot] = meaning._replace(kind=order.ENDS)


@rules(["logsumexp", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "var", "std", "norm",
        "linalg_vector_norm", "median", "count_nonzero", "var_mean", "std_mean", "mode"])  # fmt: skip
def reduction(c: OpContext) -> None:
    if len(c.inputs) == 2:
        c.elementwise(c.inputs)
        return
    x = c.inputs[0]
    reduced = c.reduced(x)
    for out in c.outputs:
        c.keep(x, out, reduced)


@rules(["sum", "mean"])
def summation(c: OpContext) -> None:
    x = c.inputs[0]
    reduced = c.reduced(x)
    c.keep(x, c.out, reduced)
    for pos in reduced:
        c.sum_over(x, pos, "mean" if c.node_name() == "aten.mean" else "")
    c.linear_in(x)


@rule("shardwise.dropout")
def dropout(c: OpContext) -> None:
    x: Operand = c.inputs[0]
    c.same(x, c.out)
    for pos in range(x.ndim):
        c.special(x, pos, "random")


@rules(["uniform", "normal"], prefix="shardwise.")
def random(c: OpContext) -> None:
    c.size_args["size"] = c.out.slot
    for pos in range(c.out.ndim):
        c.fresh(c.out, pos)
        c.special(c.out, pos, "random")
