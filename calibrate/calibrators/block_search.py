"""The search over one block after another: fold, choose ranges, round jointly towards the float block's output. torch.

Inputs of a block come from the already quantized prefix; the target is always the float model. A block's groups of linears
are done in the order they compute, so that each sees what the ones before it really produce.

Cost in block forwards, a forward being one prompt or picture: 1 float run that keeps every group's input, and 1 quantized
run from group to group, in which every linear computes once (`partial_forward.py`). Learning adds its own. All are counted
at run
time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.job import non_finite_error
from qvlm_export.calibrate.blockwise.shared_inputs import (
    SharedInput,
    find_channel_sharing,
    find_shared_inputs,
    list_linears,
    list_linears_before,
    share_of_weights,
)
from qvlm_export.calibrate.calibrators.candidate import QuantizedBlock
from qvlm_export.calibrate.calibrators.partial_forward import (
    drop_inside,
    is_cached,
    record_inputs,
    run_from_cached,
    run_until,
    split_rows,
)
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import apply_linear, matmul
from qvlm_export.calibrate.numerics.memory import trim_heap
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.equalize import apply_equalization_, choose_factors, gather_inputs
from qvlm_export.calibrate.quantization.observers import observe_rows
from qvlm_export.calibrate.quantization.quantizer import fake_quantize, squared_sum
from qvlm_export.calibrate.rounding.learned_rounding import Learned, learn_block, make_learning_batches
from qvlm_export.calibrate.rounding.output_hessian import error_directions, root_output_importance, scale_output_hessian
from qvlm_export.calibrate.rounding.quantize_linears import WIDE_INPUT, LayerInputs, quantize_linears, select_rows

MAX_INPUT = 1e15  # magnitude whose square float32 can still sum over a hundred million tokens
SQNR_ROWS = 128  # rows of a linear's input that its output's SQNR is taken of


@dataclass
class BlockSearch:
    """One block being searched. `best` and `learned` hold what was found; forwards and backwards are counted.

    influence: what errors at tokens count, float32 [B, tokens] of every batch, by the linear that a group begins with and
    under "" for the block's output; empty where all count alike. pictures: int64 [B] of every batch, of the sample whose
    pictures an input is about; None where every input has its own. metrics: by linear, and
    under "" for the block, of its output, for two-sided rounding. labels: int64 [B, tokens] of every batch, TokenLabel
    values, for the record; None for all alike. prefix: of the block in the model, for errors.
    """

    module: nn.Module
    schemes: Mapping[str, LinearScheme]  # by name inside the block
    run: Run
    method: SearchConfig
    token_weights: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    pictures: Sequence[torch.Tensor] | None = None
    labels: Sequence[torch.Tensor] | None = None
    output_hessians: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prefix: str = ""
    forwards: float = 0
    backwards: int = 0
    best: QuantizedBlock | None = None
    learned: Learned | None = None

    def search(
        self, float_inputs: list[torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Quantizes the block's planned linears; returns the float and the quantized outputs.

        Inputs and outputs are batches float32 [B, tokens, width].
        """
        groups = [g for g in find_shared_inputs(self.module) if any(name in self.schemes for name in g.linears)]
        if not groups:
            return self._outputs(self.module, float_inputs), self._outputs(self.module, inputs)
        with ExitStack() as hooks:
            return self._searched(groups, float_inputs, inputs, hooks)

    def _searched(
        self, groups: list[SharedInput], float_inputs: list[torch.Tensor], inputs: list[torch.Tensor], hooks: ExitStack
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        self.best = QuantizedBlock(self.module, self.module, hooks, dict(self.output_hessians))
        # The function of the folded module is the same, so its outputs are the float model's.
        wanted = self._quantize(self.best, groups, float_inputs, inputs)
        if not self.method.learn_steps:
            final = self._resumed(self.best, inputs)
            self.best.outputs.clear()
            return wanted, final
        self.best.outputs.clear()
        self._learn(self.best, inputs, wanted)
        return wanted, self._outputs(self.best.rounded, inputs)

    def found(self) -> dict[str, QuantizedLinear]:
        """The quantized linears by name inside the block."""
        return {} if self.best is None else self.best.found

    def floats(self) -> dict[str, torch.Tensor]:
        """The block's other tensors, by name inside it: as folded, or as learned."""
        module, found = self.module if self.best is None else self.best.module, self.found()
        folded = {n: p.detach() for n, p in module.named_parameters() if n.removesuffix(".weight") not in found}
        return folded if self.learned is None else {**folded, **self.learned.floats}

    def _quantize(
        self,
        candidate: QuantizedBlock,
        groups: list[SharedInput],
        float_inputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Folds the candidate and quantizes every group, in place; returns the float outputs."""
        wanted, outputs = self._capture(candidate.module, groups, float_inputs)
        for group in groups:
            self._check_rows(group, wanted[group], float_inputs)
            wanted[group] /= self._fold(candidate, group, wanted[group])
        if self.method.learn_steps:  # which starts from the float weights
            candidate.rounded = copy.deepcopy(candidate.module)
        for group in groups:
            seen = self._input_of(candidate, group, inputs)
            self._check_rows(group, seen, inputs)
            if seen.shape[1] >= WIDE_INPUT:  # its matrices take more than all that led there
                trim_heap()
            self._quantize_group(candidate, group, wanted.pop(group), seen, inputs)
        return outputs

    def _fold(self, candidate: QuantizedBlock, group: SharedInput, inputs: torch.Tensor) -> torch.Tensor:
        """Applies the best factors to its module; returns what the group's input channels were divided by."""
        module = candidate.module
        if group.preceding is None:
            return torch.ones(inputs.shape[1], device=inputs.device)
        scheme, decide = _deciding(group, self.schemes)
        weight = torch.cat([get_linear(module, name).weight for name in decide])
        if self.method.by_output():  # a factor has to suit the outputs whose errors count
            metrics = [candidate.output_hessians[name] for name in decide]
            weight.mul_(root_output_importance(metrics, weight.device)[:, None])
        rows = gather_inputs(inputs, select_rows(inputs), self._weights(group))
        factors = choose_factors(
            self.method.equalization, group.preceding, rows, weight, scheme, sharing=find_channel_sharing(module, group)
        )
        if factors is None:
            return torch.ones(inputs.shape[1], device=inputs.device)
        if group.preceding in candidate.output_hessians:
            candidate.output_hessians[group.preceding] = scale_output_hessian(
                candidate.output_hessians[group.preceding], factors
            )
        return apply_equalization_(module, group, factors)

    def _quantize_group(
        self,
        candidate: QuantizedBlock,
        group: SharedInput,
        wanted: torch.Tensor,
        seen: torch.Tensor,
        inputs: list[torch.Tensor],
    ) -> None:
        """Quantizes a group and computes its outputs. wanted, seen: its input, float32 [tokens, in], float and quantized."""
        planned = {name: get_linear(candidate.module, name).weight for name in group.linears if name in self.schemes}
        some = torch.linspace(0, len(seen) - 1, min(SQNR_ROWS, len(seen))).long().to(seen.device)
        candidate.probes |= {name: (seen[some], matmul(wanted[some], weight.T)) for name, weight in planned.items()}
        rows = LayerInputs(wanted, seen, self._weights(group))
        candidate.set_(quantize_linears(planned, self.schemes, self.method.linear, rows, candidate.output_hessians))
        self._compute(candidate, group, seen, inputs)
        labels = None if self.labels is None else torch.cat([batch.flatten() for batch in self.labels])
        candidate.inputs[group.linears[0]] = observe_rows(group.linears[0], seen, labels)

    def _check_rows(self, group: SharedInput, rows: torch.Tensor, inputs: list[torch.Tensor]) -> None:
        """Raises UserError naming the group's first linear and the sample when an input of it, or the sum of squares, is not
        finite."""
        if not rows.numel() or all(abs(float(bound)) <= MAX_INPUT for bound in rows.aminmax()):
            return
        counts = torch.tensor([x.shape[1] for x in inputs for _ in x])  # rows of every input
        row = int((~(rows.abs() <= MAX_INPUT)).any(1).nonzero()[0])
        number = int(torch.searchsorted(counts.cumsum(0), row, right=True))
        sample = number if self.pictures is None else int(torch.cat(list(self.pictures))[number])
        largest = float(rows[row].abs().max())
        raise non_finite_error(f"{self.prefix}.{group.linears[0]}", sample, largest if math.isfinite(largest) else None)

    def _weights(self, group: SharedInput) -> torch.Tensor | None:
        """What each of the group's input rows counts, float32 [tokens]."""
        batches = self.token_weights.get(group.linears[0])
        return None if batches is None else torch.cat([batch.flatten() for batch in batches])

    def _learn(self, best: QuantizedBlock, inputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
        """Learns the whole block's rounding and writes it into the candidate."""
        method, run = self.method, self.run
        if "" in self.output_hessians:
            towards = error_directions(self.output_hessians[""], inputs[0].device)
            wanted = [matmul(y, towards) for y in wanted]

            def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
                return matmul(self.run(module, x), towards)

        self.learned = learn_block(
            best.module,
            best.found,
            run,
            make_learning_batches(inputs, wanted, self.token_weights.get(""), self.pictures),
            steps=method.learn_steps,
            seed=method.seed,
        )
        best.set_(self.learned.linears)
        for name, tensor in self.learned.floats.items():
            best.rounded.get_parameter(name).copy_(tensor)
        self.forwards += self.learned.forwards
        self.backwards += self.learned.backwards

    def _outputs(self, module: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.forwards += sum(len(x) for x in inputs)
        return [self.run(module, x) for x in inputs]

    def _capture(
        self, module: nn.Module, groups: Sequence[SharedInput], inputs: list[torch.Tensor]
    ) -> tuple[dict[SharedInput, torch.Tensor], list[torch.Tensor]]:
        """Runs `module` on all inputs; returns each group's input rows [tokens, in] and the outputs."""
        rows: dict[SharedInput, list[torch.Tensor]] = {group: [] for group in groups}
        with record_inputs({group: module.get_submodule(group.linears[0]) for group in groups}, rows):
            outputs = self._outputs(module, inputs)
        return {group: torch.cat(parts) for group, parts in rows.items()}, outputs

    def _input_of(self, candidate: QuantizedBlock, group: SharedInput, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The group's input rows [tokens, in], without running what comes after."""
        module, known = candidate.rounded, candidate.outputs
        rows = run_until(module, group, self.run, inputs, known)
        computed = [name for name in list_linears_before(module, group) if not is_cached(name, known)]
        self.forwards += share_of_weights(module, computed) * sum(len(x) for x in inputs)
        candidate.outputs = drop_inside(known, group.enclosing_module)
        return rows

    def _compute(
        self, candidate: QuantizedBlock, group: SharedInput, seen: torch.Tensor, inputs: list[torch.Tensor]
    ) -> None:
        """The outputs of a group's linears, whose input rows are `quantized_rows`; for `_input_of` and `_resumed`."""
        rounded: dict[tuple[float, int] | None, torch.Tensor] = {None: seen}  # once for all linears that read it alike
        for name in group.linears:
            layer, how = get_linear(candidate.rounded, name), candidate.input_of(name)
            if how is not None and how not in rounded:
                rounded[how] = fake_quantize(seen, *how)
            rows = apply_linear(rounded[how], layer.weight, layer.bias)
            candidate.outputs[group.enclosing_module or name] = split_rows(rows, inputs)
        self.forwards += share_of_weights(candidate.rounded, group.linears) * sum(len(x) for x in inputs)

    def _resumed(self, candidate: QuantizedBlock, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The block's outputs."""
        outputs = run_from_cached(candidate.rounded, self.run, inputs, candidate.outputs)
        computed = [name for name in list_linears(candidate.rounded) if not is_cached(name, candidate.outputs)]
        self.forwards += share_of_weights(candidate.rounded, computed) * sum(len(x) for x in inputs)
        return outputs


def weighted_relative_error(
    outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] | None = None
) -> float:
    """Squared error of all outputs over the squared size of what is wanted. weights: [B, tokens] of each batch."""
    if weights is not None:
        roots = [w.sqrt()[..., None] for w in weights]
        outputs, wanted = ([x * root for x, root in zip(part, roots, strict=True)] for part in (outputs, wanted))
    wrong = sum(squared_sum(a - b) for a, b in zip(outputs, wanted, strict=True))
    return wrong / max(sum(squared_sum(b) for b in wanted), 1e-30)


def _deciding(group: SharedInput, plan: Mapping[str, LinearScheme]) -> tuple[LinearScheme, list[str]]:
    """What factors of a group have to suit: the scheme of fewest bits in it, of activations first, and its linears.

    The others, and those that stay float, are multiplied by the same factors.
    """
    schemes = {name: plan[name] for name in group.linears if name in plan}
    fewest = min(schemes.values(), key=lambda scheme: (scheme.activation_bits or 16, scheme.weight_bits))
    return fewest, [name for name, scheme in schemes.items() if scheme == fewest]
