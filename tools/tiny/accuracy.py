"""Exact-match accuracy of the tiny LLaVA on unseen scenes: in torch, with round-to-nearest, and as exported graphs.

    python -m tools.tiny.accuracy --out docs/tiny_accuracy.json          # exports fp16, int8, int4 and measures all of them

An answer is correct if it equals the expected one to the letter. In torch a question is scored by teacher forcing, which is
equivalent to greedy decoding: greedy decoding produces the expected answer exactly if each of its tokens has the largest
logit after the tokens before it. Exported graphs generate the answer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.tiny import scenes

BATCH = 32


@dataclass(frozen=True)
class Item:
    """One question: its kind, image, prompt text and right answer."""

    kind: str
    image: Image.Image
    prompt: str
    answer: str


def unseen_items(count: int, split: str = "test") -> list[Item]:
    """`count` questions about as many scenes of the split, cycling through the kinds."""
    items = []
    for index in range(count):
        scene, (question,) = scenes.questions(split, index, kinds=(scenes.KINDS[index % len(scenes.KINDS)],))
        items.append(Item(question.kind, scenes.draw(scene), question.text, question.answer))
    return items


def rates(items: list[Item], right: list[bool]) -> dict[str, float]:
    """Share of correct answers, overall and by kind. right: whether the answer to each item is correct."""
    totals, correct = Counter(i.kind for i in items), Counter(i.kind for i, ok in zip(items, right, strict=True) if ok)
    return {"overall": sum(right) / len(right), **{kind: correct[kind] / totals[kind] for kind in scenes.KINDS}}


def torch_answers(model: LlavaForConditionalGeneration, processor: LlavaProcessor, items: list[Item]) -> list[bool]:
    """Whether the torch model answers each item correctly, by teacher forcing."""
    right = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        texts = [f"USER: <image>\n{i.prompt} ASSISTANT: {i.answer}</s>" for i in part]
        inputs = processor(images=[i.image for i in part], text=texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            predicted = model(**inputs).logits[:, :-1].argmax(-1)
        matches = predicted == inputs["input_ids"][:, 1:]
        for row, item in enumerate(part):
            length = len(processor.tokenizer.encode(f" {item.answer}", add_special_tokens=False)) + 1
            right.append(bool(matches[row, -length:].all()))  # padding is on the left, so all answers end at the last token
    return right


def graph_answers(plan: Path, items: list[Item]) -> list[bool]:
    """Whether the exported graph answers each item correctly, by greedy decoding on ONNX Runtime."""
    import qvlm_export

    with qvlm_export.load(plan, runtime="onnxruntime:cpu") as model:
        return [model.generate(i.prompt, [i.image], max_new_tokens=64) == i.answer for i in items]


def quantize_crudely_(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, weight_bits: int, activation_bits: int
) -> None:
    """Quantizes every linear but lm_head in place by round-to-nearest with absmax ranges, in fake quantization.

    Weights have a scale per output channel, activations a static scale per tensor.
    """
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    amax = {id(m): 0.0 for m in linears}

    def observe(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        amax[id(module)] = max(amax[id(module)], float(args[0].abs().max()))

    handles = [m.register_forward_pre_hook(observe) for m in linears]
    torch_answers(model, processor, unseen_items(64, "calib"))
    for handle in handles:
        handle.remove()
    for linear in linears:
        with torch.no_grad():
            linear.weight.copy_(_fake_quantize(linear.weight, linear.weight.abs().amax(1, keepdim=True), weight_bits))
        linear.register_forward_pre_hook(_fake_quantize_hook(amax[id(linear)], activation_bits))


def _fake_quantize_hook(amax: float, bits: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda _, args: (_fake_quantize(args[0], torch.tensor(amax), bits), *args[1:])


def _fake_quantize(x: torch.Tensor, amax: torch.Tensor, bits: int) -> torch.Tensor:
    qmax = 2 ** (bits - 1) - 1
    scale = amax.clamp(min=1e-8) / qmax
    return (x / scale).round().clamp(-qmax, qmax) * scale


def load_torch(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The checkpoint as a torch model in float32, and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, LlavaProcessor.from_pretrained(folder)


def measure(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Accuracies of the torch model, of round-to-nearest and of exported graphs: row name -> accuracy by kind."""
    import qvlm_export

    items = unseen_items(count)
    model, processor = load_torch(folder)
    table = {"torch float32": rates(items, torch_answers(model, processor, items))}
    for bits in (8, 4):
        model, processor = load_torch(folder)
        quantize_crudely_(model, processor, bits, bits)
        table[f"torch, W{bits}A{bits} round-to-nearest"] = rates(items, torch_answers(model, processor, items))
    for scheme in ("fp16", "int8", "int4"):
        with tempfile.TemporaryDirectory() as scratch:
            plan = Path(scratch) / "tiny.plan"
            qvlm_export.export(str(folder), plan, scheme=scheme, backend="onnx")
            table[f"{scheme} graph"] = rates(items, graph_answers(plan, items))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--count", type=int, default=1400, help="questions, an equal number of each kind")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    table = measure(args.model, args.count)
    columns = ["overall", *scenes.KINDS]
    for name, row in table.items():
        print(f"{name:28}" + " ".join(f"{column} {100 * row[column]:.1f}" for column in columns))
    if args.out:
        args.out.write_text(json.dumps({"questions": args.count, "exact_match": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
