"""The edits of Python code, by rule.

An edit replaces the text of one node of the syntax tree. Strings are not edited, nor is code that no result depends on:
docstrings, annotations, decorators, `raise` and `assert` with their messages, help texts, `if TYPE_CHECKING`, and
`if __name__ == "__main__"`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

from tests.mutants.base import Mutant, numbered

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
NAMES = {
    "min": "max", "any": "all", "floor": "ceil", "amin": "amax", "argmin": "argmax", "minimum": "maximum",
    "clamp_min": "clamp_max", "bisect_left": "bisect_right", "zeros_like": "ones_like", "zeros": "ones",
}  # fmt: skip
SWAPS = NAMES | {new: old for old, new in NAMES.items()}
# "unwrap" replaces a call by its first argument or by the object of a method, except for these functions.
NOT_UNWRAPPED = {
    "str", "list", "tuple", "dict", "set", "iter", "next", "len", "range", "print", "isinstance", "getattr", "hasattr",
    "super", "type", "enumerate", "zip", "map", "filter", "open", "repr", "int", "float", "bool",
}  # fmt: skip
UNWRAPPED_METHODS = {
    "clamp", "clamp_min", "clamp_max", "detach", "abs", "masked_fill", "flip", "strip", "lstrip", "rstrip", "lower",
    "upper", "casefold", "sqrt", "exp", "log", "square", "resolve", "float", "double", "log_softmax", "softmax",
    "removeprefix", "removesuffix", "transpose", "expanduser", "t", "mean",
}  # fmt: skip
# Keywords whose values are texts for people, enable checks that hold anyway, or have no effect without a GPU.
WORDING = {
    "help", "metavar", "description", "epilog", "prog", "formatter_class", "usage", "desc", "unit", "leave", "delay",
    "dynamic_ncols", "bar_format", "strict", "device", "pin_memory", "non_blocking",
}  # fmt: skip
DEFAULTS = {"allow_pickle": False}  # keywords with NumPy's own default: dropping them changes nothing
LONG = 8  # elements; longer tables are data, where tests need not cover each row
UNTOUCHED = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)


def python_mutants(source: str, file: str) -> list[Mutant]:
    """Every mutant of a Python source; `file` is its path."""
    return numbered(list(_Walk(source, file).mutants()))


class _Walk:
    def __init__(self, source: str, file: str):
        self.source, self.file = source, file
        self.tree = ast.parse(source)
        self.offsets = [0]
        for line in source.encode().splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.raw = source.encode()

    def mutants(self) -> Iterator[Mutant]:
        yield from self.visit(self.tree, [])

    def visit(self, node: ast.AST, path: list[ast.AST]) -> Iterator[Mutant]:
        if isinstance(node, UNTOUCHED) or _is_left_out(node):
            return
        for rule, new in edits(node, path):
            if ast.dump(new) != ast.dump(node) and (mutant := self.mutant(node, new, rule, path)):
                yield mutant
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.visit(child, [*path, node])

    def mutant(self, node: ast.AST, new: ast.AST, rule: str, path: list[ast.AST]) -> Mutant | None:
        """The mutant that replaces `node` by `new`; a node inside an f-string replaces the whole f-string."""
        anchor = next((x for x in path if isinstance(x, ast.JoinedStr)), node)
        start, end = (self.offset(*at) for at in _span(anchor))
        before = self.raw[start:end].decode()
        after = ast.unparse(new if anchor is node else _replaced(anchor, node, new))
        if isinstance(anchor, ast.expr) and not _needs_no_brackets(anchor, path):
            after = f"({after})"
        if isinstance(anchor, ast.stmt):
            after = after.replace("\n", "\n" + " " * anchor.col_offset)
        if after in (before, f"({before})"):
            return None
        name = ".".join(x.name for x in path if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)))
        at = len(self.raw[:start].decode())
        return Mutant(self.file, anchor.lineno, name, rule, before, after, at)

    def offset(self, line: int, column: int) -> int:
        return self.offsets[line - 1] + column


def _span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _replaced(tree: ast.AST, node: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of the tree with `node` replaced by `new`."""
    memo = {id(node): new}
    return copy.deepcopy(tree, memo)


def _needs_no_brackets(node: ast.expr, path: list[ast.AST]) -> bool:
    """Whether an expression needs no brackets at its position."""
    parent = path[-1] if path else None
    if isinstance(node, (ast.Constant, ast.Name, ast.Call, ast.JoinedStr, ast.List, ast.Set, ast.Dict)):
        return not isinstance(parent, ast.Attribute)
    simple = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.If, ast.While, ast.keyword)
    return isinstance(parent, simple)


def _is_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        return test.endswith("TYPE_CHECKING") or test.startswith("__name__")
    if isinstance(node, ast.keyword):
        return node.arg in WORDING
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return isinstance(target, ast.Name) and target.id.startswith("__")
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring


# ---------------------------------------------------------------------------------------------------------- edits


def edits(node: ast.AST, path: list[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Yield (rule, replacement node)."""
    for kind, rule in RULES:
        if isinstance(node, kind):
            yield from rule(node, path)


def _with(node: ast.AST, **fields) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _comparison(node: ast.Compare, _path) -> Iterator[tuple[str, ast.AST]]:
    for i, op in enumerate(node.ops):
        yield "comparison", _with(node, ops=[*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]])


def _arithmetic(node: ast.BinOp | ast.AugAssign, _path) -> Iterator[tuple[str, ast.AST]]:
    operands = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    if type(node.op) in ARITHMETIC and not any(_is_text(x) for x in operands):
        yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def _unary(node: ast.UnaryOp, _path) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.op, ast.Not):
        yield "not", node.operand
    elif isinstance(node.op, (ast.USub, ast.Invert)):
        yield "sign", node.operand


def _constant(node: ast.Constant, path) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    rule = "default" if _is_default(node, path) else "constant"
    if isinstance(value, bool):
        yield rule, ast.Constant(not value)
    elif isinstance(value, int):
        near = [value + 1, value - 1] if value in range(1, 100) else [1] if value == 0 else [2 * value]
        yield from ((rule, ast.Constant(n)) for n in near)
    elif isinstance(value, float):
        yield rule, ast.Constant(2 * value if value else 1.0)


def _is_default(node: ast.AST, path: list[ast.AST]) -> bool:
    """Whether a constant is the default of an argument or of a dataclass field."""
    parent = path[-1]
    if isinstance(parent, ast.AnnAssign):
        return len(path) > 1 and isinstance(path[-2], ast.ClassDef)
    return isinstance(parent, ast.arguments)


def _logic(node: ast.BoolOp, _path) -> Iterator[tuple[str, ast.AST]]:
    yield "logic", _with(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    for i in range(len(node.values)):
        rest = [*node.values[:i], *node.values[i + 1 :]]
        yield "operand", rest[0] if len(rest) == 1 else _with(node, values=rest)


def _forced(node: ast.expr, path) -> Iterator[tuple[str, ast.AST]]:
    """Force a condition to True or False."""
    parent = path[-1] if path else None
    if isinstance(parent, (ast.If, ast.IfExp)) and node is parent.test:
        yield from (("condition", ast.Constant(value)) for value in (True, False))
    elif isinstance(parent, ast.While) and node is parent.test:
        yield "condition", ast.Constant(False)
    elif isinstance(parent, ast.comprehension) and node in parent.ifs:
        yield "condition", ast.Constant(True)


def _deletion(node: ast.stmt, path) -> Iterator[tuple[str, ast.AST]]:
    call = isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Yield, ast.YieldFrom))
    kept = isinstance(node, ast.Assign) and all(isinstance(x, (ast.Attribute, ast.Subscript)) for x in node.targets)
    if call or kept or isinstance(node, (ast.AugAssign, ast.Break, ast.Continue)):
        yield "deletion", ast.Pass()


def _call(node: ast.Call, path) -> Iterator[tuple[str, ast.AST]]:
    for i, keyword in enumerate(node.keywords):
        if keyword.arg not in WORDING and not _is_written_default(keyword):
            yield "keyword", _with(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in SWAPS:
        field = "attr" if isinstance(function, ast.Attribute) else "id"
        yield "swap", _with(node, func=_with(function, **{field: SWAPS[name]}))
    if path and isinstance(path[-1], (ast.Expr, ast.withitem)):
        return  # its result is not used
    if isinstance(function, ast.Attribute) and name in UNWRAPPED_METHODS and _is_value(function.value):
        yield "unwrap", function.value
    elif _may_be_unwrapped(node, name):
        yield "unwrap", node.args[0]


def _is_written_default(keyword: ast.keyword) -> bool:
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return keyword.arg in DEFAULTS and value is DEFAULTS[keyword.arg]


def _is_value(node: ast.AST) -> bool:
    return not (isinstance(node, ast.Name) and node.id in ("torch", "np", "math", "F", "nn", "os", "module"))


def _may_be_unwrapped(node: ast.Call, name: str) -> bool:
    first = node.args[0] if node.args else None
    function = isinstance(node.func, ast.Name) and not name[:1].isupper() and name not in NOT_UNWRAPPED
    return function and isinstance(first, (ast.Call, ast.Name, ast.Attribute, ast.Subscript, ast.BinOp))


def _bound(node: ast.expr, path) -> Iterator[tuple[str, ast.AST]]:
    parent = path[-1] if path else None
    if isinstance(parent, ast.Slice) and not isinstance(node, (ast.Constant, ast.UnaryOp)):
        if node is parent.lower:
            yield "slice", ast.BinOp(node, ast.Add(), ast.Constant(1))
        elif node is parent.upper:
            yield "slice", ast.BinOp(node, ast.Sub(), ast.Constant(1))


def _returned(node: ast.Return, path) -> Iterator[tuple[str, ast.AST]]:
    # None is taken for False wherever a truth value is expected; the rule for constants makes it True.
    value = node.value.value if isinstance(node.value, ast.Constant) else node.value
    if value is not None and value is not False:
        yield "return", ast.Return(ast.Constant(None))
    if isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1:
        first = node.value.elts[0]
        yield "return", ast.Return(ast.Tuple([first] * len(node.value.elts), ast.Load()))


def _element(node: ast.List | ast.Set | ast.Tuple | ast.Dict, path) -> Iterator[tuple[str, ast.AST]]:
    """Drop one element of a list, a set, a mapping, or a tuple of constants."""
    if len(node.keys if isinstance(node, ast.Dict) else node.elts) > LONG:
        return
    if isinstance(node, ast.Dict):
        for i in range(len(node.keys)):
            yield (
                "element",
                _with(
                    node, keys=[*node.keys[:i], *node.keys[i + 1 :]], values=[*node.values[:i], *node.values[i + 1 :]]
                ),
            )
        return
    if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load) or len(node.elts) < 2:
        return
    if isinstance(node, ast.Tuple) and not all(isinstance(x, (ast.Constant, ast.Attribute)) for x in node.elts):
        return
    for i in range(len(node.elts)):
        yield "element", _with(node, elts=[*node.elts[:i], *node.elts[i + 1 :]])


RULES = (
    (ast.Compare, _comparison),
    ((ast.BinOp, ast.AugAssign), _arithmetic),
    (ast.UnaryOp, _unary),
    (ast.Constant, _constant),
    (ast.BoolOp, _logic),
    (ast.expr, _forced),
    (ast.stmt, _deletion),
    (ast.Call, _call),
    (ast.expr, _bound),
    (ast.Return, _returned),
    ((ast.List, ast.Set, ast.Tuple, ast.Dict), _element),
)
