"""Does entropy tell which layers should be searched jointly? Measured on the tiny LLaVA, against the true difference.

    OMP_NUM_THREADS=1 python -m tools.study.entropy --out docs/entropy
    python -m tools.study.entropy --out docs/entropy --redraw

The discretization-error difference (DED) of consecutive layers is E(one by one) / E(jointly) - 1: how much larger the
error of the last one's output is when each layer's activation range is the best for its own output than when the ranges are
the best together. It is measured for every pair and triple by trying everything, and correlated with what can be known
cheaply. Weights have their whole range. Writes <out>.json and <out>.png, and prints the table that docs/entropy.md has;
--redraw makes figure and table from the <out>.json that is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import parse_scheme_bits
from qvlm_export.calibrate.quantization.quantizer import activation_scale
from qvlm_export.calibrate.qvlm.clip_candidates import Clips
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS, Clip, Outputs, SearchLayer, relative_error, search_tree
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.inputs.samples import default_calibration, encode_entries, load_processor, read_entries
from tools.study.chain import Chain, open_chain, with_quantized_prefix
from tools.study.proxies import code_entropy, error_cosine, flatness, lookahead_regret, pair_errors, quantization_error

GRID = (*PAPER_CLIPS, *(Clip(fraction=f) for f in (0.7, 0.5, 0.35, 0.25, 0.18, 0.12)))  # of each layer's activation range
PAPER = len(PAPER_CLIPS)
SCHEMES = ("W4A4", "W6A6")
RESAMPLES = 1000
PROXIES = (
    "entropy", "entropy, best range", "quantization error", "quantization error, best range",
    "look-ahead regret", "look-ahead regret, paper's ranges", "error cosine", "flatness",
)  # fmt: skip
TARGETS = ("DED", "DED, paper's ranges", "absolute DED")
SHOWN_PREFIX = "float"  # of figures and tables alike: the two stand beside each other in docs/entropy.md
SHOWN = ("entropy", "quantization error", "look-ahead regret", "error cosine", "flatness")


def errors_of(chain: Chain, first: int, depth: int, grid: Sequence[Clip]) -> np.ndarray:
    """Error of the output of layer first + depth - 1 for every combination of ranges: float64 [K] * depth."""
    errors: list[float] = []

    def error(output: Any) -> float:
        errors.append(relative_error(output, chain.wanted[first + depth - 1]))
        return errors[-1]

    search_tree(layers_of(chain, first, depth, grid), error)
    return np.array(errors).reshape([len(grid)] * depth)


def layers_of(chain: Chain, first: int, depth: int, grid: Sequence[Clip]) -> list[SearchLayer]:
    """Layers of the chain as the search sees them; nothing is before them."""
    return [
        SearchLayer(
            lambda window: chain.given(first, window), chain.layers[first + k].output, [Clips(clip) for clip in grid]
        )
        for k in range(depth)
    ]


def one_by_one(tables: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Each layer's best candidate given those before it. tables: errors of the first layer, of the first two, and so on."""
    choice: tuple[int, ...] = ()
    for table in tables:
        choice = (*choice, int(np.argmin(table[choice])))
    return choice


def together(table: np.ndarray) -> tuple[int, ...]:
    return tuple(int(k) for k in np.unravel_index(np.argmin(table), table.shape))


def difference(tables: Sequence[np.ndarray]) -> float:
    """The DED: E(one by one) / E(jointly) - 1."""
    return float(tables[-1][one_by_one(tables)] / tables[-1].min() - 1)


def outputs_with(chain: Chain, first: int, choice: Sequence[int]) -> Outputs:
    outputs: Outputs = ()
    for k, index in enumerate(choice):
        outputs = (*outputs, chain.layers[first + k].output(chain.given(first, outputs), Clips(GRID[index])))
    return outputs


def joined(outputs: Any) -> torch.Tensor:
    return torch.cat(list(outputs.values()), dim=1)


def proxies_of(chain: Chain, first: int, tables: Sequence[np.ndarray], num_bits: int) -> dict[str, float]:
    """PROXIES of a pair, known without a joint search; and what a search that looks one layer ahead leaves of the DED."""
    second, wanted, x = chain.layers[first + 1], chain.wanted[first + 1], chain.inputs[first + 1]
    alone = [second.output(x, Clips(clip)) for clip in GRID]
    kept = int(np.argmin([relative_error(output, wanted) for output in alone]))
    errors = [partial(relative_error, wanted=chain.wanted[k]) for k in (first, first + 1)]
    own, ahead = pair_errors(layers_of(chain, first, 2, GRID), kept, errors)
    given = chain.given(first, outputs_with(chain, first, one_by_one(tables[:1])))
    from_first = {name: linear(given) for name, linear in second.linears.items()}
    whole, best = (activation_scale(second.ranges[GRID[k]], num_bits) for k in (0, kept))
    found = (
        code_entropy(x, whole, num_bits),
        code_entropy(x, best, num_bits),
        quantization_error(x, whole, num_bits),
        quantization_error(x, best, num_bits),
        lookahead_regret(own, ahead),
        lookahead_regret(own[:PAPER], ahead[:PAPER]),
        abs(error_cosine(joined(from_first) - joined(wanted), joined(alone[kept]) - joined(wanted))),
        flatness(own),
    )
    left = float(tables[1][int(np.argmin(ahead))].min() / tables[1].min() - 1)
    return dict(zip(PROXIES, found, strict=True)) | {"left by look-ahead": left}


def study(checkpoint: Checkpoint, samples: Sequence[Sample], scheme: str) -> list[dict[str, Any]]:
    """All pairs, with a float and with a quantized prefix; every second sample is held back."""
    records = []
    with (
        open_chain(checkpoint, samples[::2], scheme, GRID) as chain,
        open_chain(checkpoint, samples[1::2], scheme, GRID) as unseen,
    ):
        exact, quantized = chain.final(0, ()), with_quantized_prefix(chain, GRID)
        for first in range(len(chain.layers) - 1):
            record: dict[str, Any] = {
                "scheme": scheme,
                "pair": [first, first + 1],
                "layers": list(chain.names[first : first + 2]),
            }
            record["inside_a_block"] = chain.places[first][0] == chain.places[first + 1][0]
            for prefix, where in (("float", chain), ("quantized", quantized)):
                tables = [errors_of(where, first, depth, GRID) for depth in (1, 2)]
                few = [table[(slice(PAPER),) * table.ndim] for table in tables]
                found = {"DED": difference(tables), "DED, paper's ranges": difference(few)}
                found["absolute DED"] = float(tables[1][one_by_one(tables)] - tables[1].min())
                record[prefix] = found | proxies_of(where, first, tables, parse_scheme_bits(scheme)[0])
                if prefix == "float":
                    record["final"], record["unseen"] = carried(chain, unseen, first, tables, exact)
            if first + 2 < len(chain.layers):
                record["DED of three, paper's ranges"] = difference([*few, errors_of(quantized, first, 3, PAPER_CLIPS)])
            records.append(record)
    return records


def carried(
    chain: Chain, unseen: Chain, first: int, tables: Sequence[np.ndarray], exact: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Errors one by one and jointly: of the answers' logits, and of the pair's output on samples that were held back."""
    final, held_back = [], []
    for choice in (one_by_one(tables), together(tables[1])):
        error = (chain.final(first, outputs_with(chain, first, choice)) - exact).square().sum() / exact.square().sum()
        final.append(float(error))
        held_back.append(relative_error(outputs_with(unseen, first, choice)[1], unseen.wanted[first + 1]))
    return final, held_back


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    order = np.searchsorted(np.sort(values), values, side="left") + np.searchsorted(np.sort(values), values, side="right")
    return (order - 1) / 2


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, list[float]]:
    """Pearson's and Spearman's, each with a 95 % interval from RESAMPLES bootstrap samples of the pairs."""
    one, two = np.array(x), np.array(y)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(one), len(one)) for _ in range(RESAMPLES)]
    found = {}
    for name, form in (("pearson", lambda v: v), ("spearman", ranks)):
        with np.errstate(invalid="ignore"):  # a resample of equal values has no correlation
            spread = [np.corrcoef(form(one[k]), form(two[k]))[0, 1] for k in drawn]
            found[name] = [float(np.corrcoef(form(one), form(two))[0, 1]), *np.nanpercentile(spread, [2.5, 97.5]).tolist()]
    return found


def correlations(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """scheme -> prefix -> target -> proxy -> coefficients; and of triples, with the sums of their two pairs' proxies."""
    table: dict[str, Any] = {}
    for scheme in SCHEMES:
        mine = [r for r in records if r["scheme"] == scheme]
        for prefix in ("float", "quantized"):
            found = [r[prefix] for r in mine]
            table.setdefault(scheme, {})[prefix] = {
                target: {name: correlation([f[name] for f in found], [f[target] for f in found]) for name in PROXIES}
                for target in TARGETS
            }
        three = [r["DED of three, paper's ranges"] for r in mine[:-1]]
        sums = {n: [a["quantized"][n] + b["quantized"][n] for a, b in itertools.pairwise(mine)] for n in PROXIES}
        table[scheme]["quantized"]["DED of three, paper's ranges"] = {n: correlation(v, three) for n, v in sums.items()}
    return table


def plot(records: Sequence[dict[str, Any]], table: dict[str, Any], path: Path) -> None:
    """The DED of all pairs, with SHOWN_PREFIX, over the paper's two proxies and over the look-ahead regret."""
    shown = {"entropy": "entropy of layer k+1's input, nats", "quantization error": "its quantization error, relative",
             "look-ahead regret": "look-ahead regret of layer k"}  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, (name, label) in zip(axes, shown.items(), strict=True):
        for scheme, marker in zip(SCHEMES, "os", strict=True):
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
    """The Markdown table of SHOWN against the DED with SHOWN_PREFIX: Pearson's r [interval] / Spearman's."""
    lines = [f"| proxy | {' | '.join(SCHEMES)} |", "|---" * (len(SCHEMES) + 1) + "|"]
    for name in SHOWN:
        found = [table[scheme][SHOWN_PREFIX]["DED"][name] for scheme in SCHEMES]
        cells = ["{:.2f} [{:.2f}, {:.2f}] / {:.2f}".format(*f["pearson"], f["spearman"][0]) for f in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def rounded(value: Any) -> Any:
    """Floats to four digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measured(model: Path, count: int) -> dict[str, Any]:
    """What <out>.json holds."""
    checkpoint = open_checkpoint(str(model))
    entries = read_entries(default_calibration(), None, count)
    samples = encode_entries(
        entries, load_processor(checkpoint.folder), checkpoint.config, checkpoint.config.text.max_position_embeddings
    )
    records = [record for scheme in SCHEMES for record in study(checkpoint, samples, scheme)]
    return {"samples": count, "bootstrap_seed": 0, "correlations": correlations(records), "pairs": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--samples", type=int, default=64, help="of the built-in set; every second one is held back")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: figure and table from <out>.json")
    args = parser.parse_args()
    started = time.monotonic()
    stored = args.out.with_suffix(".json")
    if not args.redraw:
        stored.write_text(json.dumps(rounded(measured(args.model, args.samples)), indent=1) + "\n", encoding="utf-8")
    content = json.loads(stored.read_text(encoding="utf-8"))  # also after measuring: the same digits as a redraw
    plot(content["pairs"], content["correlations"], args.out.with_suffix(".png"))
    print("\n".join(table_lines(content["correlations"])))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
