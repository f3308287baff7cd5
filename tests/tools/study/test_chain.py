"""tools/study/chain.py replays the model: its logits are those of transformers, with and without tower and prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paths import ROOT
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.inputs.prefix import find_common_prefix
from qvlm_export.inputs.samples import default_calibration, encode_entries, load_processor, read_entries
from tools.study import entropy as study_entropy
from tools.study.chain import open_chain, quantize_preceding

TINY = ROOT / "qvlm_export" / "tiny"
GRID = study_entropy.GRID[:2]


@pytest.fixture(scope="module")
def tiny() -> tuple[Checkpoint, list[Sample]]:
    checkpoint = open_checkpoint(str(TINY))
    entries = read_entries(default_calibration(), None, 4)
    return checkpoint, encode_entries(entries, load_processor(checkpoint.folder), checkpoint.config, 128)


@torch.inference_mode()
def reference_logits(samples: list[Sample]) -> torch.Tensor:
    model = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    logits = []
    for sample in sorted(samples, key=lambda sample: len(sample.input_ids)):
        found = model(input_ids=torch.from_numpy(sample.input_ids)[None], pixel_values=torch.from_numpy(sample.pixel_values))
        logits.append(found.logits[0, sample.answer_start - 1 : -1])
    return torch.cat(logits)


@pytest.mark.parametrize("vision", [True, False], ids=["all layers", "decoder only"])
@pytest.mark.parametrize("behind_prefix", [False, True])
def test_a_chain_of_float_layers_gives_the_logits_of_transformers(
    tiny: tuple[Checkpoint, list[Sample]], vision: bool, behind_prefix: bool
) -> None:
    checkpoint, samples = tiny
    prefix = find_common_prefix(load_processor(TINY), checkpoint.config) if behind_prefix else ()
    assert bool(prefix) == behind_prefix
    with open_chain(checkpoint, samples, "W8A8", GRID, vision=vision, prefix=prefix) as chain:
        blocks = {name.rpartition(".layers.")[0] for name in chain.names}
        assert any("vision" in block for block in blocks) == vision
        logits = chain.answer_logits(0, ())
        rounded = quantize_preceding(chain, GRID).answer_logits(len(chain.layers) - 1, ())
    expected = reference_logits(samples)
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert 1e-4 < float((rounded - expected).norm() / expected.norm()) < 0.2


def test_the_study_of_a_decoder_holds_pairs_behind_float_layers_only(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, samples = tiny
    monkeypatch.setattr(study_entropy, "GRID", study_entropy.GRID[:3])
    monkeypatch.setattr(study_entropy, "PAPER", 2)
    monkeypatch.setattr(study_entropy, "RESAMPLES", 20)
    records = study_entropy.study(checkpoint, samples, "W8A8", decoder_only=True)
    layers = 4 * checkpoint.config.text.num_layers
    assert [record["pair"] for record in records] == [[k, k + 1] for k in range(layers - 1)]
    assert all("quantized" not in record and record["layers"][0].startswith("language_model") for record in records)
    table = study_entropy.correlations(records)
    assert list(table) == ["W8A8"]
    assert list(table["W8A8"]) == ["float"]
    assert study_entropy.table_lines(table)[0] == "| proxy | W8A8 |"


def test_gains_are_medians_over_pairs() -> None:
    def pair(ded: float, unseen: list[float], final: list[float]) -> dict[str, Any]:
        return {"scheme": "W8A8", "float": {"DED": ded}, "unseen": unseen, "final": final}

    records = [pair(1.0, [2.0, 1.0], [1.0, 2.0]), pair(0.0, [1.0, 1.0], [1.0, 1.0]), pair(3.0, [1.0, 1.5], [1.0, 1.1])]
    assert study_entropy.gain_lines(records)[-1] == "| W8A8 | 3 | 2 | -62.5 % | +0.0 % | +55.0 %, 0 of 2 gain |"
