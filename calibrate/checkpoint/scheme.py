"""Quantization scheme of one linear: bits of weights and activations, and group size.

Names follow the field: W4A16 has 4-bit weights and 16-bit (float) activations, W8A8 has 8 bits for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvlm_export.calibrate.errors import UserError

GROUP_SIZES = (128, 64)  # what TensorRT fuses into an INT4 GEMM
WEIGHT_BITS = (3, 4, 6, 8)
ACTIVATION_BITS = (None, 4, 6, 8)
FLOAT_BITS = 16  # stands for float activations in names
GROUPED_BITS = 4  # weights of this many bits or fewer have one scale per group
MAX_FLOAT16 = 65504.0
FLOAT16, BFLOAT16 = "float16", "bfloat16"  # the float types of a graph
_ALLOWED = "weights have 3, 4, 6 or 8 bits, activations 4, 6, 8 or 16"
_NAMES = {f"W{w}A{a or FLOAT_BITS}": (w, a) for w in WEIGHT_BITS for a in ACTIVATION_BITS}


class SchemeError(UserError):
    """A linear cannot have the requested scheme."""


@dataclass(frozen=True)
class LinearScheme:
    """How one linear is quantized, symmetrically with zero-point 0.

    weight_bits: 3 or 4, with one scale per output and group of `group_size` inputs; 6 or 8, with one scale per output.
    activation_bits: 4, 6 or 8, with one static per-tensor scale; None for float activations. group_size: None for 6-bit and
    8-bit weights. float_type: that of the graph, of which scales have to be values. Raises SchemeError for other bits, or a
    group size that does not fit them.
    """

    weight_bits: int
    activation_bits: int | None
    group_size: int | None
    float_type: str = FLOAT16

    def __post_init__(self) -> None:
        if self.weight_bits not in WEIGHT_BITS or self.activation_bits not in ACTIVATION_BITS:
            raise SchemeError(f"{self.name}: {_ALLOWED}")
        if (self.weight_bits <= GROUPED_BITS) != (self.group_size is not None):
            raise SchemeError(f"{self.name}: group_size belongs to 3-bit and 4-bit weights and to them only")
        if self.float_type not in (FLOAT16, BFLOAT16):
            raise SchemeError(f"{self.name}: float_type is {self.float_type!r}, not {FLOAT16} or {BFLOAT16}")

    @property
    def name(self) -> str:
        """The name of its bits, such as W4A16; the group size is not part of it."""
        return f"W{self.weight_bits}A{self.activation_bits or FLOAT_BITS}"

    @property
    def deployable(self) -> bool:
        """Whether TensorRT has a kernel for it: INT4 is weight-only, INT8 weights meet INT8 or float activations."""
        return (self.weight_bits, self.activation_bits) in ((4, None), (8, 8), (8, None))

    @property
    def qmax(self) -> int:
        """The largest code of a weight."""
        return int(2 ** (self.weight_bits - 1) - 1)

    @property
    def qmin(self) -> int:
        """The smallest code of a weight.

        Grouped weights use all codes; per-channel ones leave out the lowest, as TensorRT's INT8 products do.
        """
        return -self.qmax - 1 if self.weight_bits <= GROUPED_BITS else -self.qmax

    @property
    def stored_bits(self) -> int:
        """Bits of a code in an ONNX graph: 3-bit and 4-bit weights are stored as INT4, 6-bit and 8-bit weights as INT8."""
        return 8 if self.group_size is None else 4

    @property
    def scale_bytes(self) -> int:
        """Bytes of one weight scale: float16 for groups, float32 for output channels."""
        return 4 if self.group_size is None else 2

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the scales of a weight [out, in]: [out, in // group_size] or [out]."""
        out_features, in_features = weight_shape
        return (out_features,) if self.group_size is None else (out_features, in_features // self.group_size)


W8A8 = LinearScheme(weight_bits=8, activation_bits=8, group_size=None)


def parse_scheme_bits(name: str) -> tuple[int, int | None]:
    """Bits of weights and of activations from a name such as W4A16, where A16 stands for float activations (None).

    Raises SchemeError for any other name.
    """
    if name not in _NAMES:
        raise SchemeError(f"{name}: {_ALLOWED}; write W4A16, for example")
    return _NAMES[name]


def fit_scheme(
    name: str,
    weight_shape: tuple[int, ...],
    weight_bits: int,
    activation_bits: int | None,
    group_sizes: tuple[int, ...] = GROUP_SIZES,
) -> LinearScheme:
    """The scheme with these bits for a weight [out, in]; grouped weights get the first of `group_sizes` that divides `in`.

    Raises SchemeError naming the linear when none divides it, or when an odd number of outputs cannot be packed in pairs.
    """
    if weight_bits > GROUPED_BITS:
        return LinearScheme(weight_bits, activation_bits, None)
    out_features, in_features = weight_shape
    consequence = f"so it cannot have {weight_bits}-bit weights; use --scheme int8, or a recipe that leaves it out"
    if out_features % 2:
        raise SchemeError(f"{name}: its {out_features} outputs are odd, {consequence}")
    for group_size in group_sizes:
        if in_features % group_size == 0:
            return LinearScheme(weight_bits, activation_bits, group_size)
    candidates = " nor ".join(str(g) for g in group_sizes)
    raise SchemeError(f"{name}: {candidates} does not divide its {in_features} inputs, {consequence}")
