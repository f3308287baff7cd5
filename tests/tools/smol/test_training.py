"""Training rows and the folding of the projector of the smol LLaVA."""

from __future__ import annotations

import numpy as np
import torch

from tools.smol import packing, train_projector
from tools.tiny import scenes


def test_a_token_sees_the_shared_text_and_its_own_question_before_it():
    segments = [0, 0, 1, 1, 2, 2, packing.PADDING]
    mask = packing.visible(torch.tensor([segments]))[0]
    for row, own in enumerate(segments):
        for column, other in enumerate(segments):
            assert mask[row, column] == (column <= row and other in (0, own)), (row, column)


def test_rows_of_a_batch_are_padded_without_weight():
    short = packing.Row([5, 6], [0, 1], [0, 1], [0.0, 1.0])
    long = packing.Row([5, 6, 7], [0, 1, 1], [0, 1, 2], [0.0, 0.5, 1.0])
    batch = packing.collate([short, long])
    assert batch.ids.tolist() == [[5, 6, 0], [5, 6, 7]]
    assert batch.weights.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.5, 1.0]]
    assert batch.mask.shape == (2, 1, 3, 3)
    assert batch.mask[0, 0].any(dim=-1).all()  # a row without anything to see would be NaN


def test_the_folded_projector_standardizes_its_input_itself():
    torch.manual_seed(0)
    projector, mean, std = train_projector.make_projector(), torch.randn(384), torch.rand(384) + 0.1
    x = mean + std * torch.randn(5, 384)
    weights = {name: value.float() for name, value in train_projector.fold(projector, mean, std).items()}
    hidden = torch.nn.functional.linear(x, weights["linear_1.weight"], weights["linear_1.bias"])
    found = torch.nn.functional.linear(
        torch.nn.functional.gelu(hidden), weights["linear_2.weight"], weights["linear_2.bias"]
    )
    assert torch.allclose(found, projector((x - mean) / std), atol=2e-2)


def test_patches_are_assigned_to_the_cell_of_the_object_that_they_show():
    scene = scenes.Scene((scenes.Thing(0, "red", "square"), scenes.Thing(8, "blue", "circle")), seed=1)
    cells = train_projector.shown_cells(scene).reshape(8, 8)
    assert set(np.unique(cells)) == {-1, 0, 8}
    assert (cells[:3, :3] == 0).sum() == (cells == 0).sum() >= 2
    assert (cells[5:, 5:] == 8).sum() == (cells == 8).sum() >= 2


def test_the_learning_rate_warms_up_and_falls():
    rates = [train_projector.learning_rate(step, 100) for step in range(100)]
    assert rates[0] < rates[19] <= train_projector.LEARNING_RATE
    assert rates[19] > rates[50] > rates[99] > 0
