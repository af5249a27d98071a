"""The edits of C++ code, by rule, and mutant schemata, which hold many edits in one build.

An edit replaces the text of one node of tree-sitter's syntax tree. In a schema, each edited expression becomes
`(LAS_MUTANT(n) ? edited : original)`, and each deleted statement runs unless its mutant is enabled. So constant
expressions cannot be edited: template arguments, constexpr, array sizes, static_assert. `constants` counts these edits.

Code that affects no result is not edited:
- strings and the other arguments of a TORCH_CHECK's message;
- prefetching, `madvise` and `asm` without an instruction, and the conditions, numbers and addresses that only they use;
- the grain of at::parallel_for, which says how the work is shared out, and the functions and numbers that only it uses;
- `a >= b` for `a > b` where the larger of a and b is chosen;
- globals: they are computed before a mutant is enabled;
- functions that ask what the processor supports, and what is compiled only for processors other than x86-64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import tree_sitter
import tree_sitter_cpp

from tests.mutants.base import Mutant, numbered

OPERATORS = {
    "comparison": {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    "arithmetic": {"+": "-", "-": "+", "*": "/", "/": "*", "%": "*", "<<": ">>", ">>": "<<", "&": "|", "|": "&"},
    "logic": {"&&": "||", "||": "&&"},
    "assignment": {"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "&=": "|="},
}
SWAPS = {"std::min": "std::max", "std::max_element": "std::min_element", "std::floor": "std::ceil"}
SWAPS |= {new: old for old, new in SWAPS.items()}
# Replaced by blanks of equal length for the parser, which does not accept macros there.
HIDDEN = re.compile(
    r"LAS_INLINE|LAS_AVX512\w+|__attribute__\(\((?:[^()]|\([^()]*\))*\)\)|^#pragma GCC unroll \d+$", re.M
)
CONSTANT_TYPES = {
    "template_argument_list", "template_parameter_list", "static_assert_declaration", "array_declarator", "enumerator",
    "preproc_def", "preproc_include", "preproc_call", "case_statement", "attribute_specifier", "decltype",
    "type_descriptor", "template_type", "alignas_qualifier", "lambda_capture_specifier", "sizeof_expression",
}  # fmt: skip
BROADCAST = re.compile(r"broadcast<W>\(([^()]+)\)")  # a vector of equal lanes
NO_RESULT = {"las::prefetch", "prefetch", "prefetch_ahead", "__builtin_prefetch", "madvise", "asm"}
PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_cpp.language()))

Node = tree_sitter.Node


def cpp_mutants(source: str, file: str) -> list[Mutant]:
    """Every mutant of a C++ source that a schema can hold; `file` is its path."""
    return numbered([m for m, constant in _Walk(source, file).edits() if not constant])


def constants(source: str, file: str) -> int:
    """The number of edits that are left out because they are in constant expressions."""
    return sum(constant for _, constant in _Walk(source, file).edits())


def schema(source: str, mutants: Sequence[tuple[int, Mutant]]) -> str:
    """The source in which LAS_MUTANT(number) enables a mutant. Line numbers do not change."""
    if not mutants:
        return source
    raw = source.encode()
    by_span: dict[tuple[int, int], list[tuple[int, Mutant]]] = {}
    for number, mutant in mutants:
        begin = len(source[: mutant.start].encode())
        by_span.setdefault((begin, begin + len(mutant.before.encode())), []).append((number, mutant))
    return _woven(raw, 0, len(raw), sorted(by_span.items(), key=lambda item: (item[0][0], -item[0][1])))


def _woven(raw: bytes, begin: int, end: int, edits: list) -> str:
    """The text from begin to end with the edits, which are sorted from outermost to innermost."""
    pieces, at = [], begin
    while edits:
        (first, last), here = edits[0]
        inner = [x for x in edits[1:] if x[0][1] <= last]
        edits = [x for x in edits[1:] if x[0][1] > last]
        pieces.append(raw[at:first].decode())
        pieces.append(_switched(_woven(raw, first, last, inner), here))
        at = last
    return "".join([*pieces, raw[at:end].decode()])


def _switched(text: str, here: list[tuple[int, Mutant]]) -> str:
    for number, mutant in here:
        if mutant.rule == "deletion":
            text = f"{{ if (!LAS_MUTANT({number})) {text} }}"
        elif mutant.rule in ("not", "operand") or mutant.after in ("true", "false"):  # of pointers and optionals, too
            text = f"(LAS_MUTANT({number}) ? bool({_one_line(mutant.after)}) : bool({text}))"
        else:
            text = f"(LAS_MUTANT({number}) ? ({_one_line(mutant.after)}) : ({text}))"
    return text


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", re.sub(r"//[^\n]*", "", text))


def _nodes(node: Node, kind: str) -> Iterator[Node]:
    if node.type == kind:
        yield node
    for child in node.children:
        yield from _nodes(child, kind)


def _declares(node: Node) -> bool:
    """Return whether an identifier is the name that a declaration gives, not a use of it."""
    while node.parent is not None and node == node.parent.child_by_field_name("declarator"):
        node = node.parent
    return node.type in ("init_declarator", "declaration", "function_definition")


class _Walk:
    def __init__(self, source: str, file: str):
        self.file = file
        self.raw = source.encode()
        hidden = HIDDEN.sub(lambda match: " " * len(match[0]), source)
        self.tree = PARSER.parse(hidden.encode())

    def edits(self) -> Iterator[tuple[Mutant, bool]]:
        """Yield (mutant, whether it is in a constant expression)."""
        yield from self.visit(self.tree.root_node, "", False)

    def visit(self, node: Node, function: str, constant: bool) -> Iterator[tuple[Mutant, bool]]:
        if node.type in ("string_literal", "comment", "ERROR") or self.changes_no_result(node):
            return
        if node.type == "function_definition":
            function = self.name_of(node) or function
        if node.type in ("class_specifier", "struct_specifier") and (name := node.child_by_field_name("name")):
            function = self.text(name)
        constant = constant or node.type in CONSTANT_TYPES or self.is_constexpr(node)
        for rule, after in self.of(node):
            yield self.mutant(node, rule, after, function), constant
        for i, child in enumerate(node.children):
            if not (node.type == "call_expression" and i == 0 and child.type != "field_expression"):
                yield from self.visit(child, function, constant)

    def mutant(self, node: Node, rule: str, after: str, function: str) -> Mutant:
        start = len(self.raw[: node.start_byte].decode())
        return Mutant(self.file, node.start_point[0] + 1, function, rule, self.text(node), after, start)

    def text(self, node: Node) -> str:
        return self.raw[node.start_byte : node.end_byte].decode()

    def field(self, node: Node, name: str) -> str:
        child = node.child_by_field_name(name)
        return self.text(child) if child else ""

    def name_of(self, node: Node) -> str:
        declarator = node.child_by_field_name("declarator")
        while declarator and (inner := declarator.child_by_field_name("declarator")):
            declarator = inner
        return self.text(declarator) if declarator and len(self.text(declarator)) < 60 else ""

    def is_constexpr(self, node: Node) -> bool:
        if node.type == "if_statement":
            return False
        if node.parent is not None and node.parent.type in ("preproc_if", "preproc_elif"):
            return node == node.parent.child_by_field_name("condition")
        if node.type in ("declaration", "field_declaration"):
            return "constexpr" in self.text(node).split("=")[0]
        if node.type == "condition_clause" and node.parent.type == "if_statement":
            return self.text(node.parent).startswith(("if constexpr", "if  constexpr"))
        return False

    def changes_no_result(self, node: Node) -> bool:
        if node.type == "preproc_else" and "__x86_64__" in self.field(node.parent, "condition"):
            return True
        if node.type == "expression_statement":
            node = node.children[0]
        if self.is_prefetch(node) or self.serves_prefetch(node) or self.is_grain(node):
            return True
        if node.parent is not None and node.parent.type == "argument_list":
            called = node.parent.parent
            arguments = [x for x in node.parent.children if x.is_named]
            if called.type == "call_expression" and self.field(called, "function") == "TORCH_CHECK":
                return node in arguments[1:]  # the message
        # ops are registered and globals computed when the extension is loaded, before a mutant is enabled
        if node.type == "declaration" and node.parent.type in ("translation_unit", "declaration_list"):
            return not self.is_constexpr(node)
        if node.type != "function_definition":
            return False
        # only another processor would give another answer
        if self.text(node).startswith("TORCH_LIBRARY") or "__builtin_cpu_supports" in self.text(node):
            return True
        return self.computes_grain(node)

    def is_grain(self, node: Node) -> bool:
        """Return whether this is the third argument of at::parallel_for(begin, end, grain, body)."""
        if node.parent is None or node.parent.type != "argument_list":
            return False
        called, arguments = node.parent.parent, [x for x in node.parent.children if x.is_named]
        is_loop = called.type == "call_expression" and self.field(called, "function") == "at::parallel_for"
        return is_loop and len(arguments) > 2 and node == arguments[2]

    def computes_grain(self, function: Node) -> bool:
        """Return whether the file calls a function, and only for the grain of at::parallel_for."""
        name = self.name_of(function)
        uses = [x for kind in ("identifier", "field_identifier") for x in _nodes(self.tree.root_node, kind)
                if self.text(x) == name and not _declares(x)]  # fmt: skip
        return bool(uses) and all(self.lies_in_grain(x) for x in uses)

    def lies_in_grain(self, node: Node) -> bool:
        while node.parent is not None and not self.is_grain(node):
            node = node.parent
        return node.parent is not None

    def is_prefetch(self, node: Node) -> bool:
        if node.type == "gnu_asm_expression":
            return self.field(node, "assembly_code") == '""'
        return node.type == "call_expression" and self.field(node, "function").split("<")[0] in NO_RESULT

    def serves_prefetch(self, node: Node) -> bool:
        """Return whether a node is a loop or `if` that only prefetches, or declares what only prefetching uses."""
        if node.type in ("for_statement", "if_statement"):
            body = node.child_by_field_name("body" if node.type == "for_statement" else "consequence")
            is_all = node.child_by_field_name("alternative") is None
            return is_all and body.type == "expression_statement" and self.is_prefetch(body.children[0])
        names = [self.name_of(x) for x in node.children if x.type == "init_declarator"]
        if node.type != "declaration" or not names:
            return False
        while node.parent is not None and node.type != "function_definition":
            node = node.parent
        return all(self.is_only_prefetched(name, node, (name,)) for name in names)

    def is_only_prefetched(self, name: str, function: Node, seen: tuple[str, ...]) -> bool:
        """Return whether a variable is used, and only as an address to prefetch, or to declare such variables."""
        used = [x for x in _nodes(function, "identifier") if self.text(x) == name and not _declares(x)]
        return bool(used) and all(self.is_prefetching_use(x, function, seen) for x in used)

    def is_prefetching_use(self, node: Node, function: Node, seen: tuple[str, ...]) -> bool:
        while node.parent is not None and node.type not in ("init_declarator", "expression_statement"):
            if self.is_prefetch(node) or self.is_grain(node):
                return True
            node = node.parent
        if node.type != "init_declarator":
            return False
        name = self.name_of(node)
        return name not in seen and self.is_only_prefetched(name, function, (*seen, name))

    def of(self, node: Node) -> Iterator[tuple[str, str]]:
        """Yield (rule, replacement text) for a node."""
        if node.type == "binary_expression":
            yield from self.binary(node)
        elif node.type == "assignment_expression":
            yield from self.operator(node, "assignment")
        elif node.type == "unary_expression" and self.field(node, "operator") in ("!", "-"):
            yield ("not" if self.text(node)[0] == "!" else "sign"), self.field(node, "argument")
        elif node.type == "number_literal":
            yield from self.number(self.text(node))
        elif node.type in ("true", "false"):
            yield "constant", "false" if node.type == "true" else "true"
        elif node.type == "conditional_expression":
            yield "condition", self.field(node, "consequence")
            yield "condition", self.field(node, "alternative")
        elif node.type == "call_expression":
            yield from self.call(node)
        elif node.type == "update_expression" and node.parent.type not in ("for_statement", "comma_expression"):
            text = self.text(node)
            yield "update", text.translate(str.maketrans("+-", "-+"))
        elif node.type in ("expression_statement", "continue_statement", "break_statement") and self.text(node) != ";":
            yield "deletion", ";"
        if self.is_condition(node):
            yield from (("condition", value) for value in ("true", "false"))

    def is_condition(self, node: Node) -> bool:
        """Whether an expression is the condition of an `if`."""
        clause = node.parent
        if clause is None or clause.type != "condition_clause" or clause.parent.type != "if_statement":
            return False
        return node.is_named and "declaration" not in node.type

    def binary(self, node: Node) -> Iterator[tuple[str, str]]:
        for rule in ("comparison", "arithmetic", "logic"):
            if rule != "comparison" or not self.chooses_an_operand(node):
                yield from self.operator(node, rule)
        if self.field(node, "operator") in ("&&", "||"):
            yield "operand", self.field(node, "left")
            yield "operand", self.field(node, "right")

    def chooses_an_operand(self, node: Node) -> bool:
        """Return whether a comparison is that of `a > b ? a : b`: of equal numbers either will do."""
        choice = node.parent
        if choice.type != "conditional_expression" or self.field(node, "operator") not in ("<", "<=", ">", ">="):
            return False
        operands = {self.field(node, "left"), self.field(node, "right")}
        chosen = {self.field(choice, "consequence"), self.field(choice, "alternative")}
        return operands == {BROADCAST.sub(r"\1", text) for text in chosen}

    def operator(self, node: Node, rule: str) -> Iterator[tuple[str, str]]:
        operator = node.child_by_field_name("operator")
        if new := OPERATORS[rule].get(self.text(operator)):
            yield rule, self.field(node, "left") + f" {new} " + self.field(node, "right")

    def number(self, text: str) -> Iterator[tuple[str, str]]:
        if re.fullmatch(r"\d+", text):
            value = int(text)
            near = [value + 1, value - 1] if 1 <= value < 100 else [1] if value == 0 else [2 * value]
            yield from (("constant", str(n)) for n in near)
        elif re.fullmatch(r"[\d.e+-]+f?", text):
            zero = float(text.rstrip("f")) == 0
            yield "constant", f"1.0{'f' if text.endswith('f') else ''}" if zero else f"2 * {text}"

    def call(self, node: Node) -> Iterator[tuple[str, str]]:
        name, arguments = self.field(node, "function"), self.field(node, "arguments")
        bare = name.split("<")[0]
        if bare in SWAPS:
            yield "swap", SWAPS[bare] + name[len(bare) :] + arguments
        if bare == "std::clamp":
            arguments = [self.text(x) for x in node.child_by_field_name("arguments").children if x.is_named]
            yield "unwrap", arguments[0]
