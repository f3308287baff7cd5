"""What a quantized linear is: its bits and groups. Plain data, no torch.

Names follow the field: W4A16 is 4-bit weights with 16-bit (float) activations, W8A8 is 8-bit both.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvlm_export.calibrate.errors import UserError

GROUP_SIZES = (128, 64)  # what TensorRT fuses into an INT4 GEMM
WEIGHT_BITS = (3, 4, 6, 8)
ACTIVATION_BITS = (None, 4, 6, 8)
FLOAT_BITS = 16  # what float activations are called
GROUPED_BITS = 4  # weights of so many bits or fewer have a scale per group
_ALLOWED = "weights have 3, 4, 6 or 8 bits, activations 4, 6, 8 or 16"
_NAMES = {f"W{w}A{a or FLOAT_BITS}": (w, a) for w in WEIGHT_BITS for a in ACTIVATION_BITS}


class SchemeError(UserError):
    """A linear cannot have the scheme it was given."""


@dataclass(frozen=True)
class LinearScheme:
    """How one linear is quantized. Symmetric, zero-point 0.

    weight_bits: 3 or 4 (one scale per `group_size` inputs and output), 6 or 8 (one scale per output).
    activation_bits: None for float activations; 4, 6 or 8 for one static per-tensor scale.
    """

    weight_bits: int
    activation_bits: int | None
    group_size: int | None

    def __post_init__(self) -> None:
        if self.weight_bits not in WEIGHT_BITS or self.activation_bits not in ACTIVATION_BITS:
            raise SchemeError(f"{self.name}: {_ALLOWED}")
        if (self.weight_bits <= GROUPED_BITS) != (self.group_size is not None):
            raise SchemeError(f"{self.name}: group_size belongs to 3-bit and 4-bit weights and to them only")

    @property
    def name(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits or FLOAT_BITS}"

    @property
    def deployable(self) -> bool:
        """Whether TensorRT has an integer kernel for it: INT4 is weight-only, INT8 needs 8 bits on both sides."""
        return (self.weight_bits, self.activation_bits) in ((4, None), (8, 8))

    @property
    def qmax(self) -> int:
        """Largest code of a weight."""
        return int(2 ** (self.weight_bits - 1) - 1)

    @property
    def qmin(self) -> int:
        """Grouped weights use all codes; per-channel ones leave out the lowest, as TensorRT's INT8 products do."""
        return -self.qmax - 1 if self.weight_bits <= GROUPED_BITS else -self.qmax

    @property
    def stored_bits(self) -> int:
        """Bits of a code in a graph: grouped weights lie in INT4, the others in INT8, of which 3 and 6 bits use a part."""
        return 8 if self.group_size is None else 4

    @property
    def scale_bytes(self) -> int:
        """Bytes of a weight's scale: float16 for groups, float32 for output channels."""
        return 4 if self.group_size is None else 2

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, ...]:
        """Weight [out, in] -> shape of its scales: [out, in // group_size] or [out]."""
        out_features, in_features = weight_shape
        return (out_features,) if self.group_size is None else (out_features, in_features // self.group_size)


W8A8 = LinearScheme(weight_bits=8, activation_bits=8, group_size=None)


def parse_scheme_bits(name: str) -> tuple[int, int | None]:
    """Bits of weights and activations in a name such as W4A16; None for float activations, which are called 16.

    Raises SchemeError for bits that no linear can have.
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
    """The scheme of these bits for a weight [out, in], with the first of `group_sizes` that divides its inputs.

    Raises SchemeError naming the linear when none does, or when an odd number of outputs cannot be packed in pairs.
    """
    if weight_bits > GROUPED_BITS:
        return LinearScheme(weight_bits, activation_bits, None)
    out_features, in_features = weight_shape
    refused = f"so it cannot have {weight_bits}-bit weights; use --scheme int8, or a recipe that leaves it out"
    if out_features % 2:
        raise SchemeError(f"{name}: its {out_features} outputs are odd, {refused}")
    for group_size in group_sizes:
        if in_features % group_size == 0:
            return LinearScheme(weight_bits, activation_bits, group_size)
    tried = " nor ".join(str(g) for g in group_sizes)
    raise SchemeError(f"{name}: {tried} does not divide its {in_features} inputs, {refused}")


MAX_FLOAT16 = 65504.0
