"""The instructions that are understood, and the C++ that stands for each. What one does is in runtime.h.

Every register is an unsigned number of its width, `ptx::Bits` in between; functions of runtime.h take and return bits.
An instruction that has a modifier not listed here is refused: nothing is ignored that could change a result.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from .parser import Instruction, Operand, Pair, PtxError, type_size

TYPES = {
    **{f"u{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"b{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)},
    "pred": "bool",
    "f16": "ptx::Half",
    "bf16": "ptx::BFloat16",
    "f32": "float",
    "f64": "double",
}


class Context(Protocol):
    """The function that an instruction stands in."""

    def value(self, operand: Operand) -> str:
        """Its bits."""

    def target(self, operand: Operand) -> str:
        """A register to assign to."""

    def place(self, operand: Operand, is_shared: bool) -> str:
        """The host's address, as bits, of `[base + offset]`."""

    def label(self, operand: Operand) -> str: ...

    def call(self, name: Operand, arguments: Iterable[Operand]) -> str: ...

    def site(self, line: int) -> str:
        """Where threads meet."""

    def shared(self, operand: Operand, to_shared: bool) -> str:
        """A shared address as a generic one, or the other way."""


@dataclass(frozen=True)
class Plain:
    """`name.modifiers.types result, operands` that is a function of runtime.h with a template argument per type."""

    function: str
    variants: tuple[str, ...] = ()  # modifiers that name functions of their own: mul.lo is mul_lo
    meaningless: tuple[str, ...] = ()  # modifiers that ask for what is done anyway


PLAIN = {
    "add": Plain("add", meaningless=("rn",)),
    "sub": Plain("sub", meaningless=("rn",)),
    "mul": Plain("mul", variants=("lo", "hi", "wide"), meaningless=("rn",)),
    "mad": Plain("mad", variants=("lo", "wide")),
    "fma": Plain("fma", meaningless=("rn",)),
    "div": Plain("div", meaningless=("rn",)),
    "rem": Plain("rem"),
    "rcp": Plain("rcp", meaningless=("rn",)),
    "sqrt": Plain("sqrt", meaningless=("rn",)),
    "neg": Plain("neg"),
    "abs": Plain("abs"),
    "min": Plain("min"),
    "max": Plain("max"),
    "copysign": Plain("copysign"),
    "and": Plain("bit_and"),
    "or": Plain("bit_or"),
    "xor": Plain("bit_xor"),
    "not": Plain("bit_not"),
    "shl": Plain("shl"),
    "shr": Plain("shr"),
    "bfe": Plain("bfe"),
    "bfi": Plain("bfi"),
    "lop3": Plain("lop3"),
    "prmt": Plain("prmt"),
    "popc": Plain("popc"),
    "clz": Plain("clz"),
    "selp": Plain("selp"),
}

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
LOGIC = {"and": "&&", "or": "||", "xor": "!="}
ROUNDINGS = {"rn": "kNone", "rni": "kNearest", "rzi": "kZero", "rmi": "kDown", "rpi": "kUp"}
SHUFFLES = {"bfly": "kXor", "idx": "kIndex", "up": "kUp", "down": "kDown"}
ATOMICS = ("add", "inc", "max", "min", "exch", "cas", "and", "or")
SPACES = ("global", "local", "param", "param::func", "param::entry", "const")
SHARED = ("shared", "shared::cta")
SCOPES = ("gpu", "sys")
# which cache a line goes to, and how long it stays: no concern of results
CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
# about caches and launches alone
NO_EFFECT = ("prefetch", "createpolicy", "griddepcontrol", "discard")


def translate(instruction: Instruction, context: Context) -> str:
    """One C++ statement.

    Raises:
        PtxError: naming the instruction, if it is not understood.
    """
    base, *modifiers = instruction.opcode.split(".")
    try:
        if base in PLAIN:
            statement = _plain(PLAIN[base], modifiers, instruction, context)
        elif base in NO_EFFECT:
            statement = ";"
        else:
            statement = SPECIAL[base](modifiers, instruction, context)
    except (KeyError, IndexError, _Unknown) as error:
        raise PtxError(f"unsupported instruction: {instruction} ({error})") from None
    if instruction.predicate is None:
        return statement
    return f"if ({context.value(instruction.predicate)}) {{ {statement} }}"


class _Unknown(Exception):
    pass


def _only(modifiers: Iterable[str], *known: Iterable[str]) -> None:
    allowed = {name for names in known for name in names}
    for modifier in modifiers:
        if modifier not in allowed and not modifier.startswith(("L1::", "L2::")):
            raise _Unknown(f"modifier .{modifier}")


def _types(modifiers: list[str]) -> list[str]:
    return [TYPES[m] for m in modifiers if m in TYPES]


def _plain(plain: Plain, modifiers: list[str], instruction: Instruction, context: Context) -> str:
    _only(modifiers, TYPES, plain.variants, plain.meaningless)
    variant = "".join(f"_{m}" for m in modifiers if m in plain.variants)
    values = ", ".join(context.value(o) for o in instruction.operands[1:])
    call = f"ptx::{plain.function}{variant}<{', '.join(_types(modifiers))}>({values})"
    return f"{context.target(instruction.operands[0])} = {call};"


def _mov(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    _only(modifiers, TYPES)
    to, value = instruction.operands
    bits = 8 * type_size(modifiers[-1]) if modifiers[-1] != "pred" else 1
    if isinstance(to, tuple):
        width = bits // len(to)
        parts = [f"{context.target(t)} = whole >> {i * width};" for i, t in enumerate(to) if t != "_"]
        return f"{{ const ptx::Bits whole = {context.value(value)}; {' '.join(parts)} }}"
    if isinstance(value, tuple):
        width = bits // len(value)
        parts = [f"ptx::low<{width}>({context.value(v)}) << {i * width}" for i, v in enumerate(value)]
        return f"{context.target(to)} = {' | '.join(parts)};"
    return f"{context.target(to)} = {context.value(value)};"


def _setp(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    how, *logic, kind = modifiers
    how = UNSIGNED_COMPARISONS.get(how, how)
    _only([how], COMPARISONS)
    result, a, b, *third = instruction.operands
    compared = f"ptx::compare<{TYPES[kind]}>(ptx::k_{how}, {context.value(a)}, {context.value(b)})"
    with_third = f" {LOGIC[logic[0]]} {context.value(third[0])}" if logic else ""
    if not isinstance(result, Pair):
        return f"{context.target(result)} = {compared}{with_third};"
    statement = f"const bool compared = {compared};"
    for to, sign in ((result.first, ""), (result.second, "!")):
        if to != "_":
            statement += f" {context.target(to)} = {sign}compared{with_third};"
    return f"{{ {statement} }}"


def _cvt(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    *how, to, of = modifiers
    _only(how, ROUNDINGS)
    result, *values = (instruction.operands[0], *map(context.value, instruction.operands[1:]))
    rounding = f"ptx::{ROUNDINGS[how[0]]}" if how else "ptx::kNone"
    if to.endswith("x2"):
        half = f"ptx::cvt<{TYPES[to[:-2]]}, {TYPES[of]}>"
        upper, lower = (f"ptx::low<16>({half}({v}, {rounding}))" for v in values)
        return f"{context.target(result)} = {upper} << 16 | {lower};"
    return f"{context.target(result)} = ptx::cvt<{TYPES[to]}, {TYPES[of]}>({values[0]}, {rounding});"


def _cvta(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    _only(modifiers, TYPES, SPACES, SHARED, ("to",))
    to, value = instruction.operands
    if any(m in SHARED for m in modifiers):
        return f"{context.target(to)} = {context.shared(value, 'to' in modifiers)};"
    return f"{context.target(to)} = {context.value(value)};"


def _access(modifiers: list[str], at: Operand, context: Context) -> tuple[int, str, str, str]:
    """Elements, type and order of a load or store, and the statements before it."""
    _only(modifiers, TYPES, SPACES, SHARED, SCOPES, CACHE, ("v2", "v4", "v8", "weak", "volatile", *ORDERS))
    count = next((int(m[1:]) for m in modifiers if m in ("v2", "v4", "v8")), 1)
    is_shared = any(m in SHARED for m in modifiers)
    plain = "shared" if is_shared else ""
    order = next((m for m in modifiers if m in ORDERS), "relaxed" if "volatile" in modifiers else plain)
    place = context.place(at, is_shared)
    size = count * type_size(modifiers[-1])
    begin = f"const ptx::Bits at = {place}; ptx::check_aligned(at, {size});"
    return count, TYPES[modifiers[-1]], f"_{order}" if order else "", begin


ORDERS = ("relaxed", "acquire", "release")


def _ld(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    to, at = instruction.operands[:2]
    count, kind, order, begin = _access(modifiers, at, context)
    targets = to if isinstance(to, tuple) else (to,)
    if len(targets) != count:
        raise _Unknown(f"{len(targets)} results")
    loads = [
        f"{context.target(t)} = ptx::load{order}<{kind}>(at + {i} * sizeof({kind}));"
        for i, t in enumerate(targets)
        if t != "_"
    ]
    return f"{{ {begin} {' '.join(loads)} }}"


def _st(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    at, value = instruction.operands[:2]
    count, kind, order, begin = _access(modifiers, at, context)
    values = value if isinstance(value, tuple) else (value,)
    if len(values) != count:
        raise _Unknown(f"{len(values)} values")
    stores = [
        f"ptx::store{order}<{kind}>(at + {i} * sizeof({kind}), {context.value(v)});" for i, v in enumerate(values)
    ]
    return f"{{ {begin} {' '.join(stores)} }}"


def _atomic(modifiers: list[str], operands: tuple[Operand, ...], context: Context) -> tuple[str, str, str]:
    """The fence before, the operation, and the fence after it."""
    _only(modifiers, TYPES, SPACES, SHARED, SCOPES, ATOMICS, (*ORDERS, "acq_rel"))
    operation = next(m for m in modifiers if m in ATOMICS)
    place = context.place(operands[0], any(m in SHARED for m in modifiers))
    arguments = ", ".join([place, *map(context.value, operands[1:])])
    before = "ptx::fence(); " if {"release", "acq_rel"} & set(modifiers) else ""
    after = f" ptx::pass_on({place});" if "acq_rel" in modifiers else ""
    after += " ptx::fence();" if {"acquire", "acq_rel"} & set(modifiers) else ""
    return before, f"ptx::atom_{operation}<{TYPES[modifiers[-1]]}>({arguments});", after


def _atom(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    before, operation, after = _atomic(modifiers, instruction.operands[1:], context)
    return f"{before}{context.target(instruction.operands[0])} = {operation}{after}"


def _red(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    return "".join(_atomic(modifiers, instruction.operands, context))


def _fence(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    _only(modifiers, SCOPES, ("gl", "sc", "acq_rel"))
    return "ptx::fence();"


def _bar(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    site = context.site(instruction.line)
    if modifiers == ["warp", "sync"]:
        return f"ptx::warp_sync({context.value(instruction.operands[0])}, {site});"
    _only(modifiers, ("sync", "cta", "aligned"))
    if instruction.operands != ("0",):
        raise _Unknown("a barrier other than number 0 of all threads")
    return f"ptx::barrier({site});"


def _shfl(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    sync, how, kind = modifiers
    _only([sync], ("sync",))
    _only([kind], ("b32",))
    result, *values = instruction.operands
    value, lane, clamp, mask = map(context.value, values)
    first, second = (result.first, result.second) if isinstance(result, Pair) else (result, "_")
    inside = "" if second == "_" else f" {context.target(second)} = inside;"
    call = f"ptx::shfl(emulation::Shuffle::{SHUFFLES[how]}, {value}, {lane}, {clamp}, {mask}, "
    return f"{{ bool inside; {context.target(first)} = {call}{context.site(instruction.line)}, &inside);{inside} }}"


def _matrix(modifiers: list[str], place: Operand, rows: Operand, context: Context) -> tuple[list[Operand], str]:
    """The registers of ldmatrix or stmatrix, and how to find each thread's part of row i."""
    _only(modifiers, ("sync", "aligned", "m8n8", "x1", "x2", "x4", "b16"), SHARED)
    registers = list(rows) if isinstance(rows, tuple) else [rows]
    return registers, f"const auto& rows = ptx::matrix_rows({context.place(place, True)}, "


def _ldmatrix(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    targets, place = instruction.operands
    registers, rows = _matrix(modifiers, place, targets, context)
    loads = "".join(
        f" {context.target(r)} = ptx::load_shared<uint32_t>(ptx::in_row(rows, {i}));" for i, r in enumerate(registers)
    )
    return f"{{ {rows}{context.site(instruction.line)});{loads} }}"


def _stmatrix(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    place, values = instruction.operands
    registers, rows = _matrix(modifiers, place, values, context)
    stores = "".join(
        f" ptx::store_shared<uint32_t>(ptx::in_row(rows, {i}), {context.value(r)});" for i, r in enumerate(registers)
    )
    return f"{{ {rows}{context.site(instruction.line)});{stores} }}"


def _vote(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    sync, how, kind = modifiers
    _only([sync, how, kind], ("sync", "ballot", "any", "all", "b32", "pred"))
    to, predicate, mask = instruction.operands
    site = context.site(instruction.line)
    return f"{context.target(to)} = ptx::vote_{how}({context.value(predicate)}, {context.value(mask)}, {site});"


def _bra(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    _only(modifiers, ("uni",))
    return f"goto {context.label(instruction.operands[0])};"


def _ret(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    _only(modifiers, ("uni",))
    return "return;"


def _call(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    _only(modifiers, ("uni",))
    operands = list(instruction.operands)
    results = operands.pop(0) if isinstance(operands[0], tuple) else ()
    name, arguments = operands[0], operands[1] if len(operands) > 1 else ()
    return context.call(name, (*results, *arguments))


def _nanosleep(modifiers: list[str], instruction: Instruction, context: Context) -> str:
    return "ptx::spin();"


SPECIAL: dict[str, Callable[[list[str], Instruction, Context], str]] = {
    "mov": _mov,
    "setp": _setp,
    "cvt": _cvt,
    "cvta": _cvta,
    "ld": _ld,
    "st": _st,
    "atom": _atom,
    "red": _red,
    "membar": _fence,
    "fence": _fence,
    "bar": _bar,
    "barrier": _bar,
    "shfl": _shfl,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "vote": _vote,
    "bra": _bra,
    "ret": _ret,
    "exit": _ret,
    "call": _call,
    "nanosleep": _nanosleep,
}
