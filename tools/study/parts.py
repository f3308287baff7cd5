"""Study of the error by part of the model: the tiny LLaVA with only some of its linears quantized.

    python -m tools.study.parts --out docs/parts.md

It calibrates with `--effort fast` on the benchmark's first 64 samples and evaluates as the benchmark does. Beside KL and
SQNR it reports the share of the KL divergence that is due to the ten answer tokens with the largest divergence.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.efforts import run_effort
from qvlm_export.engines.check.metrics import kl_divergence, measure
from tools.bench.data import calibration_file, evaluation_file, load_samples, make_data
from tools.bench.ours import calibrate_and_run, load_model, reference_logits, schemes_of
from tools.bench.tables import number

COLUMNS = ("W8A8", "W4A16")
PARTS: Mapping[str, str] = {
    "everything": "",
    "vision tower": "^vision_tower",
    "projector": "^multi_modal_projector",
    "decoder: q, k, v": r"^language_model.*\.[qkv]_proj$",
    "decoder: o": r"^language_model.*\.o_proj$",
    "decoder: gate, up": r"^language_model.*\.(gate|up)_proj$",
    "decoder: down": r"^language_model.*\.down_proj$",
}
WORST = 10
HEAD = """# Where the error comes from

`python -m tools.study.parts --out docs/parts.md` quantizes only a part of the tiny model's linears (`--effort fast`, the
benchmark's first 64 samples and 1,000 unseen questions, as in [methods.md](methods.md)). Entries: KL divergence in nats a
token / SQNR of the logits in dB / share of the whole KL that is at the {worst} worst of {tokens} answer tokens.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--seed", type=int, default=0, help="of the calibration set")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    make_data(args.model, args.data)
    samples, evaluation = load_samples(calibration_file(args.data, args.seed)), load_samples(evaluation_file(args.data))
    checkpoint, blocks = load_model(args.model)
    reference = reference_logits(args.model, evaluation)
    lines = [f"| quantized | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for part, pattern in PARTS.items():
        entries = []
        for column in COLUMNS:
            schemes = {n: s for n, s in schemes_of(checkpoint, blocks, column).items() if re.search(pattern, n)}
            torch.manual_seed(args.seed)
            job = CalibrationJob(blocks, checkpoint.source, schemes, samples)
            logits, _, _ = calibrate_and_run(job, checkpoint, functools.partial(run_effort, "fast"), evaluation)
            divergence = np.sort(kl_divergence(reference, logits))
            share = divergence[-WORST:].sum() / divergence.sum()
            entries.append(
                f"{number(float(divergence.mean()))} / {measure(reference, logits).sqnr_db:.1f} / {100 * share:.0f} %"
            )
        lines.append(f"| {part} | {' | '.join(entries)} |")
        print(lines[-1], flush=True)
    args.out.write_text(HEAD.format(worst=WORST, tokens=f"{len(reference):,}") + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
