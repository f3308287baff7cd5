"""The model families and the layouts of checkpoints: one row each, no branches elsewhere.

A layout says how stored tensor names become the canonical ones (those of the llava-hf 1.5 repositories, which the graphs
are declared with), and what a checkpoint needs before it looks as llava-hf would have written it. A family says which
towers and decoders such a checkpoint may hold, and whether pictures are cut into tiles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, PreTrainedConfig, VipLlavaConfig

from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints import author_layout as original
from qvlm_export.checkpoints.author_processor import make_processor


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is read. The first row of which config.json has one of the `marks` is taken; no marks: any.

    renames: pattern and replacement. convert: config.json as it stands, its folder -> config.json as llava-hf would have
    written it. open_source: the checkpoint's own tensors by canonical names, config.json as it stands, its folder -> all
    tensors of the converted checkpoint. make_processor: folder -> a processor of transformers. All raise UserError; None
    where nothing is to be done.
    """

    name: str
    renames: tuple[tuple[str, str], ...]
    marks: tuple[str, ...] = ()
    convert: Callable[[Mapping[str, Any], Path], dict[str, Any]] | None = None
    open_source: Callable[[TensorSource, Mapping[str, Any], Path], TensorSource] | None = None
    make_processor: Callable[[Path], Any] | None = None


@dataclass(frozen=True)
class Family:
    """model_type: as in config.json, of which `config_class` is transformers' own. towers, decoders: the model_types
    allowed inside. tiled: whether pictures are cut into tiles; single_when_many: unless several come in one turn.
    """

    name: str
    model_type: str
    config_class: type[PreTrainedConfig]
    towers: tuple[str, ...]
    decoders: tuple[str, ...]
    tiled: bool = False
    single_when_many: bool = False


LAYOUTS = (
    Layout(
        name="authors",
        marks=original.MARKS,
        renames=(
            (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
            (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
            (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
            (r"^model\.mm_projector\.(?=weight|bias)", "multi_modal_projector.linear_1."),
            (r"^model\.image_newline$", "image_newline"),
            (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
        ),
        convert=original.convert_config,
        open_source=original.open_source,
        make_processor=make_processor,
    ),
    Layout(
        name="transformers",  # names of transformers 5, and of older releases, which llava-hf's repositories have
        renames=(
            (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
            (r"^model\.language_model\.(?!model\.)", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
    ),
)

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
FAMILIES = (
    Family("LLaVA 1.5, BakLLaVA, LLaVA-Interleave", "llava", LlavaConfig, (CLIP, SIGLIP), ("llama", "mistral", "qwen2")),
    Family("VIP-LLaVA", "vipllava", VipLlavaConfig, (CLIP,), ("llama",)),
    Family("LLaVA-NeXT (1.6)", "llava_next", LlavaNextConfig, (CLIP,), ("llama", "mistral", "qwen2"), tiled=True),
    Family(
        "LLaVA-OneVision",
        "llava_onevision",
        LlavaOnevisionConfig,
        (SIGLIP,),
        ("qwen2",),
        tiled=True,
        single_when_many=True,
    ),
)


def find_layout(config: Mapping[str, Any]) -> Layout:
    """The row of a config.json."""
    return next(layout for layout in LAYOUTS if not layout.marks or any(mark in config for mark in layout.marks))


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The row of a config.json in transformers' form. Raises UserError naming what was found and what is supported."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    supported = "; ".join(f"{family.model_type} ({family.name})" for family in FAMILIES)
    architectures = config.get("architectures")
    named = f" ({', '.join(map(str, architectures))})" if isinstance(architectures, list) and architectures else ""
    raise UserError(
        f"{where}: model_type is {model_type!r}{named}, which is no supported LLaVA; supported: {supported}; and those of "
        "LLaVA's authors, whose config.json has mm_vision_tower"
    )


def renamer(layout: Layout) -> Callable[[str], str | None]:
    """Stored tensor name -> canonical name; None for buffers that old checkpoints carry and nobody reads."""
    patterns = [(re.compile(pattern), to) for pattern, to in layout.renames]

    def rename(name: str) -> str | None:
        if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            return None
        for pattern, to in patterns:
            name = pattern.sub(to, name)
        return name

    return rename
