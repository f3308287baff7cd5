"""How far a quantized decoder is from the float one on the test set: KL divergence, top-1 agreement, perplexity.

    python -m tools.smol.scores --model build/smol --data build/smol-data                      # makes float.npy
    python -m tools.smol.scores --model build/smol --data build/smol-data --hidden NAME.npy    # scores hidden states

Hidden states are the input of lm_head, float32 [tokens of all samples, 576]. Those of the float model are computed by
transformers in float32. The head is the float one for both, as lm_head is not quantized.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.inputs.samples import load_processor
from tools.bench.data import load_samples

KINDS = ("scenes", "photos", "english", "long")
BATCH, ROWS_AT_ONCE = 4, 256


@dataclass(frozen=True)
class Places:
    """Positions whose next token is text; all arrays have one entry for each.

    rows: int64, of the hidden states of all samples. targets: int64, the tokens that follow. samples: int64, the number of
    the sample. answers: bool, whether the token that follows belongs to the answer or ends it.
    """

    rows: np.ndarray
    targets: np.ndarray
    samples: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True)
class TokenScores:
    """One value for each position: KL(float || quantized) and the two cross-entropies in nats, and whether both agree.

    kl, float_loss, loss: float64. agreed: bool, whether the most likely tokens are the same.
    """

    kl: np.ndarray
    agreed: np.ndarray
    float_loss: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Score:
    """Means over tokens. kl_error: the standard error of `kl`, for samples drawn at random. top1: in percent."""

    tokens: int
    kl: float
    kl_error: float
    top1: float
    float_perplexity: float
    perplexity: float


@torch.inference_mode()
def hidden_states(model_folder: Path, samples: Sequence[Sample]) -> np.ndarray:
    """The input of lm_head by transformers in float32, sample after sample: float32 [tokens, hidden]."""
    model = LlavaForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].input_ids))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), BATCH):
        part = [samples[number] for number in order[start : start + BATCH]]
        longest = max(len(sample.input_ids) for sample in part)
        # Padded on the right, which what stands before it does not see.
        ids = torch.tensor(np.stack([np.pad(s.input_ids, (0, longest - len(s.input_ids))) for s in part]))
        lengths = torch.tensor([len(s.input_ids) for s in part])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        pixels = [sample.pixel_values for sample in part if len(sample.pixel_values)]
        images = {"pixel_values": torch.from_numpy(np.concatenate(pixels))} if pixels else {}
        states = model.model(input_ids=ids, attention_mask=mask, use_cache=False, **images).last_hidden_state
        for number, row, length in zip(order[start : start + BATCH], states, lengths.tolist(), strict=True):
            found[number] = row[:length].numpy().copy()
    return np.concatenate([found[number] for number in range(len(samples))])


def user_text_start(processor: object, tokenizer: object) -> int:
    """Number of tokens before the user's text in a prompt without picture."""
    before, _ = chat_text(processor, [{"role": "user", "text": "?"}]).split("?")
    return len(tokenizer(before, add_special_tokens=False)["input_ids"])  # type: ignore[operator]


def find_places(samples: Sequence[Sample], image_token: int, text_start: int) -> Places:
    """The positions whose next token is text: from the last image token on, or from the first token of the user's text.

    The tokens before that may be a prefix, whose hidden states an export does not compute. text_start: how many they are in
    a sample without picture.
    """
    rows, targets, owners, answers, offset = [], [], [], [], 0
    for number, sample in enumerate(samples):
        ids = sample.input_ids
        images = np.flatnonzero(ids == image_token)
        first = int(images[-1]) if len(images) else text_start
        places = np.arange(first, len(ids) - 1)
        rows.append(offset + places)
        targets.append(ids[places + 1])
        owners.append(np.full(len(places), number))
        answers.append(places + 1 >= sample.answer_start)
        offset += len(ids)
    return Places(*(np.concatenate(part) for part in (rows, targets, owners, answers)))


@torch.inference_mode()
def token_scores(head: np.ndarray, reference: np.ndarray, hidden: np.ndarray, targets: np.ndarray) -> TokenScores:
    """Compares hidden states [T, width] with those of the float model; head: float32 [vocab, width]; targets: int64 [T].

    Logits of ROWS_AT_ONCE tokens at a time are in memory.
    """
    weights = torch.from_numpy(head).T
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_p, log_q = (
            (torch.from_numpy(states[rows]) @ weights).double().log_softmax(dim=-1) for states in (reference, hidden)
        )
        goal = torch.from_numpy(targets[rows])[:, None]
        values = (
            (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0),
            log_p.argmax(dim=-1) == log_q.argmax(dim=-1),
            -log_p.gather(1, goal)[:, 0],
            -log_q.gather(1, goal)[:, 0],
        )
        for part, value in zip(parts, values, strict=True):
            part.append(value.numpy())
    return TokenScores(*(np.concatenate(part) for part in parts))


def summarize(found: TokenScores, owners: np.ndarray, chosen: np.ndarray) -> Score:
    """Means over the chosen tokens, bool [T]. owners: int64 [T], the sample of each token.

    The standard error is that of a ratio of two sums over samples: of KL divergences, and of tokens.
    """
    kl, groups = found.kl[chosen], np.unique(owners[chosen], return_inverse=True)[1]
    mean, count = float(kl.mean()), int(groups.max()) + 1
    deviations = np.bincount(groups, kl - mean)
    return Score(
        tokens=len(kl),
        kl=mean,
        kl_error=float(np.sqrt((deviations**2).sum() * count / max(count - 1, 1)) / len(kl)),
        top1=100 * float(found.agreed[chosen].mean()),
        float_perplexity=float(np.exp(found.float_loss[chosen].mean())),
        perplexity=float(np.exp(found.loss[chosen].mean())),
    )


def score(
    head: np.ndarray, reference: np.ndarray, hidden: np.ndarray, places: Places, kinds: Sequence[str]
) -> dict[str, dict[str, Score]]:
    """The scores by kind of sample, "all" first; of each, those of all tokens of text ("text") and of answers ("answer").

    reference, hidden: float32 [tokens of all samples, width], of the float and of the quantized model. kinds: of samples.
    """
    found = token_scores(head, reference[places.rows], hidden[places.rows], places.targets)
    kind_of = np.array(kinds)[places.samples]
    table = {}
    for kind in ("all", *dict.fromkeys(kinds)):
        chosen = np.ones(len(kind_of), bool) if kind == "all" else kind_of == kind
        table[kind] = {
            "text": summarize(found, places.samples, chosen),
            "answer": summarize(found, places.samples, chosen & places.answers),
        }
    return table


def load_head(model_folder: Path) -> np.ndarray:
    """The weight of lm_head, which is the embedding, float32 [vocab, hidden]."""
    with safe_open(model_folder / "model.safetensors", "np") as file:
        name = next(name for name in file.keys() if name.endswith("embed_tokens.weight"))  # noqa: SIM118
        return np.asarray(file.get_tensor(name), np.float32)


def load_kinds(path: Path) -> list[str]:
    """The kind of each sample, from the JSONL file of a set."""
    return [json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class EvaluationSet:
    """What hidden states on the test set are scored with.

    head: weight of lm_head, float32 [vocab, hidden]. reference: hidden states of the float model, float32 [tokens of all
    samples, hidden]. kinds: of the samples.
    """

    head: np.ndarray
    reference: np.ndarray
    places: Places
    kinds: Sequence[str]

    def score(self, hidden: np.ndarray) -> dict[str, dict[str, Score]]:
        """The scores of a quantized model by kind of sample. hidden: float32 [tokens of all samples, hidden]."""
        return score(self.head, self.reference, hidden, self.places, self.kinds)


def open_evaluation_set(model: Path, data: Path, name: str = "test") -> EvaluationSet:
    """A set in the folder that make_data has written; computes and stores the float model's states if they are missing."""
    samples, float_file = load_samples(data / f"{name}.npz"), data / ("float.npy" if name == "test" else f"float-{name}.npy")
    if not float_file.exists():
        np.save(float_file, hidden_states(model, samples))
    processor = load_processor(model)
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    places = find_places(samples, image_token, user_text_start(processor, processor.tokenizer))
    return EvaluationSet(load_head(model), np.load(float_file), places, load_kinds(data / f"{name}.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data has written")
    parser.add_argument("--hidden", type=Path, nargs="*", default=[], help=".npy files of hidden states on the test set")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = open_evaluation_set(args.model, args.data)
    for path in args.hidden or [args.data / "float.npy"]:
        for kind, rows in test.score(np.load(path)).items():
            for tokens, row in rows.items():
                values = {key: round(value, 5) for key, value in asdict(row).items()}
                print(json.dumps({"name": path.stem, "kind": kind, "of": tokens, **values}), flush=True)


if __name__ == "__main__":
    main()
