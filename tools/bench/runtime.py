"""Benchmark of inference: prefill time, decode speed and memory of torch and of the exports, on the same prompt.

    python -m tools.families.make_random_llava --like 1b --out build/1b
    python -m tools.bench.runtime --model build/1b --work build/bench --out docs/bench_runtime.json

Without --gpu it measures torch in float32 and the graphs on ONNX Runtime, both on the CPU. With --gpu it measures torch in
float16, eager and compiled, and the engines, which are built for the GPU of this machine:

    python -m tools.families.make_random_llava --like llava-7b --out build/7b
    python -m tools.bench.runtime --gpu --model build/7b --work build/bench-gpu --out docs/bench_gpu.json

Every row runs in its own process with the same number of threads. Figures of one run can be compared with each other, but
not with those of another run. Decode speed is that of the median step, so that other load on the machine affects it less.
weights_gb_per_s is the size of the language model's weights, which are read once per token, times the decode speed; the
memory bandwidth bounds it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROWS = ("torch float32", "fp16", "int8", "int4", "int4 --fast")
GPU_ROWS = ("torch float16", "torch float16 compiled", "fp16", "int8", "int4")
MAX_LENGTH = 1024


def prompt_of(model: Path, words: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Random prompt: input_ids int64 [S] with one image, its pixel values float32 [1, 3, R, R], and the image token."""
    config = json.loads((model / "config.json").read_text())
    vision, token = config["vision_config"], config["image_token_index"]
    side = vision["image_size"]
    random = np.random.default_rng(0)
    ids = np.concatenate([[1], [token] * (side // vision["patch_size"]) ** 2, random.integers(5, 300, words)])
    return ids.astype(np.int64), random.standard_normal((1, 3, side, side)).astype(np.float32), token


def measure_torch(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Figures of transformers' model on the CPU in float32 or on the GPU in float16."""
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(args.threads)
    device, dtype = ("cuda", torch.float16) if args.gpu else ("cpu", torch.float32)
    ids, pixels, _ = prompt_of(args.model, args.words)
    llava = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=dtype).eval().to(device)
    prompt = {"input_ids": torch.tensor(ids)[None].to(device), "pixel_values": torch.tensor(pixels).to(device, dtype)}
    forward = torch.compile(llava) if row.endswith("compiled") else llava

    def run(**inputs: object) -> tuple[float, object]:
        began = time.perf_counter()
        out = forward(**inputs, use_cache=True, logits_to_keep=1)
        out.logits[0, -1, 0].item()  # waits for the device
        return time.perf_counter() - began, out

    def decode(out: object, tokens: int) -> list[float]:
        steps = []
        for _ in range(tokens):
            seconds, out = run(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            steps.append(seconds)
        return steps

    with torch.inference_mode():
        if args.gpu:  # warm-up: kernels are chosen, or compiled, at their first run
            decode(run(**prompt)[1], args.tokens)
        prefill, out = run(**prompt)
        steps = decode(out, args.tokens)
    language = sum(p.nbytes for name, p in llava.named_parameters() if "language_model" in name or "lm_head" in name)
    return figures(prefill, steps, language)


def measure_graph(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Figures of an export on ONNX Runtime or TensorRT; the row is a scheme, with or without --fast."""
    from qvlm_export.engines.manifest import read_manifest
    from qvlm_export.engines.runtime.open import open_session

    scheme, _, fast = row.partition(" ")
    manifest, tokens = read_manifest((args.work / f"{scheme}.plan").with_suffix(".json")), args.tokens
    ids, pixels, _ = prompt_of(args.model, args.words)
    runtime = manifest.backend["name"] if args.gpu else "onnxruntime:cpu"
    with open_session(manifest, runtime, args.threads, fast=bool(fast)) as session:
        warm = session.start([ids], pixels) if args.gpu else session.start([ids[-8:]])
        list(session.generate(warm, 2, frozenset()))
        began = time.perf_counter()
        sequences = session.start([ids], pixels)
        prefill, steps = time.perf_counter() - began, []
        generation = session.generate(sequences, tokens + 1, frozenset())
        next(generation)
        for _ in range(tokens):
            began = time.perf_counter()
            next(generation)
            steps.append(time.perf_counter() - began)
        memory = gpu_bytes() if args.gpu else {}
    return figures(prefill, steps, manifest.file("language_data").stat().st_size) | memory


def figures(prefill: float, steps: list[float], language_bytes: int) -> dict[str, float]:
    """Prefill time and decode rates, from the seconds of the prefill and of each decode step.

    language_bytes: size of the language model's weights, embedding table included.
    """
    step = statistics.median(steps)
    rates = {"decode_tokens_per_s": 1 / step, "weights_gb_per_s": language_bytes / step / 1e9}
    return {"prefill_ms": 1000 * prefill, **rates}


def gpu_bytes() -> dict[str, float]:
    """GPU memory in use by all processes, in bytes. Raises SystemExit if CUDA reports an error."""
    from cuda.bindings import runtime

    error, free, total = runtime.cudaMemGetInfo()
    if int(error) != 0:
        raise SystemExit(f"the GPU reports {error.name}")
    return {"gpu_bytes": total - free}


def machine() -> dict[str, str]:
    """Name of the processor, its vector and 8-bit matrix instructions, and the name of the GPU if there is one."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8")
    description = {"processor": cpu.get("model name", "unknown")}
    description["instructions"] = " ".join(flag for flag in known if flag in cpu.get("flags", "").split())
    import torch

    return description | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def run_row(args: argparse.Namespace) -> None:
    """Measures one row in this process and prints it as JSON."""
    row = (measure_torch if args.row.startswith("torch") else measure_graph)(args.row, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**row, "peak_bytes": peak}))


def run_all(args: argparse.Namespace) -> None:
    """Measures every row in its own process, prints the table and writes it to --out; exports what is missing."""
    import qvlm_export
    from qvlm_export.engines.backend import gpu_present

    if args.gpu and not gpu_present():
        raise SystemExit("--gpu: no NVIDIA GPU is here")
    table, rows = {}, GPU_ROWS if args.gpu else ROWS
    extra = ["--gpu"] if args.gpu else []
    settings = {"backend": "auto" if args.gpu else "onnx", "max_length": MAX_LENGTH, "samples": 1}
    for row in rows:
        scheme = row.partition(" ")[0]
        if scheme != "torch" and not (args.work / f"{scheme}.json").exists():
            args.work.mkdir(parents=True, exist_ok=True)
            qvlm_export.export(str(args.model), args.work / f"{scheme}.plan", scheme=scheme, **settings)
        forwarded = [f"--model={args.model}", f"--work={args.work}", f"--words={args.words}", f"--tokens={args.tokens}"]
        command = [
            sys.executable,
            "-m",
            "tools.bench.runtime",
            *forwarded,
            f"--threads={args.threads}",
            f"--row={row}",
            *extra,
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        table[row] = json.loads(done.stdout.splitlines()[-1])
        base = table[rows[0]]
        table[row]["decode_ratio"] = table[row]["decode_tokens_per_s"] / base["decode_tokens_per_s"]
        table[row]["prefill_ratio"] = base["prefill_ms"] / table[row]["prefill_ms"]
        print(f"{row:22} " + " ".join(f"{key} {value:.4g}" for key, value in table[row].items()), flush=True)
    if args.out:
        prompt = {"threads": args.threads, "text_tokens": args.words, "new_tokens": args.tokens, "max_length": MAX_LENGTH}
        content = {"machine": machine(), "settings": prompt, "rows": table}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the exports; those that are missing are made")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument("--words", type=int, default=64, help="text tokens of the prompt, beside one image")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="torch float16 and the engines, on this machine's GPU")
    parser.add_argument("--row", choices=sorted({*ROWS, *GPU_ROWS}), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        run_row(args)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
