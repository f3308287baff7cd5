"""Inspects an export: sizes by component, schemes, kernels, inputs and outputs, files.

Everything is read from the manifest; the files themselves are read only to verify their hashes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme, SchemeError
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.float_graphs import TIED_HEAD, TIED_TABLE, expected_shapes
from qvlm_export.engines.graph.weight_sizes import estimate_sizes
from qvlm_export.engines.manifest import Manifest, read_manifest, verify_files

# Component -> prefixes of the names of its tensors.
COMPONENTS = {
    "vision_tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.", "image_newline"),
    "language_model": ("language_model.model.layers.", "language_model.model.norm."),
    "lm_head": ("language_model.lm_head.",),
    "embeddings": ("language_model.model.embed_tokens.",),
}
_TABLES = (TIED_TABLE, ".position_embedding.weight")  # matrices whose rows are looked up, so no linears
_SCHEME = re.compile(r"W(\d+)A(\d+)(?: g(\d+))?")


@dataclass(frozen=True)
class Component:
    """Sizes of one component's weights.

    parameters: how many numbers there are. float16_bytes: their size in float16. stored_bytes: their size in the .data
    files, scales included. A head that is tied to the embeddings has no parameters and no bytes of its own.
    """

    name: str
    parameters: int
    float16_bytes: int
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits for each parameter, scales included; None without parameters."""
        return 8 * self.stored_bytes / self.parameters if self.parameters else None


@dataclass(frozen=True)
class Linear:
    """A linear of the model.

    shape: [out_features, in_features]. scheme: such as "W4A16 g128" or "W8A8", or the float type. executed: the operand
    types of its kernel, as the precision check found them in the engine; None where it was not checked.
    """

    name: str
    component: str
    shape: tuple[int, ...]
    scheme: str
    quantized: bool
    executed: str | None


@dataclass(frozen=True)
class File:
    """A file or folder of the export.

    role: its key in the manifest. bytes: its size; for a folder, the sum over its files. bytes and sha256 are None when the
    manifest does not record them. state: "present", "verified", "missing", or "changed" when a size is not the manifest's.
    """

    role: str
    name: str
    bytes: int | None
    sha256: str | None
    state: str


@dataclass(frozen=True)
class Inspection:
    """The contents of an export. verified: how many files have the recorded hash; None when they were not read."""

    manifest: Manifest
    components: tuple[Component, ...]
    linears: tuple[Linear, ...]
    files: tuple[File, ...]
    verified: int | None

    @property
    def total(self) -> Component:
        """The sizes of all components together."""
        fields = ("parameters", "float16_bytes", "stored_bytes")
        return Component("total", *(sum(getattr(c, field) for c in self.components) for field in fields))

    def summary(self) -> dict[str, Any]:
        """Returns everything as it is written as JSON."""
        manifest = self.manifest
        checks = manifest.plan_check
        return {
            "manifest": str(manifest.path),
            "model": dict(manifest.model),
            "scheme": manifest.scheme,
            "float_type": manifest.float_type,
            "tied_head": manifest.config.text.tie_word_embeddings,
            "components": [_component_json(component) for component in self.components],
            "total": _component_json(self.total),
            "linears": [asdict(linear) for linear in self.linears],
            "plan_check": {"checked": len(checks), "passed": sum(bool(check["passed"]) for check in checks)},
            "interface": dict(manifest.interface),
            "limits": asdict(manifest.limits),
            "calibration": dict(manifest.calibration),
            "backend": dict(manifest.backend),
            "versions": dict(manifest.versions),
            "files": [asdict(file) for file in self.files],
            "verified": self.verified,
        }


def inspect(plan: Path, verify: bool = False, progress: Callable[[float], None] = lambda _: None) -> Inspection:
    """Reads the manifest of the export X.plan (or X.json).

    verify: also reads every file and compares its hash, calling progress(fraction) meanwhile. Raises UserError for a missing
    or damaged manifest and, with `verify`, for a file that is not as it was written.
    """
    if plan.suffix not in (".plan", ".json"):
        raise UserError(f"{plan}: give the .plan that qvlm-export wrote, or the .json beside it")
    manifest = read_manifest(plan.with_suffix(".json"))
    shapes = expected_shapes(manifest.config)
    components = component_sizes(manifest, shapes)
    linears = all_linears(manifest, shapes)
    verified = verify_files(manifest, progress) if verify else None
    files = tuple(_inspect_file(manifest, role, verified or ()) for role in manifest.files)
    return Inspection(manifest, components, linears, files, None if verified is None else len(verified))


def component_sizes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Component, ...]:
    """Returns the sizes of every component. shapes: of the model's tensors by name, without a tied head."""
    schemes = read_schemes(manifest, shapes)
    components = []
    for component in COMPONENTS:
        tensors = {name: shape for name, shape in shapes.items() if component_of(name) == component}
        sizes = estimate_sizes(tensors, schemes)
        parameters = sum(map(math.prod, tensors.values()))
        components.append(Component(component, parameters, sizes.float16_bytes, sizes.quantized_bytes))
    return tuple(components)


def read_schemes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LinearScheme]:
    """Returns the scheme of every quantized linear. Raises UserError for an unknown scheme or a linear not in the model."""
    schemes = {}
    for name, text in manifest.linears.items():
        match = _SCHEME.fullmatch(text)
        if f"{name}.weight" not in shapes or match is None:
            raise UserError(f"{manifest.path}: the manifest is damaged (linear {name} as {text}); export again")
        weight_bits, activation_bits, group_size = (None if bits is None else int(bits) for bits in match.groups())
        try:
            schemes[name] = LinearScheme(weight_bits or 0, None if activation_bits == 16 else activation_bits, group_size)
        except SchemeError as error:
            raise UserError(f"{manifest.path}: the manifest is damaged ({name}: {error}); export again") from error
    return schemes


def all_linears(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Linear, ...]:
    """Returns every linear of the model, the quantized ones with the operand types that the engine check found."""
    executed = {check["linear"]: str(check["executed"]) for check in manifest.plan_check}
    with_head = {**shapes, TIED_HEAD: shapes[TIED_TABLE]}
    matrices = {n: s for n, s in with_head.items() if len(s) == 2 and n.endswith(".weight") and not n.endswith(_TABLES)}
    return tuple(
        Linear(
            linear := name.removesuffix(".weight"),
            component_of(name),
            shape,
            manifest.linears.get(linear, manifest.float_type),
            linear in manifest.linears,
            executed.get(linear),
        )
        for name, shape in matrices.items()
    )


def component_of(tensor: str) -> str:
    """Returns the component that a tensor of the checkpoint belongs to, by its canonical name."""
    return next(component for component, prefixes in COMPONENTS.items() if tensor.startswith(prefixes))


def _inspect_file(manifest: Manifest, role: str, verified: Collection[Path]) -> File:
    entry, recorded = manifest.files[role], manifest.recorded_files(role)
    size = sum(facts["bytes"] for facts in recorded.values()) if recorded else None
    path = manifest.path.parent / entry["name"]
    if not path.exists():
        state = "missing"
    elif any(not part.exists() or part.stat().st_size != facts["bytes"] for part, facts in recorded.items()):
        state = "changed"
    else:
        state = "verified" if recorded and recorded.keys() <= set(verified) else "present"
    return File(role, entry["name"], size, entry.get("sha256"), state)


def _component_json(component: Component) -> dict[str, Any]:
    bits = component.bits_per_weight
    return {**asdict(component), "bits_per_weight": None if bits is None else round(bits, 3)}
