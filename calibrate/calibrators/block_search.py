"""Block-wise post-training quantization: equalization, clipping ranges and error-compensating rounding, block by block.

A block's quantized-model inputs X_q come from the already quantized preceding blocks; the target is always the output that
the float model computes from its own inputs X. Linears that share an input are quantized together, in the order in which the
block computes them, so that each reads what the quantized linears before it really produce.

Cost in block forwards, a forward being one prompt or image through the block: 1 float run that records every shared input,
and 1 quantized run from shared input to shared input, in which every linear computes once (`partial_forward.py`). Both are
counted at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import DecoderRun, Run
from qvlm_export.calibrate.blockwise.job import check_rows
from qvlm_export.calibrate.blockwise.shared_inputs import (
    SharedInput,
    find_channel_sharing,
    find_shared_inputs,
    list_linears,
    list_linears_before,
    share_of_weights,
)
from qvlm_export.calibrate.calibrators.partial_forward import (
    drop_inside,
    is_cached,
    record_inputs,
    run_from_cached,
    run_until,
    split_rows,
)
from qvlm_export.calibrate.calibrators.quantized_block import Probe, QuantizedBlock
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import FLOAT16, LinearScheme
from qvlm_export.calibrate.numerics.matmul import apply_linear, matmul
from qvlm_export.calibrate.numerics.memory import trim_heap
from qvlm_export.calibrate.quantization.activation_range import check_range, observe_magnitudes
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.equalize import (
    EqualizationInputs,
    apply_equalization_,
    choose_factors,
    gather_inputs,
)
from qvlm_export.calibrate.quantization.observers import observe_rows
from qvlm_export.calibrate.quantization.quantizer import fake_quantize
from qvlm_export.calibrate.rounding.activation_error import (
    FALLBACK_BITS,
    MAX_ACTIVATION_ERROR,
    BlockOutput,
    measure_activation_error,
    measure_output,
    probed_rows,
)
from qvlm_export.calibrate.rounding.output_hessian import root_output_importance, scale_output_hessian
from qvlm_export.calibrate.rounding.quantize_linears import (
    WIDE_INPUT,
    LayerInputs,
    choose_input_scale,
    predict_input_scale,
    quantize_linears,
    select_rows,
)

VALUES = "self_attn.v_proj"  # whose outputs are in a key/value cache
SQNR_ROWS = 128  # input rows on which the SQNR of a linear's output is measured


@dataclass
class BlockSearch:
    """The search of one block; afterwards it holds the quantized block and how many forwards it took.

    schemes: by name inside the block, of the linears to quantize; the others stay float.
    token_weights: weight of the errors at each token, float32 [B, tokens] of every batch, by the first linear of each shared
    input; empty where all tokens weigh the same.
    sample_numbers: int64 [B] of every batch, the number of the sample whose images an input is about; None where every input
    has its own.
    labels: int64 [B, tokens] of every batch, TokenLabel values, for the record; None where all tokens are of one kind.
    output_hessians: by linear; needed for Kronecker-factored rounding.
    prefix: canonical name of the block in the model, for error messages.
    strict: whether linears keep their schemes even where 8 bits cannot hold their input.
    largest_activations: as from `observe_magnitudes`, in the float block and in the quantized one.
    output: of the float block, the unit of `activation_errors`.
    activation_errors: by linear, what rounding its shared input to 8 bits adds to the block's output, as a share of its
    squared norm.
    quantized: what `search` found; None before, and where nothing is quantized.
    """

    module: nn.Module
    schemes: Mapping[str, LinearScheme]
    run: Run
    config: SearchConfig
    token_weights: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    sample_numbers: Sequence[torch.Tensor] | None = None
    labels: Sequence[torch.Tensor] | None = None
    output_hessians: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prefix: str = ""
    strict: bool = False
    forwards: float = 0
    largest_activations: Mapping[str, float] = field(default_factory=dict)
    output: BlockOutput = field(default_factory=lambda: BlockOutput(torch.zeros(0), 0.0))
    activation_errors: dict[str, float] = field(default_factory=dict)
    quantized: QuantizedBlock | None = None

    def search(
        self, float_inputs: list[torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Quantizes the linears in `schemes`; returns the outputs of the float block and of the quantized block.

        float_inputs: the block's inputs X in the float model; inputs: X_q, from the already quantized preceding blocks. All
        are batches, float32 [B, tokens, width]. Raises UserError naming linear and sample where an input is not finite, or
        where activations are beyond the range of the graph's float type.
        """
        with observe_magnitudes(self.module) as self.largest_activations:
            outputs = self._search(float_inputs, inputs)
        float_type = next((scheme.float_type for scheme in self.schemes.values()), FLOAT16)
        check_range(self.prefix, self.largest_activations, float_type)
        return outputs

    def _search(
        self, float_inputs: list[torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Does what `search` says, but looks at no range."""
        shared_inputs = [s for s in find_shared_inputs(self.module) if any(name in self.schemes for name in s.linears)]
        if not shared_inputs:
            return self._run_batches(self.module, float_inputs), self._run_batches(self.module, inputs)
        with ExitStack() as hooks:
            return self._search_with_hooks(shared_inputs, float_inputs, inputs, hooks)

    def _search_with_hooks(
        self,
        shared_inputs: list[SharedInput],
        float_inputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        hooks: ExitStack,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Does what `search` says; `hooks` takes the hooks that fake-quantize inputs of linears."""
        self.quantized = QuantizedBlock(self.module, hooks, dict(self.output_hessians))
        # Equalization leaves the function of the float module as it is, so its outputs are the float model's.
        float_outputs = self._quantize_module(self.quantized, shared_inputs, float_inputs, inputs)
        outputs = self._run_from_cached(self.quantized, inputs)
        self.quantized.outputs.clear()
        return float_outputs, outputs

    def fallbacks(self) -> list[str]:
        """Returns the linears whose input stays float although their scheme has 8 bits for it, by names inside the block."""
        return [name for name, linear in self.quantized_linears().items() if linear.scheme != self.schemes[name]]

    def quantized_linears(self) -> dict[str, QuantizedLinear]:
        """Returns the quantized linears by name inside the block."""
        return {} if self.quantized is None else self.quantized.linears

    def prefix_values(self) -> torch.Tensor | None:
        """Returns the prefix's values in this decoder layer, divided as v_proj was equalized; None without a prefix."""
        return self.run.values if isinstance(self.run, DecoderRun) else None

    def float_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that stay float, by name inside the block, as equalized."""
        linears = self.quantized_linears()
        return {n: p.detach() for n, p in self.module.named_parameters() if n.removesuffix(".weight") not in linears}

    def _quantize_module(
        self,
        block: QuantizedBlock,
        shared_inputs: list[SharedInput],
        float_inputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Equalizes the block and quantizes its linears, in place; returns the float outputs."""
        float_rows, streams, float_outputs = self._record_float_run(block.module, shared_inputs, float_inputs)
        for shared in shared_inputs:
            check_rows(f"{self.prefix}.{shared.linears[0]}", float_rows[shared], float_inputs, self.sample_numbers)
        self.output, weights = measure_output(float_outputs)
        if self.config.token_weighting == "output":
            self.token_weights = dict.fromkeys((shared.linears[0] for shared in shared_inputs), weights)
        for shared in shared_inputs:
            float_rows[shared] /= self._equalize(block, shared, float_rows[shared])
        for shared in shared_inputs:
            quantized_rows, stream = self._run_to_input(block, shared, inputs)
            check_rows(f"{self.prefix}.{shared.linears[0]}", quantized_rows, inputs, self.sample_numbers)
            if quantized_rows.shape[1] >= WIDE_INPUT:  # its matrices take more memory than everything before
                trim_heap()
            gap = _subtract(streams.pop(shared), stream) if shared in streams else None
            del stream
            rows = LayerInputs(float_rows.pop(shared), quantized_rows, self._row_weights(shared), gap)
            self._quantize_shared_input(block, shared, rows, inputs)
            del quantized_rows, gap, rows
        return float_outputs

    def _equalize(self, block: QuantizedBlock, shared: SharedInput, rows: torch.Tensor) -> torch.Tensor:
        """Applies the best equalization factors to the float module; returns the divisor of each input channel, [in].

        rows: the shared input in the float model, float32 [tokens, in].
        """
        module = block.module
        if shared.preceding is None:
            return torch.ones(rows.shape[1], device=rows.device)
        scheme, names = _find_deciding_scheme(shared, self.schemes)
        weight = important = torch.cat([get_linear(module, name).weight for name in names])
        if self.config.by_output():  # a factor should suit the outputs whose errors matter to the model's output
            hessians = [block.output_hessians[name] for name in names]
            important = weight * root_output_importance(hessians, weight.device)[:, None]
        statistics = gather_inputs(rows, select_rows(rows), self._row_weights(shared))
        sharing = find_channel_sharing(module, shared)
        choose = partial(choose_factors, self.config.equalization, shared.preceding, statistics, important, sharing=sharing)
        factors = choose(scheme)
        if factors is not None and scheme.activation_bits == FALLBACK_BITS and not self.strict:
            error = self._predict_activation_error(statistics, (weight, important), sharing.expand(factors))
            if error > MAX_ACTIVATION_ERROR:  # nothing is left to trade the weights' error against
                self.activation_errors |= dict.fromkeys(names, error)
                factors = choose(replace(scheme, activation_bits=None))
        if factors is None:
            return torch.ones(rows.shape[1], device=rows.device)
        if shared.preceding in block.output_hessians:
            block.output_hessians[shared.preceding] = scale_output_hessian(block.output_hessians[shared.preceding], factors)
        if shared.preceding == VALUES and isinstance(self.run, DecoderRun):
            self.run = self.run.divide_values(factors)
        return apply_equalization_(module, shared, factors, scheme.float_type)

    def _predict_activation_error(
        self, statistics: EqualizationInputs, weights: tuple[torch.Tensor, torch.Tensor], columns: torch.Tensor
    ) -> float:
        """About what `measure_activation_error` will find once the shared input is divided by `columns`, float32 [in].

        weights: float32 [out, in] of all linears together, as it is and with outputs multiplied by their importance.
        """
        weight, important = weights
        scale = predict_input_scale(self.config.linear, statistics, important, columns, FALLBACK_BITS)
        rows = statistics.tokens
        rows = rows[probed_rows(len(rows)).to(rows.device)] / columns
        rounding = (fake_quantize(rows, scale, FALLBACK_BITS) - rows) * columns
        return measure_activation_error(rounding, [weight], self.output)

    def _quantize_shared_input(
        self,
        block: QuantizedBlock,
        shared: SharedInput,
        rows: LayerInputs,
        inputs: list[torch.Tensor],
    ) -> None:
        """Quantizes the linears of a shared input and computes their outputs."""
        quantized_rows = rows.quantized_rows
        weights = {name: get_linear(block.module, name).weight for name in shared.linears if name in self.schemes}
        count = len(quantized_rows)
        chosen = torch.linspace(0, count - 1, min(SQNR_ROWS, count)).long().to(quantized_rows.device)
        roots = self.output.weights[chosen].sqrt()[:, None]
        block.probes |= {
            name: Probe(quantized_rows[chosen], matmul(rows.float_rows[chosen], weight.T), roots)
            for name, weight in weights.items()
        }
        schemes, rows = self._choose_schemes(weights, rows, block.output_hessians)
        block.set_(quantize_linears(weights, schemes, self.config.linear, rows, block.output_hessians))
        self._compute_outputs(block, shared, quantized_rows, inputs)
        labels = None if self.labels is None else torch.cat([batch.flatten() for batch in self.labels])
        block.inputs[shared.linears[0]] = observe_rows(shared.linears[0], quantized_rows, labels)

    def _choose_schemes(
        self, weights: Mapping[str, torch.Tensor], rows: LayerInputs, output_hessians: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, LinearScheme], LayerInputs]:
        """Returns the schemes of linears that share an input, with A16 instead of A8 where 8 bits cannot hold the input.

        That is known already where the input was equalized; else its rounding error is measured. All linears that share the
        input fall back, as they are computed together. The second result holds the input's scale, which is not searched
        again.
        """
        schemes = {name: self.schemes[name] for name in weights}
        quantizing = [name for name, scheme in schemes.items() if scheme.activation_bits == FALLBACK_BITS]
        if self.strict or not quantizing:
            return schemes, rows
        joined, bits = {name: weights[name] for name in quantizing}, FALLBACK_BITS
        error = max((self.activation_errors[name] for name in quantizing if name in self.activation_errors), default=None)
        if error is None:
            scale = choose_input_scale(self.config.linear, joined, rows, output_hessians, bits)
            inputs = rows.quantized_rows[probed_rows(len(rows.quantized_rows)).to(rows.quantized_rows.device)]
            error = measure_activation_error(fake_quantize(inputs, scale, bits) - inputs, joined.values(), self.output)
            rows = replace(rows, scales={bits: scale})
        self.activation_errors |= dict.fromkeys(quantizing, error)
        if error > MAX_ACTIVATION_ERROR:
            schemes |= {name: replace(schemes[name], activation_bits=None) for name in quantizing}
        return schemes, rows

    def _row_weights(self, shared: SharedInput) -> torch.Tensor | None:
        """Returns the token weight of each row of the shared input, float32 [tokens]; None where all weigh the same."""
        batches = self.token_weights.get(shared.linears[0])
        return None if batches is None else torch.cat([batch.flatten() for batch in batches])

    def _run_batches(self, module: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.forwards += sum(len(x) for x in inputs)
        return [self.run(module, x) for x in inputs]

    def _record_float_run(
        self, module: nn.Module, shared_inputs: Sequence[SharedInput], inputs: list[torch.Tensor]
    ) -> tuple[dict[SharedInput, torch.Tensor], dict[SharedInput, list[torch.Tensor]], list[torch.Tensor]]:
        """Runs `module` on all inputs; returns the rows [tokens, in] of each shared input, the residual streams that are to
        be matched, [tokens, width] of every batch, by the shared input of what is added to them, and the outputs."""
        rows: dict[SharedInput, list[torch.Tensor]] = {shared: [] for shared in shared_inputs}
        norms = {s: norm for s in shared_inputs if (norm := self._find_residual_norm(module, s)) is not None}
        streams: dict[SharedInput, list[torch.Tensor]] = {shared: [] for shared in norms}
        linears = {shared: module.get_submodule(shared.linears[0]) for shared in shared_inputs}
        with record_inputs(linears, rows), record_inputs(norms, streams):
            outputs = self._run_batches(module, inputs)
        return {shared: torch.cat(parts) for shared, parts in rows.items()}, streams, outputs

    def _find_residual_norm(self, module: nn.Module, shared: SharedInput) -> nn.Module | None:
        """Returns the norm whose input is the residual stream that is matched where the shared input's linear adds to it."""
        linear = self.config.linear
        if shared.residual is None or not linear.match_residual or linear.ridge is None:
            return None
        return module.get_submodule(shared.residual)

    def _run_to_input(
        self, block: QuantizedBlock, shared: SharedInput, inputs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the rows [tokens, in] of the shared input in the quantized block, without running what comes after it, and
        the residual stream that its linear adds to, [tokens, width] of every batch; empty where that is not matched."""
        module, cached = block.module, block.outputs
        norm, streams = self._find_residual_norm(module, shared), {shared: list[torch.Tensor]()}
        with record_inputs({} if norm is None else {shared: norm}, streams):
            rows = run_until(module, shared, self.run, inputs, cached)
        computed = [name for name in list_linears_before(module, shared) if not is_cached(name, cached)]
        self.forwards += share_of_weights(module, computed) * sum(len(x) for x in inputs)
        block.outputs = drop_inside(cached, shared.enclosing_module)
        return rows, streams[shared]

    def _compute_outputs(
        self, block: QuantizedBlock, shared: SharedInput, quantized_rows: torch.Tensor, inputs: list[torch.Tensor]
    ) -> None:
        """Caches the outputs of the shared input's linears, for the partial forwards that follow."""
        # By quantizer, so that an input is fake-quantized once for all linears that read it with the same one.
        fake_quantized: dict[tuple[float, int] | None, torch.Tensor] = {None: quantized_rows}
        for name in shared.linears:
            layer, quantizer = get_linear(block.module, name), block.input_quantizer(name)
            if quantizer is not None and quantizer not in fake_quantized:
                fake_quantized[quantizer] = fake_quantize(quantized_rows, *quantizer)
            rows = apply_linear(fake_quantized[quantizer], layer.weight, layer.bias)
            block.outputs[shared.enclosing_module or name] = split_rows(rows, inputs)
        self.forwards += share_of_weights(block.module, shared.linears) * sum(len(x) for x in inputs)

    def _run_from_cached(self, block: QuantizedBlock, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the block's outputs, computing only what is not cached."""
        outputs = run_from_cached(block.module, self.run, inputs, block.outputs)
        computed = [name for name in list_linears(block.module) if not is_cached(name, block.outputs)]
        self.forwards += share_of_weights(block.module, computed) * sum(len(x) for x in inputs)
        return outputs


def _subtract(stream: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
    """The difference of two residual streams, [tokens, width] of every batch, as one [tokens, width]."""
    return torch.cat([a - b for a, b in zip(stream, other, strict=True)])


def _find_deciding_scheme(shared: SharedInput, schemes: Mapping[str, LinearScheme]) -> tuple[LinearScheme, list[str]]:
    """Returns the scheme with the fewest bits, of activations first, and its linears: equalization is chosen for these.

    The other linears, and those that stay float, are multiplied by the same factors.
    """
    by_name = {name: schemes[name] for name in shared.linears if name in schemes}
    fewest = min(by_name.values(), key=lambda scheme: (scheme.activation_bits or 16, scheme.weight_bits))
    return fewest, [name for name, scheme in by_name.items() if scheme == fewest]
