"""What is in an export: sizes by component, schemes, kernels, inputs and outputs, files. Read from its manifest alone."""

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

# Component -> how the names of its tensors begin.
COMPONENTS = {
    "vision_tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.", "image_newline"),
    "language_model": ("language_model.model.layers.", "language_model.model.norm."),
    "lm_head": ("language_model.lm_head.",),
    "embeddings": ("language_model.model.embed_tokens.",),
}
_TABLES = (TIED_TABLE, ".position_embedding.weight")  # matrices that are looked up in, not multiplied with
_SCHEME = re.compile(r"W(\d+)A(\d+)(?: g(\d+))?")


@dataclass(frozen=True)
class Component:
    """Sizes of one part's weights. stored_bytes: in the .data files, with the weights' scales.

    A head that is tied to the embeddings has no parameters of its own, but the graph stores it a second time, transposed.
    """

    name: str
    parameters: int
    float16_bytes: int
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.stored_bytes / self.parameters if self.parameters else None


@dataclass(frozen=True)
class Linear:
    """shape: [out, in]. scheme: "W4A16 g128", "W8A8" or the float type. executed: as the engine was found to run it."""

    name: str
    component: str
    shape: tuple[int, ...]
    scheme: str
    quantized: bool
    executed: str | None


@dataclass(frozen=True)
class File:
    """A file, or a folder with the bytes of all its files. bytes, sha256: None when the manifest records none.

    state: "present", "verified", "missing", or "changed" when a size is not the manifest's.
    """

    role: str
    name: str
    bytes: int | None
    sha256: str | None
    state: str


@dataclass(frozen=True)
class Inspection:
    """verified: how many files were read and found as written; None when that was not asked for."""

    manifest: Manifest
    components: tuple[Component, ...]
    linears: tuple[Linear, ...]
    files: tuple[File, ...]
    verified: int | None

    @property
    def total(self) -> Component:
        fields = ("parameters", "float16_bytes", "stored_bytes")
        return Component("total", *(sum(getattr(c, field) for c in self.components) for field in fields))

    def summary(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        manifest = self.manifest
        checks = manifest.plan_check
        return {
            "manifest": str(manifest.path),
            "model": dict(manifest.model),
            "scheme": manifest.scheme,
            "float_type": manifest.float_type,
            "tied_head": manifest.config.text.tie_word_embeddings,
            "components": [_sizes(component) for component in self.components],
            "total": _sizes(self.total),
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
    """Reads the manifest of X.plan (or X.json); with `verify` every file too, calling progress(fraction).

    Raises UserError for a missing or damaged manifest and, with `verify`, for a file that is not as it was written.
    """
    if plan.suffix not in (".plan", ".json"):
        raise UserError(f"{plan}: give the .plan that qvlm-export wrote, or the .json beside it")
    manifest = read_manifest(plan.with_suffix(".json"))
    shapes = expected_shapes(manifest.config)
    components = component_sizes(manifest, shapes)
    linears = all_linears(manifest, shapes)
    verified = verify_files(manifest, progress) if verify else None
    files = tuple(_file(manifest, role, verified or ()) for role in manifest.files)
    return Inspection(manifest, components, linears, files, None if verified is None else len(verified))


def component_sizes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Component, ...]:
    """Sizes of every component; `shapes` are the model's tensors, a tied head not among them."""
    schemes = read_schemes(manifest, shapes)
    components = []
    for component in COMPONENTS:
        inside = {name: shape for name, shape in shapes.items() if component_of(name) == component}
        sizes = estimate_sizes(inside, schemes)
        copied = component_of(TIED_HEAD) == component and TIED_HEAD not in shapes
        stored = sizes.planned_bytes + (2 * math.prod(shapes[TIED_TABLE]) if copied else 0)
        components.append(Component(component, sum(map(math.prod, inside.values())), sizes.float16_bytes, stored))
    return tuple(components)


def read_schemes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LinearScheme]:
    """The scheme of every quantized linear. Raises UserError naming one that the model has not, or a scheme unknown here."""
    schemes = {}
    for name, text in manifest.linears.items():
        found = _SCHEME.fullmatch(text)
        if f"{name}.weight" not in shapes or found is None:
            raise UserError(f"{manifest.path}: the manifest is damaged (linear {name} as {text}); export again")
        weight_bits, activation_bits, group_size = (None if bits is None else int(bits) for bits in found.groups())
        try:
            schemes[name] = LinearScheme(weight_bits or 0, None if activation_bits == 16 else activation_bits, group_size)
        except SchemeError as error:
            raise UserError(f"{manifest.path}: the manifest is damaged ({name}: {error}); export again") from error
    return schemes


def all_linears(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Linear, ...]:
    """Every linear of the model, the quantized ones with what the plan check found."""
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
    """The component that a tensor of the checkpoint belongs to."""
    return next(component for component, beginnings in COMPONENTS.items() if tensor.startswith(beginnings))


def _file(manifest: Manifest, role: str, verified: Collection[Path]) -> File:
    entry, recorded = manifest.files[role], manifest.recorded(role)
    size = sum(facts["bytes"] for facts in recorded.values()) if recorded else None
    path = manifest.path.parent / entry["name"]
    if not path.exists():
        state = "missing"
    elif any(not part.exists() or part.stat().st_size != facts["bytes"] for part, facts in recorded.items()):
        state = "changed"
    else:
        state = "verified" if recorded and recorded.keys() <= set(verified) else "present"
    return File(role, entry["name"], size, entry.get("sha256"), state)


def _sizes(component: Component) -> dict[str, Any]:
    bits = component.bits_per_weight
    return {**asdict(component), "bits_per_weight": None if bits is None else round(bits, 3)}
