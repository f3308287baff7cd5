"""Short names of well-known repositories, for --model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """A repository on Hugging Face."""

    repository: str


TINY = "tiny"  # the model shipped with the package
ALIASES = {
    "llava-7b": Alias("llava-hf/llava-1.5-7b-hf"),
    "llava-13b": Alias("llava-hf/llava-1.5-13b-hf"),
}
