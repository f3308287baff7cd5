"""Study of Q-VLM's entropy proxy (arXiv 2410.08119): does it predict which layers gain from a joint search?

    OMP_NUM_THREADS=1 python -m tools.study.entropy --out docs/entropy
    OMP_NUM_THREADS=1 python -m tools.study.entropy --model build/smol --data build/smol-data/calibration-0.jsonl \\
        --samples 16 --schemes W8A8 W4A4 --decoder-only --out docs/entropy-smol
    python -m tools.study.entropy --out docs/entropy --redraw

The discretization-error difference (DED) of consecutive layers is E(one by one) / E(jointly) - 1, where E is the error of
the last layer's output. One by one, each layer has the activation range that is best for its own output; jointly, the layers
have the ranges that are best together. The DED of every pair and triple is measured by exhaustive search and correlated with
proxies that are cheap to compute. Weights are not clipped. It writes <out>.json and <out>.png and prints the table that
docs/entropy.md shows; --redraw makes figure and table from an existing <out>.json.

With --decoder-only, which a larger model needs, the chain is the decoder alone, behind the prefix of its chat template as in
an export; its preceding layers are float only, and there are no triples.

With --calibrated, the folder X.calibrated of an export, its weights are taken for those of the float model. Such weights are
equalized, so this is what joint search gains after equalization.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import parse_scheme_bits
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource
from qvlm_export.calibrate.quantization.quantizer import activation_scale
from qvlm_export.calibrate.qvlm.clip_candidates import Clips
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS, Clip, Outputs, SearchLayer, relative_error, search_tree
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.inputs.prefix import find_common_prefix
from qvlm_export.inputs.samples import default_calibration, encode_entries, load_processor, read_entries
from tools.study.chain import Chain, open_chain, quantize_preceding
from tools.study.proxies import code_entropy, error_cosine, flatness, lookahead_regret, pair_errors, quantization_error

GRID = (*PAPER_CLIPS, *(Clip(fraction=f) for f in (0.7, 0.5, 0.35, 0.25, 0.18, 0.12)))  # activation ranges of each layer
PAPER = len(PAPER_CLIPS)
SCHEMES = ("W4A4", "W6A6")  # by default
RESAMPLES = 1000
MAX_ENTRIES = 10_000  # lines of the data that are read; samples are spread evenly among them
PROXIES = (
    "entropy", "entropy, best range", "quantization error", "quantization error, best range",
    "look-ahead regret", "look-ahead regret, paper's ranges", "error cosine", "flatness",
)  # fmt: skip
TARGETS = ("DED", "DED, paper's ranges", "absolute DED")
SHOWN_PREFIX = "float"  # preceding layers in figure and table, which stand beside each other in docs/entropy.md
SHOWN = ("entropy", "quantization error", "look-ahead regret", "error cosine", "flatness")


def error_table(chain: Chain, first: int, depth: int, grid: Sequence[Clip]) -> np.ndarray:
    """Error of the output of layer first + depth - 1 for every combination of K ranges: float64 of shape [K] * depth."""
    errors: list[float] = []

    def error(output: Any) -> float:
        errors.append(relative_error(output, chain.float_outputs[first + depth - 1]))
        return errors[-1]

    search_tree(search_layers(chain, first, depth, grid), error)
    return np.array(errors).reshape([len(grid)] * depth)


def search_layers(chain: Chain, first: int, depth: int, grid: Sequence[Clip]) -> list[SearchLayer]:
    """Layers first to first + depth - 1 of the chain as layers of a search that begins with them."""
    return [
        SearchLayer(
            lambda window: chain.input_after(first, window), chain.layers[first + k].output, [Clips(clip) for clip in grid]
        )
        for k in range(depth)
    ]


def choose_one_by_one(tables: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Index of each layer's best candidate, given the choices of the preceding layers.

    tables: errors of the first layer, of the first two layers, and so on.
    """
    choice: tuple[int, ...] = ()
    for table in tables:
        choice = (*choice, int(np.argmin(table[choice])))
    return choice


def choose_jointly(table: np.ndarray) -> tuple[int, ...]:
    """Index of each layer's candidate in the best combination."""
    return tuple(int(k) for k in np.unravel_index(np.argmin(table), table.shape))


def discretization_error_difference(tables: Sequence[np.ndarray]) -> float:
    """The DED of the last table's layers: E(one by one) / E(jointly) - 1."""
    return float(tables[-1][choose_one_by_one(tables)] / tables[-1].min() - 1)


def outputs_of_choice(chain: Chain, first: int, choice: Sequence[int]) -> Outputs:
    """Outputs of the layers from `first` on with the chosen ranges of GRID."""
    outputs: Outputs = ()
    for k, index in enumerate(choice):
        outputs = (*outputs, chain.layers[first + k].output(chain.input_after(first, outputs), Clips(GRID[index])))
    return outputs


def concatenate_outputs(outputs: Any) -> torch.Tensor:
    """Outputs of a layer's linears, [tokens, sum of out_features]."""
    return torch.cat(list(outputs.values()), dim=1)


def compute_proxies(chain: Chain, first: int, tables: Sequence[np.ndarray], num_bits: int) -> dict[str, float]:
    """PROXIES of the pair first, first + 1, which need no joint search.

    "left by look-ahead": the part of the DED that is left if the first layer's range is chosen by the second layer's error.
    """
    second, float_outputs, x = chain.layers[first + 1], chain.float_outputs[first + 1], chain.inputs[first + 1]
    alone = [second.output(x, Clips(clip)) for clip in GRID]
    best_of_second = int(np.argmin([relative_error(output, float_outputs) for output in alone]))
    errors = [partial(relative_error, float_outputs=chain.float_outputs[k]) for k in (first, first + 1)]
    own, ahead = pair_errors(search_layers(chain, first, 2, GRID), best_of_second, errors)
    second_input = chain.input_after(first, outputs_of_choice(chain, first, choose_one_by_one(tables[:1])))
    from_first = {name: linear(second_input) for name, linear in second.linears.items()}
    unclipped, best = (activation_scale(second.ranges[GRID[k]], num_bits) for k in (0, best_of_second))
    float_output = concatenate_outputs(float_outputs)
    values = (
        code_entropy(x, unclipped, num_bits),
        code_entropy(x, best, num_bits),
        quantization_error(x, unclipped, num_bits),
        quantization_error(x, best, num_bits),
        lookahead_regret(own, ahead),
        lookahead_regret(own[:PAPER], ahead[:PAPER]),
        abs(
            error_cosine(
                concatenate_outputs(from_first) - float_output, concatenate_outputs(alone[best_of_second]) - float_output
            )
        ),
        flatness(own),
    )
    left = float(tables[1][int(np.argmin(ahead))].min() / tables[1].min() - 1)
    return dict(zip(PROXIES, values, strict=True)) | {"left by look-ahead": left}


def study(
    checkpoint: Checkpoint, samples: Sequence[Sample], scheme: str, *, decoder_only: bool = False
) -> list[dict[str, Any]]:
    """Records of all pairs; every second sample is held out. decoder_only: as --decoder-only."""
    prefix = find_common_prefix(load_processor(checkpoint.folder), checkpoint.config) if decoder_only else ()
    parts: dict[str, Any] = {"vision": not decoder_only, "prefix": prefix}
    with (
        open_chain(checkpoint, samples[::2], scheme, GRID, **parts) as chain,
        open_chain(checkpoint, samples[1::2], scheme, GRID, **parts) as held_out,
    ):
        models = {"float": chain} if decoder_only else {"float": chain, "quantized": quantize_preceding(chain, GRID)}
        float_logits = chain.answer_logits(0, ())
        return [measure_pair(models, held_out, first, scheme, float_logits) for first in range(len(chain.layers) - 1)]


def measure_pair(
    models: Mapping[str, Chain], held_out: Chain, first: int, scheme: str, float_logits: torch.Tensor
) -> dict[str, Any]:
    """The record of layers first, first + 1. models: the chain by what its preceding layers are, "float" or "quantized"."""
    chain = models["float"]
    record: dict[str, Any] = {"scheme": scheme, "pair": [first, first + 1], "layers": list(chain.names[first : first + 2])}
    record["inside_a_block"] = chain.places[first][0] == chain.places[first + 1][0]
    for preceding, model in models.items():
        tables = [error_table(model, first, depth, GRID) for depth in (1, 2)]
        paper_tables = [table[(slice(PAPER),) * table.ndim] for table in tables]
        targets = {
            "DED": discretization_error_difference(tables),
            "DED, paper's ranges": discretization_error_difference(paper_tables),
        }
        targets["absolute DED"] = float(tables[1][choose_one_by_one(tables)] - tables[1].min())
        record[preceding] = targets | compute_proxies(model, first, tables, parse_scheme_bits(scheme)[0])
        if preceding == "float":
            record["final"], record["unseen"] = compare_beyond_pair(chain, held_out, first, tables, float_logits)
        elif first + 2 < len(chain.layers):
            record["DED of three, paper's ranges"] = discretization_error_difference(
                [*paper_tables, error_table(model, first, 3, PAPER_CLIPS)]
            )
    return record


def compare_beyond_pair(
    chain: Chain, held_out: Chain, first: int, tables: Sequence[np.ndarray], float_logits: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Relative squared errors of the ranges chosen one by one, and of those chosen jointly.

    Returns both errors of the logits of the answer tokens, and both of the pair's output on the samples held out.
    """
    logit_errors, output_errors = [], []
    for choice in (choose_one_by_one(tables), choose_jointly(tables[1])):
        logits = chain.answer_logits(first, outputs_of_choice(chain, first, choice))
        logit_errors.append(float((logits - float_logits).square().sum() / float_logits.square().sum()))
        output = outputs_of_choice(held_out, first, choice)[1]
        output_errors.append(relative_error(output, held_out.float_outputs[first + 1]))
    return logit_errors, output_errors


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values get the mean of their ranks."""
    order = np.searchsorted(np.sort(values), values, side="left") + np.searchsorted(np.sort(values), values, side="right")
    return (order - 1) / 2


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, list[float]]:
    """Pearson's and Spearman's correlation: [coefficient, lower, upper].

    The bounds are those of a 95 % interval from RESAMPLES bootstrap samples.
    """
    first, second = np.array(x), np.array(y)
    rng = np.random.default_rng(0)
    resamples = [rng.integers(0, len(first), len(first)) for _ in range(RESAMPLES)]
    coefficients = {}
    for name, transform in (("pearson", lambda v: v), ("spearman", ranks)):
        with np.errstate(invalid="ignore"):  # a resample whose values are all equal has no correlation
            spread = [np.corrcoef(transform(first[k]), transform(second[k]))[0, 1] for k in resamples]
            interval = np.nanpercentile(spread, [2.5, 97.5]).tolist()
            coefficients[name] = [float(np.corrcoef(transform(first), transform(second))[0, 1]), *interval]
    return coefficients


def correlations(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """scheme -> preceding layers (float or quantized) -> target -> proxy -> coefficients.

    The DED of a triple is correlated with the sum of the proxies of its two pairs.
    """
    table: dict[str, Any] = {}
    for scheme in list_schemes(records):
        of_scheme = [r for r in records if r["scheme"] == scheme]
        for preceding in ("float", "quantized"):
            if pairs := [r[preceding] for r in of_scheme if preceding in r]:
                table.setdefault(scheme, {})[preceding] = {
                    target: {name: correlation([p[name] for p in pairs], [p[target] for p in pairs]) for name in PROXIES}
                    for target in TARGETS
                }
        if "quantized" in table[scheme]:
            triples = [r["DED of three, paper's ranges"] for r in of_scheme[:-1]]
            sums = {n: [a["quantized"][n] + b["quantized"][n] for a, b in itertools.pairwise(of_scheme)] for n in PROXIES}
            table[scheme]["quantized"]["DED of three, paper's ranges"] = {
                name: correlation(values, triples) for name, values in sums.items()
            }
    return table


def list_schemes(records: Sequence[dict[str, Any]]) -> list[str]:
    """The schemes of the records, in their order."""
    return list(dict.fromkeys(record["scheme"] for record in records))


def gain_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown table of what joint search gains on the pairs of each scheme, and what is left of it elsewhere.

    The last three columns are medians of E(jointly) / E(one by one) - 1 over the pairs with any gain: where ranges are
    chosen, on the samples held out, and in the logits. Behind the last, the share of these pairs whose logits gain.
    """
    lines = [
        "| scheme | pairs | with any gain | error of the pair | on samples held out | of the logits |",
        "|---" * 6 + "|",
    ]
    for scheme in list_schemes(records):
        of_scheme = [r for r in records if r["scheme"] == scheme]
        gaining = [r for r in of_scheme if r["float"]["DED"] > 0]
        changes = [[1 / (1 + r["float"]["DED"]) - 1 for r in gaining]]
        changes += [[r[key][1] / r[key][0] - 1 for r in gaining] for key in ("unseen", "final")]
        entries = [f"{100 * float(np.median(values)):+.1f} %" for values in changes]
        entries[-1] += f", {sum(change < 0 for change in changes[-1])} of {len(gaining)} gain"
        lines.append(f"| {scheme} | {len(of_scheme)} | {len(gaining)} | {' | '.join(entries)} |")
    return lines


def plot(records: Sequence[dict[str, Any]], table: dict[str, Any], path: Path) -> None:
    """Draws the DED of all pairs, after SHOWN_PREFIX layers, over entropy, quantization error and look-ahead regret."""
    labels = {"entropy": "entropy of layer k+1's input, nats", "quantization error": "its quantization error, relative",
             "look-ahead regret": "look-ahead regret of layer k"}  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for scheme, marker in zip(table, "os", strict=True):
            points = [(r[SHOWN_PREFIX][name], r[SHOWN_PREFIX]["DED"]) for r in records if r["scheme"] == scheme]
            r = table[scheme][SHOWN_PREFIX]["DED"][name]["pearson"][0]
            axis.plot(*zip(*points, strict=True), marker, ms=4, alpha=0.7, mew=0, label=f"{scheme}: r = {r:+.2f}")
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    axes[0].set_ylabel(f"DED of layers k and k+1,\n{SHOWN_PREFIX} prefix")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table_lines(table: dict[str, Any]) -> list[str]:
    """Markdown table of the proxies in SHOWN: their Pearson's r with the DED [interval] / Spearman's, as in `plot`."""
    lines = [f"| proxy | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    for name in SHOWN:
        coefficients = [of_scheme[SHOWN_PREFIX]["DED"][name] for of_scheme in table.values()]
        cells = ["{:.2f} [{:.2f}, {:.2f}] / {:.2f}".format(*c["pearson"], c["spearman"][0]) for c in coefficients]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def round_floats(value: Any) -> Any:
    """The JSON value with floats rounded to four significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: round_floats(v) for key, v in value.items()}
    if isinstance(value, list):
        return [round_floats(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the study; returns the content of <out>.json."""
    checkpoint = open_checkpoint(str(args.model))
    if args.calibrated:
        checkpoint = replace(checkpoint, source=DequantizedSource(CalibratedCheckpoint(args.calibrated)))
    data, count = (args.data, MAX_ENTRIES) if args.data else (default_calibration(), args.samples)
    entries = read_entries(data, None, count)
    entries = entries[:: max(1, len(entries) // args.samples)][: args.samples]
    samples = encode_entries(
        entries, load_processor(checkpoint.folder), checkpoint.config, checkpoint.config.text.max_position_embeddings
    )
    records = [
        record for scheme in args.schemes for record in study(checkpoint, samples, scheme, decoder_only=args.decoder_only)
    ]
    return {"samples": args.samples, "bootstrap_seed": 0, "correlations": correlations(records), "pairs": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--data", type=Path, help="calibration data, JSON lines; the built-in set by default")
    parser.add_argument("--samples", type=int, default=64, help="of the data; every second one is held out")
    parser.add_argument("--schemes", nargs=2, default=SCHEMES, help="two, such as W4A4")
    parser.add_argument("--decoder-only", action="store_true", help="see above")
    parser.add_argument("--calibrated", type=Path, help="see above")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--redraw", action="store_true", help="do not measure; make figure and table from <out>.json")
    args = parser.parse_args()
    started = time.monotonic()
    json_file = args.out.with_suffix(".json")
    if not args.redraw:
        json_file.write_text(json.dumps(round_floats(measure(args)), indent=1) + "\n", encoding="utf-8")
    # The file is read back after measuring, too, so that a redraw gives the same digits.
    content = json.loads(json_file.read_text(encoding="utf-8"))
    plot(content["pairs"], content["correlations"], args.out.with_suffix(".png"))
    print("\n".join([*table_lines(content["correlations"]), "", *gain_lines(content["pairs"])]))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
