"""Going on with a block where it was: the same outputs as running it whole, each linear computing once."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.calibrators.block_search import BlockSearch, weighted_relative_error
from qvlm_export.calibrate.calibrators.candidate import QuantizedBlock
from qvlm_export.calibrate.calibrators.partial_forward import replace_with_cached
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.quantizer import fake_quantize

INT4 = LinearScheme(4, None, 32)
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TOWERS = {"clip": (CLIPEncoderLayer, CLIPVisionConfig), "siglip": (SiglipEncoderLayer, SiglipVisionConfig)}
DECODERS = {
    "llama": (LlamaDecoderLayer, LlamaConfig),
    "mistral": (MistralDecoderLayer, MistralConfig),
    "qwen2": (Qwen2DecoderLayer, Qwen2Config),
}
KINDS = (*TOWERS, *DECODERS)


def block(kind: str) -> tuple[nn.Module, Run]:
    torch.manual_seed(0)
    if kind in TOWERS:
        layer, config = TOWERS[kind]
        return layer(config(**VISION)).eval().requires_grad_(False), lambda module, x: module(x, attention_mask=None)
    layer, config = DECODERS[kind]
    rotary = LlamaRotaryEmbedding(LlamaConfig(**TEXT))

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        return module(x, attention_mask=None, position_ids=positions, position_embeddings=rotary(x, positions))

    return layer(config(**TEXT), 0).eval().requires_grad_(False), run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [W8A8, INT4])
@pytest.mark.parametrize("left_out", ["", "o_proj", "fc1", "up_proj"])
def test_a_block_gone_on_with_gives_what_it_gives_whole(kind, scheme, left_out):
    """Whatever is not planned, too; while the hooks that round inputs are there."""
    module, run = block(kind)
    inputs = [torch.randn(2, 9, 64), torch.randn(3, 5, 64)]
    plan = {n: scheme for n, m in module.named_modules() if isinstance(m, nn.Linear) and not (left_out and left_out in n)}
    search = BlockSearch(module, plan, run, SearchConfig("expected"))
    groups = [g for g in find_shared_inputs(module) if any(name in plan for name in g.linears)]
    with ExitStack() as hooks:
        candidate = QuantizedBlock(module, module, hooks)
        search._quantize(candidate, groups, inputs, inputs)  # hooks are gone when `search` returns
        resumed = search._resumed(candidate, inputs)
        whole = [run(candidate.rounded, x) for x in inputs]
    assert weighted_relative_error(resumed, whole) < 1e-6  # a value between two codes may fall to either


class Products(TorchFunctionMode):
    """Inside, what linears are given is counted. values: by the number of their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, int] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            self.values[id(args[1])] = self.values.get(id(args[1]), 0) + args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_computes_once(kind):
    module, run = block(kind)
    inputs, attended = [torch.randn(2, 9, 64), torch.randn(3, 5, 64)], []
    plan = {n: INT4 for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    search = BlockSearch(module, plan, run, SearchConfig("none"))
    module.self_attn.register_forward_hook(lambda *_: attended.append(1))
    with Products() as products:
        search.search(inputs, inputs)
    assert len(attended) == len(inputs)  # to its end, in the float model; when o's output is known, not at all
    for name in plan:
        linear = module.get_submodule(name)
        assert products.values[id(linear.weight)] == 2 * (18 + 15) * linear.in_features  # in the float model, and here
    assert search.forwards == pytest.approx(2 * 5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_is_rounded_once_for_all_linears_that_read_it(kind, monkeypatch):
    """Once to search the codes by, once to compute with them."""
    module, run = block(kind)
    inputs, rounded = [torch.randn(2, 9, 64)], []
    plan = {n: W8A8 for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    for place in ("rounding.quantize_linears", "calibrators.block_search"):
        monkeypatch.setattr(
            f"qvlm_export.calibrate.{place}.fake_quantize", lambda x, *how: rounded.append(x) or fake_quantize(x, *how)
        )
    BlockSearch(module, plan, run, SearchConfig("none")).search(inputs, inputs)
    assert len(rounded) == 2 * len(find_shared_inputs(module))


def test_linears_are_back_in_their_places_after_an_error():
    module, run = block("llama")
    linear = module.self_attn.o_proj
    with suppress(StopIteration), replace_with_cached(module, {"self_attn.o_proj": [torch.zeros(1, 4, 64)]}):
        run(module, torch.zeros(1, 4, 64))
        assert module.self_attn.o_proj is not linear
        run(module, torch.zeros(1, 4, 64))
        raise AssertionError("more outputs than there are")
    assert module.self_attn.o_proj is linear
