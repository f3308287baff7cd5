"""Prefill time, decode speed and memory of torch float32 and of the exported graphs on ONNX Runtime, on the same prompt.

    python tools/make_random_llava.py --like 1b --out build/1b
    python tools/bench_runtime.py --model build/1b --work build/bench --out docs/bench_runtime.json

Every row runs in a process of its own with the same number of threads; figures of one run are comparable, others are not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROWS = ("torch float32", "fp16", "int8", "int4", "int4 --fast")
MAX_LENGTH = 1024


def prompt_of(model: Path, words: int) -> tuple[np.ndarray, np.ndarray, int]:
    """input_ids int64 [S] with one picture, its pixels, and the image token."""
    config = json.loads((model / "config.json").read_text())
    vision, token = config["vision_config"], config["image_token_index"]
    side = vision["image_size"]
    random = np.random.default_rng(0)
    ids = np.concatenate([[1], [token] * (side // vision["patch_size"]) ** 2, random.integers(5, 300, words)])
    return ids.astype(np.int64), random.standard_normal((1, 3, side, side)).astype(np.float32), token


def measure_torch(model: Path, words: int, tokens: int, threads: int) -> dict[str, float]:
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    ids, pixels, _ = prompt_of(model, words)
    llava = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        began = time.perf_counter()
        out = llava(input_ids=torch.tensor(ids)[None], pixel_values=torch.tensor(pixels), use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(tokens):
            last = out.logits[:, -1:].argmax(-1)
            out = llava(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
        decode = time.perf_counter() - began
    return {"prefill_ms": 1000 * prefill, "decode_tokens_per_s": tokens / decode}


def measure_graph(row: str, args: argparse.Namespace) -> dict[str, float]:
    from engines.manifest import read_manifest
    from engines.session import open_session

    scheme, _, fast = row.partition(" ")
    plan, tokens, threads = args.work / f"{scheme}.plan", args.tokens, args.threads
    ids, pixels, _ = prompt_of(args.model, args.words)
    with open_session(read_manifest(plan.with_suffix(".json")), "onnxruntime:cpu", threads, fast=bool(fast)) as session:
        warm = session.start([ids[-8:]])
        list(session.generate(warm, 2, frozenset()))
        began = time.perf_counter()
        sequences = session.start([ids], pixels)
        prefill = time.perf_counter() - began
        steps = session.generate(sequences, tokens + 1, frozenset())
        next(steps)
        began = time.perf_counter()
        for _ in range(tokens):
            next(steps)
        decode = time.perf_counter() - began
    return {"prefill_ms": 1000 * prefill, "decode_tokens_per_s": tokens / decode}


def run_row(args: argparse.Namespace) -> None:
    """One row, in this process; prints JSON."""
    if args.row == "torch float32":
        got = measure_torch(args.model, args.words, args.tokens, args.threads)
    else:
        got = measure_graph(args.row, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**got, "peak_bytes": peak}))


def run_all(args: argparse.Namespace) -> None:
    import qvlm_export

    table = {}
    for row in ROWS:
        scheme = row.partition(" ")[0]
        if row != "torch float32" and not (args.work / f"{scheme}.json").exists():
            args.work.mkdir(parents=True, exist_ok=True)
            options = {"scheme": scheme, "backend": "onnx", "max_length": MAX_LENGTH, "samples": 1}
            qvlm_export.export(str(args.model), args.work / f"{scheme}.plan", **options)
        forwarded = [f"--model={args.model}", f"--work={args.work}", f"--words={args.words}", f"--tokens={args.tokens}"]
        command = [sys.executable, __file__, *forwarded, f"--threads={args.threads}", f"--row={row}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        table[row] = json.loads(done.stdout.splitlines()[-1])
        base = table["torch float32"]
        table[row]["decode_ratio"] = table[row]["decode_tokens_per_s"] / base["decode_tokens_per_s"]
        table[row]["prefill_ratio"] = base["prefill_ms"] / table[row]["prefill_ms"]
        print(f"{row:14} " + " ".join(f"{key} {value:.4g}" for key, value in table[row].items()), flush=True)
    if args.out:
        settings = {"threads": args.threads, "text_tokens": args.words, "new_tokens": args.tokens, "max_length": MAX_LENGTH}
        args.out.write_text(json.dumps({"settings": settings, "rows": table}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the exports are made, or found")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument("--words", type=int, default=64, help="text tokens of the prompt, beside one picture")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        run_row(args)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
