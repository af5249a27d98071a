"""Parse the PTX that Triton emits into instructions with decoded operands.

Covers the output of Triton's NVIDIA backend: one `.entry` per module, statements that end in a semicolon, inline
assembly on separate lines, and source positions in comments after `.loc`.
"""

import re
from dataclasses import dataclass, field

_LOCATION = (".loc ", ".loc\t")
_STATEMENT = re.compile(r"\s*(?:(?P<label>[$\w]+):(?!:)|(?P<text>[^;]+);)", re.DOTALL)
_REGISTER = re.compile(r"(?P<negated>!?)(?P<name>%[\w.]+)$")
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_BYTES = re.compile(r"\.align \d+ \.b8\s+(?P<name>[\w$]+)\[(?P<size>\d*)\](?:\s*=\s*\{(?P<values>[\d,\s]*)\})?\s*$")


@dataclass(frozen=True)
class Register:
    """`%r1`, `!%p1`, or a special register such as `%tid.x`."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a floating-point literal such as 0f3F800000."""

    value: int
    float_bits: int = 0  # 32 or 64 when value is the bits of a float of that width


@dataclass(frozen=True)
class Symbol:
    """The name of a label, a parameter or a variable, or `_` for a dropped result."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: "Register | Symbol | Immediate"
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """`{%r1, %r2}`."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """`%r1|%p1`: two results, the second a predicate."""

    first: "Register | Symbol"
    second: "Register | Symbol"


@dataclass(frozen=True)
class Instruction:
    """One instruction; `ld.global.v2.b32` has the name "ld" and the modifiers ("global", "v2", "b32")."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple
    predicate: Register | None  # runs only in threads where it is true
    source: str  # line of the kernel from .loc, such as "kernels.py:7:0"

    @property
    def opcode(self):
        return ".".join((self.name, *self.modifiers))

    @property
    def type(self):
        """The last modifier, which is the instruction's type."""
        return self.modifiers[-1] if self.modifiers else ""

    def __contains__(self, modifier):
        return modifier in self.modifiers

    def __str__(self):
        return f"{self.opcode} ({self.source or 'no source line'})"


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter and its PTX type, such as "u64"."""

    name: str
    type: str


@dataclass
class Kernel:
    """A parsed entry point with its declarations."""

    name: str
    parameters: list[Parameter]
    threads: int  # per CTA
    registers: dict[str, tuple[str, int]]  # prefix such as "%r" -> (type, count); count 0: one without a number
    shared: dict[str, int | None]  # variable -> bytes, None for the dynamic block
    local: dict[str, int]  # variable -> bytes per thread
    constants: dict[str, bytes]  # module-level variable -> initial bytes
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index of the next instruction


def parse(text):
    """Parse a PTX module with one `.entry`. Raises ValueError for PTX that Triton does not emit."""
    head, entry, rest = text.partition(".entry")
    if not entry:
        raise ValueError("expected a PTX module with an .entry")
    header, _, body = rest.partition("{")
    body = body.split(".section", 1)[0]
    kernel = Kernel(
        name=re.match(r"\s*([\w$]+)", header).group(1),
        parameters=[
            Parameter(name, type)
            for type, name in re.findall(r"\.param \.(\w+)(?: \.ptr[^,\n]*?)?\s+([\w$]+),?\n", header)
        ],
        threads=_threads(header),
        registers={},
        shared={},
        local={},
        constants={},
    )
    for statement in re.sub(r"//[^\n]*", "", head).split(";"):
        _declare(kernel, statement.strip().rsplit("\n", 1)[-1])
    _read_body(kernel, body)
    return kernel


def _threads(header):
    sizes = re.search(r"\.reqntid (\d+)(?:, (\d+), (\d+))?", header)
    if not sizes:
        raise ValueError("expected .reqntid: Triton fixes the number of threads")
    if any(size not in (None, "1") for size in sizes.groups()[1:]):
        raise ValueError("expected a one-dimensional CTA")
    return int(sizes.group(1))


def _read_body(kernel, body):
    source = ""
    for line in _joined_lines(body):
        if line.startswith(_LOCATION):
            source = _source(line)
            continue
        for statement in _STATEMENT.finditer(line.split("//")[0]):
            if statement["label"]:
                kernel.labels[statement["label"]] = len(kernel.instructions)
                continue
            text = statement["text"].strip()
            while text and text[0] in "{}":  # scopes: ignored, register names are unique across them
                text = text[1:].strip()
            if text.startswith("."):
                _declare(kernel, text)
            elif text:
                kernel.instructions.append(_instruction(text, source))


def _joined_lines(body):
    """Lines of the body, with each statement joined into one line."""
    pending = ""
    for line in body.split("\n"):
        line = line.strip()
        if not line or line in "{}" or line.startswith(("//", ".file", ".pragma")):
            continue
        code = line.split("//")[0].strip()
        if line.startswith(_LOCATION) or (not pending and code.endswith((";", ":"))):
            yield line
            continue
        pending = f"{pending} {code}".strip()
        if pending.endswith((";", ":", "}")) or not pending:
            yield pending
            pending = ""


def _source(line):
    """The position in a `.loc` line; for inlined code the innermost, and the kernel's line that called it."""
    _, _, comment = line.partition("//")
    positions = re.findall(r"[\w.<>-]+:\d+(?::\d+)?", comment)
    if not positions:
        return ""
    return positions[0] if len(positions) == 1 else f"{positions[-1]}, in {positions[0]}"


def _declare(kernel, text):
    """Record a variable or a range of registers; ignore other directives."""
    if text.startswith(".reg"):
        _, type, names = text.split(None, 2)
        for name in names.split(","):
            prefix, _, count = name.strip().rstrip(">").partition("<")
            kernel.registers[prefix] = (type[1:], int(count or 0))
        return
    variable = _BYTES.search(text)
    if not variable:
        return
    name, size = variable["name"], int(variable["size"] or 0)
    if ".shared" in text:
        kernel.shared[name] = size or None
    elif ".local" in text:
        kernel.local[name] = size
    else:
        values = bytes(int(value) for value in (variable["values"] or "").split(",") if value.strip())
        kernel.constants[name] = values.ljust(size, b"\0")


def _instruction(text, source):
    predicate = None
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
        predicate = _operand(guard)
    opcode, _, rest = text.replace("\t", " ").partition(" ")
    name, *modifiers = opcode.replace("::", ".").split(".")
    operands = tuple(_operand(operand) for operand in _split(rest))
    return Instruction(name, tuple(modifiers), operands, predicate, source)


def _split(text):
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _operand(text):
    text = text.strip()
    if text[0] == "{":
        return Vector(tuple(_operand(item) for item in _split(text[1:-1])))
    if text[0] == "[":
        return _address(text[1:-1])
    if "|" in text:
        return Pair(*(_operand(part) for part in text.split("|")))
    if register := _REGISTER.match(text):
        return Register(register["name"], bool(register["negated"]))
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return Immediate(int(text[2:], 16), 32 if text[1] in "fF" else 64)
    if _INTEGER.match(text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)


def _address(text):
    base, sign, offset = text.strip().partition("+")
    return Address(_operand(base), int(offset, 0) if sign else 0)
