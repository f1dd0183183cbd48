"""LoRA's modules: scaling·B·A in all its forms.

Reference: arXiv 2106.09685; rsLoRA (2312.03732) scales by α/√r, DoRA (2402.09353) keeps a length
for each output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import CheckpointError, LayoutError
from dare_agg.offline.adapters.forms import (
    Addend,
    Matrix,
    Normed,
    Product,
    Rows,
    Step,
    Within,
    column_norms,
)
from dare_agg.offline.adapters.initial import taken_out
from dare_agg.offline.adapters.names import Piece
from dare_agg.offline.adapters.parts import (
    ADD,
    REPLACE,
    SCALE,
    Contribution,
    Module,
    by_view,
    number,
    transposed,
)
from dare_agg.vectors.patterns import compile_patterns, matches

PARTS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    | {"lora_diag", "lora_E"}
)
# PEFT's own defaults, for configurations that name neither.
_ALPHA = 8
# Rows in which lengths of columns are measured.
_BLOCK = 1 << 18


def lora(module: Module) -> Iterator[Contribution]:
    """What a LoRA module adds to the base. Raises `CheckpointError` where its shapes do not fit."""
    if "lora_embedding_A" in module.parts or "lora_embedding_B" in module.parts:
        yield from _embedding(module)
        return
    a, b = module.shape("lora_A"), module.shape("lora_B")
    ranks = (a[0] if a else 0, b[1] * _blocks(module, "B") if len(b) > 1 else 0)
    if len(a) < 2 or len(a) != len(b) or ranks[0] != ranks[1] or not math.prod(a):
        raise CheckpointError(
            f"{module.folder.path}: A and B of {module.name!r} have shapes {a} and {b}, which "
            "cannot be multiplied: save the adapter again"
        )
    if len(a) > 2:
        yield from _convolution(module, a, b)
    else:
        yield from _matrix(module, a, b)
    if "lora_B.bias" in module.parts:
        yield _bias(module, a[0])


def parameters(module: str, targets: Sequence[str]) -> list[str]:
    """The names that the parameter of a LoRA module may have in the base."""
    return [
        f"{module}.weight",
        f"{module}.in_proj_weight",
        *(f"{module}.{target.rpartition('.')[2]}" for target in targets if _hits(module, target)),
    ]


def scaling(module: Module, rank: int, key: str = "") -> float:
    """α/r of a module, or α/√r; α of the first pattern that fits its name.

    Raises `CheckpointError` for an α that is no number.
    """
    config, path = module.config, module.folder.path
    alpha = config.get("lora_alpha", _ALPHA)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: alpha_pattern is {patterns!r:.40}, no mapping")
    # The projection out of an attention has the settings of the attention.
    own = module.name.removesuffix(".out_proj") if module.attention else module.name
    for pattern, value in patterns.items():
        try:
            found = compile_patterns([rf"^(.*\.)?({pattern})$"])
        except LayoutError as error:
            raise CheckpointError(
                f"{path}: alpha_pattern {pattern!r:.80} looks ahead or back, or is no pattern; "
                "write the modules' names in its place in adapter_config.json, each with its alpha"
            ) from error
        if matches(key or own, found):
            alpha = value
            break
    value = number(alpha, "lora_alpha", path)
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _hits(module: str, target: str) -> bool:
    parent = target.rpartition(".")[0]
    return not parent or module == parent or module.endswith("." + parent)


@dataclass(frozen=True)
class _Once:
    """What is made at first use and kept: rank-r factors, lengths of columns."""

    make: Callable[..., Any]
    kept: list[Any]
    lock: Any

    def __call__(self, *given: Any) -> Any:
        with self.lock:
            if not self.kept:
                self.kept.append(self.make(*given))
            return self.kept[0]


def _once(make: Callable[..., Any]) -> _Once:
    return _Once(make, [], Lock())


def _matrix(module: Module, a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[Contribution]:
    """A Linear, a Conv1D, the stacked input projections of an attention, or fused experts."""
    name, stacked = _parameter(module, a, b)
    if stacked:
        yield from _experts(module, name, a, b)
        return
    rank = a[0]
    scale = np.float32(scaling(module, rank, name if name.endswith(module.targets) else ""))
    if module.attention:
        # PEFT adds the output projection's delta twice, in training and in merging.
        scale *= np.float32(2)
    pieces = module.find(name)
    if len(pieces) > 1 or pieces[0].hi is not None:
        yield from _in_pieces(module, pieces, a, b, partial(_factors, module, scale))
        return
    _, tensor, shape = module.place([name])
    out, into = b[0], a[1] * _blocks(module, "A")
    if module.config.get("use_qalora") and shape not in ((out, into), (into, out)):
        raise CheckpointError(
            f"{module.folder.path}: {module.name!r} is QA-LoRA over groups of inputs, made for "
            "GPTQ's codes, which PEFT cannot merge either: use it beside the model"
        )
    if len(shape) != 2:
        raise module.unfit(f"its delta is of shape {(out, into)}, the base's weight of {shape}")
    flip = transposed(module, tensor, out, into)
    taken = taken_out(module.config, module.folder.path)
    if taken is not None:
        yield _lessened(module, tensor, shape, partial(_taken, taken, rank, float(scale), flip))

    def steps(base: Rows, before: Sequence[Step]) -> Sequence[Step]:
        left, right = _factors(module, scale)
        left, right = (right.transpose(0, 2, 1), left.transpose(0, 2, 1)) if flip else (left, right)
        return [Product(np.ascontiguousarray(left), np.ascontiguousarray(right))]

    yield Contribution(tensor, ADD, steps)
    yield from _magnitude(module, tensor, shape, out, by_rows=not flip)


def _blocks(module: Module, which: str) -> int:
    """In how many blocks of a diagonal a factor, "A" or "B", is stored; 1 for a whole matrix."""
    if _diagonal(module) != which:
        return 1
    given = module.config.get("use_bdlora")
    return int(number((given or {}).get("nblocks", 1), "nblocks", module.folder.path, 1e4))


def _diagonal(module: Module) -> str:
    """Which factor of a BD-LoRA module is stored as the blocks of a diagonal: "A", "B" or ""."""
    given = module.config.get("use_bdlora")
    if not isinstance(given, dict):
        return ""
    for which in ("A", "B"):
        wanted = given.get(f"target_modules_bd_{which.lower()}") or []
        if any(isinstance(part, str) and part in module.name for part in wanted):
            return which
    return ""


def _factors(module: Module, scale: np.float32) -> tuple[Matrix, Matrix]:
    """B·scaling and A as stacks of one."""
    a, b = module.load("lora_A"), module.load("lora_B")
    a = _block_diagonal(a, _blocks(module, "A"))
    b = _block_diagonal(b, _blocks(module, "B"))
    if "lora_diag" in module.parts:
        b = b * module.load("lora_diag")
    return (b * scale)[None], a[None]


def _block_diagonal(stored: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    rows, columns = stored.shape[0] // count, stored.shape[1]
    whole = np.zeros((stored.shape[0], columns * count), np.float32)
    for i in range(count):
        block = stored[i * rows : (i + 1) * rows]
        whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = block
    return whole


def _taken(
    taken: Any, rank: int, scale: float, flip: bool, weight: Matrix
) -> tuple[Matrix, Matrix]:
    left, right = taken(weight.T if flip else weight, rank, float(scale))
    left, right = (right.T, left.T) if flip else (left, right)
    return (-left[None]).astype(np.float32), np.ascontiguousarray(right[None], np.float32)


def _lessened(
    module: Module, tensor: str, shape: tuple[int, ...], take: Callable[[Matrix], Any]
) -> Contribution:
    kept = _once(lambda base: take(base(0, shape[0])))
    return Contribution(tensor, REPLACE, lambda base, before: [Product(*kept(base))])


def _magnitude(
    module: Module, tensor: str, shape: tuple[int, ...], outputs: int, *, by_rows: bool
) -> Iterator[Contribution]:
    """DoRA's lengths, where the module has them."""
    if "lora_magnitude_vector" not in module.parts:
        if module.config.get("use_dora"):
            module.shape("lora_magnitude_vector")
        return
    if math.prod(module.shape("lora_magnitude_vector")) != outputs:
        raise module.unfit(f"its magnitudes are not as many as the {outputs} outputs")
    width = math.prod(shape[1:])
    block = max(1, _BLOCK // max(1, width))
    kept = _once(lambda base, before: column_norms(before, base, shape[0], width, block))

    def steps(base: Rows, before: Sequence[Step]) -> Sequence[Step]:
        magnitude = module.load("lora_magnitude_vector").reshape(-1)
        return [Normed(magnitude, None if by_rows else kept(base, before))]

    yield Contribution(tensor, SCALE, steps, adds=False)


def _bias(module: Module, rank: int) -> Contribution:
    names = [f"{module.name}.bias"]
    if not module.find(names[0]):
        raise CheckpointError(
            f"{module.folder.path}: {module.name!r} has a lora_bias and the base's layer no bias "
            "to add it to, so PEFT cannot merge it either: train without lora_bias"
        )
    _, tensor, shape = module.place(names)
    if module.shape("lora_B.bias") != shape:
        raise module.unfit(f"its bias is of shape {module.shape('lora_B.bias')}, not {shape}")
    scale = np.float32(scaling(module, rank))
    return Contribution(
        tensor, ADD, lambda base, before: [Addend(module.load("lora_B.bias") * scale)]
    )


def _convolution(module: Module, a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[Contribution]:
    _, tensor, shape = module.place([f"{module.name}.weight"])
    grouped = len(shape) == len(a) and shape[1] and shape[0] == b[0] and a[1] != shape[1]
    if grouped and a[1] % shape[1] == 0 and a[2:] == shape[2:]:
        raise CheckpointError(
            f"{module.folder.path}: {module.name!r} is a convolution in groups, which PEFT "
            f"cannot merge either: train without it (exclude_modules), or leave it out with "
            f"--exclude '^{tensor}$'"
        )
    if (b[0], *a[1:]) != shape or any(d != 1 for d in b[2:]):
        raise module.unfit(f"its delta is of shape {(b[0], *a[1:])}, the base's of {shape}")
    taken_out(module.config, module.folder.path)
    scale = np.float32(scaling(module, a[0]))

    def steps(base: Rows, before: Sequence[Step]) -> Sequence[Step]:
        left, right = by_view(module.load("lora_B")) * scale, by_view(module.load("lora_A"))
        return [Product(left[None], right[None])]

    yield Contribution(tensor, ADD, steps)
    yield from _magnitude(module, tensor, shape, b[0], by_rows=True)


def _embedding(module: Module) -> Iterator[Contribution]:
    a, b = module.shape("lora_embedding_A"), module.shape("lora_embedding_B")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not math.prod(a):
        raise CheckpointError(
            f"{module.folder.path}: A and B of {module.name!r} have shapes {a} and {b}, which "
            "cannot be multiplied: save the adapter again"
        )
    _, tensor, shape = module.place([f"{module.name}.weight"])
    if shape != (a[1], b[0]):
        raise module.unfit(f"its delta is of shape {(a[1], b[0])}, the base's of {shape}")
    scale = np.float32(scaling(module, a[0]))

    def steps(base: Rows, before: Sequence[Step]) -> Sequence[Step]:
        left, right = module.load("lora_embedding_A").T, module.load("lora_embedding_B").T
        return [Product((left * scale)[None], np.ascontiguousarray(right[None]))]

    yield Contribution(tensor, ADD, steps)
    yield from _magnitude(module, tensor, shape, b[0], by_rows=False)


def _parameter(module: Module, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[str, bool]:
    """The parameter that a module of two matrices adapts, and whether it is a stack.

    Several parameters of one module have modules of one name: shapes say which is whose.
    """
    found = [name for name in parameters(module.name, module.targets) if module.find(name)]
    fits = [name for name in found if _stack(module, name, a, b)]
    if not fits:
        plain = [name for name in found if _stack_shape(module, name) is None]
        if not plain:
            raise module.unfit(f"no parameter of the base fits A {a} and B {b}")
        return plain[0], False
    if len(fits) > 1:
        raise CheckpointError(
            f"{module.folder.path}: {module.name!r} may adapt {' or '.join(fits)}; merge it with "
            "peft first"
        )
    return fits[0], True


def _stack_shape(module: Module, name: str) -> tuple[int, int, int] | None:
    """(matrices, rows, columns) of a parameter that is a stack of matrices."""
    pieces = module.find(name)
    shapes = [module.base.tensors[piece.tensor].shape for piece in pieces]
    if len(pieces) == 1 and pieces[0].hi is None:
        return shapes[0] if len(shapes[0]) == 3 else None  # type: ignore[return-value]
    groups = 1 + max(piece.group for piece in pieces)
    if groups == 1 or any(len(shape) != 2 for shape in shapes):
        return None
    return groups, max(piece.hi or 0 for piece in pieces), shapes[0][1]


def _stack(
    module: Module, name: str, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[int, bool] | None:
    """(matrices, whether each is stored (in, out)) where a stack fits A and B."""
    shape = _stack_shape(module, name)
    if shape is None or a[0] % shape[0]:
        return None
    count, rows, columns = shape
    plain, flipped = (b[0], a[1]) == (rows, columns), (a[1], b[0]) == (rows, columns)
    if not plain and not flipped:
        return None
    return count, flipped and (not plain or _flipped_beside(module, name))


def _flipped_beside(module: Module, name: str) -> bool:
    """Whether a stack of square matrices holds them (in, out), by the stack beside it: what goes
    up into ``gate_up`` comes down again."""
    for other in module.targets:
        beside = f"{module.name}.{other.rpartition('.')[2]}"
        if beside == name or not module.find(beside):
            continue
        one, two = _stack_shape(module, name), _stack_shape(module, beside)
        if one and two and one[1] == one[2] and two[1] != two[2]:
            return (two[2] == one[1]) == name.endswith(("gate_up_proj", "input_linear.weight"))
    return bool(module.config.get("is_transposed"))


def _experts(
    module: Module, name: str, a: tuple[int, ...], b: tuple[int, ...]
) -> Iterator[Contribution]:
    """A factor pair for each of a stack of matrices: A (experts·r, in), B (out, r·experts)."""
    found = _stack(module, name, a, b)
    assert found is not None
    count, flip = found
    rank = a[0] // count
    scale = np.float32(scaling(module, rank, name))
    taken_out(module.config, module.folder.path)

    def factors() -> tuple[Matrix, Matrix]:
        right = module.load("lora_A").reshape(count, rank, -1)
        left = module.load("lora_B").reshape(b[0], rank, count).transpose(2, 0, 1) * scale
        left, right = (right.transpose(0, 2, 1), left.transpose(0, 2, 1)) if flip else (left, right)
        return np.ascontiguousarray(left), np.ascontiguousarray(right)

    pieces = module.find(name)
    if len(pieces) == 1 and pieces[0].hi is None:
        yield Contribution(
            pieces[0].tensor, ADD, lambda base, before: [Product(*factors())], stacked=True
        )
        return
    if flip:
        raise module.unfit(f"the base holds the experts' matrices as {b[0]} rows")
    kept = _Shared(factors)
    for piece in pieces:
        yield Contribution(piece.tensor, ADD, partial(_piece_of, kept, piece))


@dataclass(frozen=True)
class _Shared:
    """Factors that several tensors have parts of."""

    load: Callable[[], tuple[Matrix, Matrix]]

    def __call__(self) -> tuple[Matrix, Matrix]:
        return self.load()


def _piece_of(
    factors: Callable[[], tuple[Matrix, Matrix]],
    piece: Piece,
    base: Rows,
    before: Sequence[Step],
) -> Sequence[Step]:
    left, right = factors()
    part = np.ascontiguousarray(left[piece.group : piece.group + 1, piece.lo : piece.hi])
    product = Product(part, np.ascontiguousarray(right[piece.group : piece.group + 1]))
    return [Within(product, piece.at, part.shape[1])]


def _in_pieces(
    module: Module,
    pieces: Sequence[Piece],
    a: tuple[int, ...],
    b: tuple[int, ...],
    factors: Callable[[], tuple[Matrix, Matrix]],
) -> Iterator[Contribution]:
    """A matrix whose rows lie in several tensors, or in a part of one."""
    if "lora_magnitude_vector" in module.parts or taken_out(module.config, module.folder.path):
        raise CheckpointError(
            f"{module.folder.path}: the base holds {module.name!r} in other pieces than the "
            "adapter was trained on; merge it with peft first"
        )
    columns = {module.base.tensors[piece.tensor].shape[1:] for piece in pieces}
    if columns != {(a[1],)} or max(piece.hi or 0 for piece in pieces) != b[0]:
        raise module.unfit(f"its delta is of shape {(b[0], a[1])}")
    for piece in pieces:
        yield Contribution(piece.tensor, ADD, partial(_piece_of, factors, piece))
