"""Partial forward passes from cached outputs: the same outputs as one whole run, with every linear computing once."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest
import torch
from random_blocks import KINDS, make_block
from torch import nn
from torch.overrides import TorchFunctionMode

from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.calibrators.partial_forward import replace_with_cached
from qvlm_export.calibrate.calibrators.quantized_block import QuantizedBlock
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.quantizer import fake_quantize
from qvlm_export.calibrate.quantization.tokens import mean_token_error

INT4 = LinearScheme(4, None, 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [W8A8, INT4])
@pytest.mark.parametrize("left_out", ["", "o_proj", "fc1", "up_proj"])
def test_a_block_run_from_cached_outputs_equals_the_whole_run(kind, scheme, left_out):
    """Also where some linears stay float; run while the hooks that fake-quantize inputs are there."""
    module, run = make_block(kind)
    inputs = [torch.randn(2, 9, 64), torch.randn(3, 5, 64)]
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    schemes = {name: scheme for name in linears if not (left_out and left_out in name)}
    search = BlockSearch(module, schemes, run, SearchConfig("expected"))
    shared_inputs = [s for s in find_shared_inputs(module) if any(name in schemes for name in s.linears)]
    with ExitStack() as hooks:
        block = QuantizedBlock(module, hooks)
        search._quantize_module(block, shared_inputs, inputs, inputs)  # hooks are gone when `search` returns
        from_cached = search._run_from_cached(block, inputs)
        whole = [run(block.module, x) for x in inputs]
    assert mean_token_error(from_cached, whole) < 1e-6  # a value between two codes may fall to either


class CountLinearInputs(TorchFunctionMode):
    """Counts the values that linears read while it is active. values: by the id of the linear's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, int] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            self.values[id(args[1])] = self.values.get(id(args[1]), 0) + args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_computes_once(kind):
    module, run = make_block(kind)
    inputs, attention_calls = [torch.randn(2, 9, 64), torch.randn(3, 5, 64)], []
    schemes = {n: INT4 for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    search = BlockSearch(module, schemes, run, SearchConfig("none"))
    module.self_attn.register_forward_hook(lambda *_: attention_calls.append(1))
    with CountLinearInputs() as counter:
        search.search(inputs, inputs)
    # Attention completes in the float run only: afterwards it stops at o_proj, or its output is cached.
    assert len(attention_calls) == len(inputs)
    for name in schemes:
        linear = module.get_submodule(name)
        assert counter.values[id(linear.weight)] == 2 * (18 + 15) * linear.in_features  # once in float, once quantized
    assert search.forwards == pytest.approx(2 * 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_input_is_fake_quantized_once_for_all_its_linears(kind, monkeypatch):
    """Once on some rows to see whether 8 bits can hold it, once to choose the codes, once to compute the outputs."""
    module, run = make_block(kind)
    inputs, calls = [torch.randn(2, 9, 64)], []
    schemes = {n: W8A8 for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    for place in ("rounding.quantize_linears", "calibrators.block_search"):
        monkeypatch.setattr(
            f"qvlm_export.calibrate.{place}.fake_quantize",
            lambda x, *quantizer: calls.append(x) or fake_quantize(x, *quantizer),
        )
    BlockSearch(module, schemes, run, SearchConfig("none")).search(inputs, inputs)
    assert len(calls) == 3 * len(find_shared_inputs(module))


def test_replaced_linears_are_restored_after_an_error():
    module, run = make_block("llama")
    linear = module.self_attn.o_proj
    with suppress(StopIteration), replace_with_cached(module, {"self_attn.o_proj": [torch.zeros(1, 4, 64)]}):
        run(module, torch.zeros(1, 4, 64))
        assert module.self_attn.o_proj is not linear
        run(module, torch.zeros(1, 4, 64))
        raise AssertionError("more outputs than there are")
    assert module.self_attn.o_proj is linear
