"""What a quantized linear is: its bits and groups. Plain data, no torch.

Names follow the field: W4A16 is 4-bit weights with 16-bit (float) activations, W8A8 is 8-bit both.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibrate.errors import UserError

GROUP_SIZES = (128, 64)  # what TensorRT fuses into an INT4 GEMM


class SchemeError(UserError):
    """A linear cannot have the scheme it was given."""


@dataclass(frozen=True)
class LinearScheme:
    """How one linear is quantized.

    weight_bits: 4 (symmetric, one scale per `group_size` inputs and output) or 8 (one scale per output).
    activation_bits: None for float activations, 8 for one static per-tensor scale.
    """

    weight_bits: int
    activation_bits: int | None
    group_size: int | None

    def __post_init__(self) -> None:
        if (self.weight_bits, self.activation_bits) not in ((4, None), (8, 8)):
            raise SchemeError(f"{self.name} has no TensorRT kernel; use W4A16 or W8A8")
        if (self.weight_bits == 4) != (self.group_size is not None):
            raise SchemeError(f"{self.name}: group_size belongs to 4-bit weights and to them only")

    @property
    def name(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits or 16}"

    @property
    def qmax(self) -> int:
        """Codes lie in [-qmax, qmax] for 8 bits; 4 bits also use -8."""
        return int(2 ** (self.weight_bits - 1) - 1)

    @property
    def qmin(self) -> int:
        return -8 if self.weight_bits == 4 else -127

    def scale_shape(self, weight_shape: tuple[int, int]) -> tuple[int, ...]:
        """Weight [out, in] -> shape of its scales: [out, in // group_size] or [out]."""
        out_features, in_features = weight_shape
        return (out_features,) if self.group_size is None else (out_features, in_features // self.group_size)


W8A8 = LinearScheme(weight_bits=8, activation_bits=8, group_size=None)


def w4a16(name: str, weight_shape: tuple[int, ...], group_sizes: tuple[int, ...] = GROUP_SIZES) -> LinearScheme:
    """W4A16 for a weight [out, in] with the first of `group_sizes` that divides its inputs.

    Raises SchemeError naming the linear when none does, or when an odd number of outputs cannot be packed in pairs.
    """
    out_features, in_features = weight_shape
    if out_features % 2:
        raise SchemeError(f"{name}: its {out_features} outputs are odd, so they cannot be INT4; use --scheme int8")
    for group_size in group_sizes:
        if in_features % group_size == 0:
            return LinearScheme(weight_bits=4, activation_bits=None, group_size=group_size)
    tried = " nor ".join(str(g) for g in group_sizes)
    raise SchemeError(f"{name}: {tried} does not divide its {in_features} inputs, so it cannot be INT4; use --scheme int8")
