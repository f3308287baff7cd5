"""Engine precision check: reads from a TensorRT-RTX plan which operand types each linear is really executed with.

A plan and the scheme of every quantized linear go in, a `LinearCheck` of every linear comes out. TensorRT may build a Q/DQ
graph and yet multiply in float16, and only the plan shows it.

TensorRT-RTX plans carry readable programs: a header, typed descriptors of all tensors, and `main` with every operation, its
inputs and the ONNX nodes it came from. INT8 products appear as `fully_connected`, INT4 ones as `runtime_fusion` with a gemm
backbone. The inside of such a fusion is a program of its own, marked by the region of its constants, and is left out of the
check. The text is undocumented (observed in TensorRT-RTX 1.7), so a plan without it is an error, not a pass.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError

_DESCRIPTORS, _MAIN, _END = b"\ndescriptors {\n", b"\nmain {\n", b"\n}\n"
_FUSION_MARK = b"name=runtime-fusion-consts"
_TENSOR = re.compile(rb'tensor=\{[^\n]*?name="([^"]+)"[^\n]*?type=(\w+)')
_GEMM = re.compile(rb"^\s*(fully_connected|runtime_fusion)=\{ ([^\n]*)$", re.MULTILINE)
_INPUTS = re.compile(rb" input(?:_args)?=\{([^}]*)\}")
_OUTPUTS = re.compile(rb" output(?:_args)?=\{([^}]*)\}")
_LAYER = re.compile(rb"\[ONNX Layer: ([^\]]+)\]")
_QUOTED = re.compile(rb'"([^"]+)"')
_INDEX_TYPES = {"int64", "int32", "bool"}
MAX_PROGRAM_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Gemm:
    """One matrix product of the engine: the linears it computes and the types of its operands and result."""

    linears: tuple[str, ...]
    operands: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class LinearCheck:
    """The result of the check of one linear.

    scheme: name of its scheme, such as W4A16. executed: types that the engine computes with, such as
    "half x int4 -> half" or "int8 x int8 -> float". passed: whether these are the types that the scheme asks for.
    """

    linear: str
    scheme: str
    executed: str
    passed: bool


def read_gemms(plan: Path) -> list[Gemm]:
    """Returns every matrix product that the programs in a plan execute, in their order.

    Raises UserError when the file holds no program text that this reader knows.
    """
    gemms: list[Gemm] = []
    programs: list[tuple[bytes, bytes, bytes]] = []
    if plan.stat().st_size:  # an empty file cannot be mapped
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            programs = list(_find_programs(data))
    if not programs:
        raise UserError(
            f"{plan.name}: holds no readable program, so what it executes cannot be proven; "
            "build with TensorRT-RTX 1.7, the version whose plans this check knows"
        )
    for header, descriptors, main in programs:
        if _FUSION_MARK not in header:
            gemms += _parse_gemms(descriptors, main)
    return gemms


def check_engine_precision(plan: Path, schemes: Mapping[str, LinearScheme]) -> list[LinearCheck]:
    """Compares what the plan executes with `schemes` (linear -> scheme); returns one check of each, in the same order.

    Raises UserError when the plan holds no readable program.
    """
    executed: dict[str, list[Gemm]] = {}
    for gemm in read_gemms(plan):
        for linear in gemm.linears:
            executed.setdefault(linear, []).append(gemm)
    return [_check_linear(name, scheme, executed.get(name, [])) for name, scheme in schemes.items()]


def require_integer_products(plan: Path, checks: list[LinearCheck]) -> None:
    """Raises UserError, naming the first linear that failed, when any linear does not run as its scheme asks."""
    failed = [c for c in checks if not c.passed]
    if failed:
        first = failed[0]
        raise UserError(
            f"{plan.name}: {len(failed)} of {len(checks)} quantized linears do not run as they should; {first.linear} is "
            f"{first.scheme} but the engine executes {first.executed}; report this with the TensorRT version"
        )


def _find_programs(data: mmap.mmap) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yields (header, descriptors, main) of each program in the plan."""
    start = data.find(_DESCRIPTORS)
    while start >= 0:
        header_start = data.rfind(b"header {", max(0, start - MAX_PROGRAM_BYTES), start)
        end = data.find(_END, start)
        main = data.find(_MAIN, start)
        if end < 0 or main < 0 or header_start < 0 or main - start > MAX_PROGRAM_BYTES:
            return
        main_end = data.find(_END, main)
        yield data[header_start:start], data[start:end], data[main:main_end]
        start = data.find(_DESCRIPTORS, main_end)


def _parse_gemms(descriptors: bytes, main: bytes) -> list[Gemm]:
    tensor_types = {name: kind.decode() for name, kind in _TENSOR.findall(descriptors)}
    gemms = []
    for kind, arguments in _GEMM.findall(main):
        inputs, outputs = _INPUTS.search(arguments), _OUTPUTS.search(arguments)
        if inputs is None or outputs is None or (kind == b"runtime_fusion" and b"backbone=gemm" not in arguments):
            continue
        operand_types = [tensor_types.get(n, "unknown") for n in _QUOTED.findall(inputs.group(1))]
        output_types = [tensor_types.get(n, "unknown") for n in _QUOTED.findall(outputs.group(1))]
        # Index and shape arguments, and the alpha and beta of a plain product, are not operands.
        operands = operand_types[:2] if kind == b"fully_connected" else [t for t in operand_types if t not in _INDEX_TYPES]
        linears = tuple(name.decode() for name in _LAYER.findall(arguments))
        gemms.append(Gemm(linears, tuple(operands), output_types[0] if output_types else "unknown"))
    return gemms


def _check_linear(name: str, scheme: LinearScheme, gemms: list[Gemm]) -> LinearCheck:
    if not gemms:
        return LinearCheck(name, scheme.name, "nothing under this name", False)
    as_it_should = _is_int4 if scheme.group_size is not None else _is_int8 if scheme.activation_bits else _is_int8_weight
    passed = scheme.deployable and all(as_it_should(g) for g in gemms)
    reported = next((g for g in gemms if not as_it_should(g)), gemms[0])
    return LinearCheck(name, scheme.name, _describe(reported), passed)


def _is_int4(gemm: Gemm) -> bool:
    """Returns whether a float16 or bfloat16 activation meets an int4 weight, which is dequantized inside the product."""
    return len(gemm.operands) >= 2 and gemm.operands[1] == "int4" and gemm.operands[0] in ("half", "bfloat16", "bf16")


def _is_int8_weight(gemm: Gemm) -> bool:
    """Returns whether a float16 or bfloat16 activation meets an int8 weight, which is dequantized inside the product.

    Such a product reads the scales between its two operands.
    """
    return gemm.operands[:1] in (("half",), ("bfloat16",), ("bf16",)) and gemm.operands[1:] == ("float", "int8")


def _is_int8(gemm: Gemm) -> bool:
    """Returns whether both operands are int8 and the result is float32 or int32; float16 would overflow on the raw sums."""
    return gemm.operands[:2] == ("int8", "int8") and gemm.output in ("float", "int32")


def _describe(gemm: Gemm) -> str:
    operands = (gemm.operands[0], gemm.operands[2]) if _is_int8_weight(gemm) else gemm.operands[:2]
    return " x ".join(operands) + f" -> {gemm.output}"
