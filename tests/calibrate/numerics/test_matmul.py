"""Products by oneDNN: the same as by BLAS, gradients included, and the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_export import open_small
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.numerics import matmul as products
from qvlm_export.calibrate.numerics.matmul import (
    MIN_ONEDNN_SIZE,
    OneDnnLinear,
    apply_linear,
    deterministic_small_matmul,
    matmul,
    use_onednn_linears,
)

SIZE = MIN_ONEDNN_SIZE + 9
# Rows, in, out.
SHAPES = (
    (600, 1024, 2816),
    (MIN_ONEDNN_SIZE, 4096, MIN_ONEDNN_SIZE),
    (2048, MIN_ONEDNN_SIZE, 2048),
    (75, 256, 512),
    (256, 4800, 256),
)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN computes on every processor; only whether it is quicker is asked of this one."""
    monkeypatch.setattr(products, "prefers_onednn", products.has_onednn_linear)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that were taken over."""
    found: list[tuple[int, ...]] = []
    compute = products._taken

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found.append((*x.shape, len(weight)))
        return compute(x, weight, bias)

    monkeypatch.setattr(products, "_taken", noted)
    return found


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-6 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (2, MIN_ONEDNN_SIZE, SIZE)])
def test_a_linear_layer(shape: tuple[int, ...], bias: bool, taken: list[tuple[int, ...]]) -> None:
    layer, x = OneDnnLinear(SIZE, MIN_ONEDNN_SIZE, bias=bias), drawn(*shape).requires_grad_()
    exact = nn.Linear(SIZE, MIN_ONEDNN_SIZE, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    towards = drawn(*shape[:-1], MIN_ONEDNN_SIZE)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], towards)
    given = x.detach().double().requires_grad_()
    wanted = exact(given)
    assert taken == [(*shape, MIN_ONEDNN_SIZE)]
    close(y, wanted)
    for mine, true in zip(found, torch.autograd.grad(wanted, [given, *exact.parameters()], towards.double()), strict=True):
        close(mine, true)


def test_what_gradients_do_not_need_is_not_kept() -> None:
    """Weights of a model that is only measured have no gradients, so that no layer's input need stay for them."""
    kept: list[int] = []
    x, weight = drawn(SIZE, SIZE).requires_grad_(), drawn(MIN_ONEDNN_SIZE, SIZE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        apply_linear(x, weight)
    assert kept == [weight.data_ptr()]


def test_it_is_there_in_the_torch_that_is_pinned() -> None:
    assert products.has_onednn_linear() == torch.backends.mkldnn.is_available()


def test_a_product_of_any_strides(taken: list[tuple[int, ...]]) -> None:
    a, b = drawn(SIZE, MIN_ONEDNN_SIZE), drawn(SIZE, MIN_ONEDNN_SIZE + 50)
    one_way, other_way = matmul(a.T, b), matmul(b.T, a).T
    wanted = a.double().T @ b.double()
    assert len(taken) == 2
    for found in (one_way, other_way, matmul(a.T.contiguous(), b.T.contiguous().T)):
        close(found, wanted)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (drawn(MIN_ONEDNN_SIZE - 1, SIZE), drawn(SIZE, SIZE)),
        (drawn(SIZE, MIN_ONEDNN_SIZE - 1), drawn(MIN_ONEDNN_SIZE - 1, SIZE)),
        (drawn(SIZE, SIZE), drawn(SIZE, MIN_ONEDNN_SIZE - 1)),
        (drawn(SIZE, SIZE).double(), drawn(SIZE, SIZE).double()),
        (drawn(2, SIZE, SIZE), drawn(2, SIZE, SIZE)),
        (drawn(SIZE), drawn(SIZE, SIZE)),
        (drawn(SIZE, SIZE), drawn(SIZE)),
    ],
    ids=["rows", "summands", "columns", "float64", "batches", "a row", "a column"],
)
def test_the_rest_stays_with_blas(left: torch.Tensor, right: torch.Tensor, taken: list[tuple[int, ...]]) -> None:
    assert torch.equal(matmul(left, right), left @ right)
    assert not taken


@pytest.mark.usefixtures("_threads")
def test_the_same_bits_on_one_thread_and_on_two() -> None:
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows, into, out in (
            (600, 1024, 2816),
            (MIN_ONEDNN_SIZE, 4096, MIN_ONEDNN_SIZE),
            (2048, MIN_ONEDNN_SIZE, 2048),
            (75, 256, 512),
            (256, 4800, 256),
        ):
            x = drawn(rows, into).requires_grad_()
            y = apply_linear(x, drawn(out, into))
            found += [y.detach(), *torch.autograd.grad(y, x, drawn(rows, out))]
    half = len(found) // 2
    assert all(torch.equal(one, two) for one, two in zip(found[:half], found[half:], strict=True))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 5, 7, 9, MIN_ONEDNN_SIZE - 1])
def test_few_rows_have_the_same_bits_on_one_thread_and_on_two(rows: int) -> None:
    """By BLAS, which divides some of them otherwise; gradients, too."""
    found = []
    x, weight = drawn(rows, 768).requires_grad_(), drawn(256, 768)
    for count in (1, 2):
        torch.set_num_threads(count)
        y = apply_linear(x, weight)
        with deterministic_small_matmul(x):
            (gradient,) = torch.autograd.grad(y, x, drawn(rows, 256))
        found.append((y.detach(), matmul(x.detach(), weight.T), gradient))
        assert torch.get_num_threads() == count
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(65, 2112, 5), (243, 1100, 37), (MIN_ONEDNN_SIZE + 1, 1088, MIN_ONEDNN_SIZE - 1)])
def test_few_columns_have_the_same_bits_on_any_number_of_threads(shape: tuple[int, int, int]) -> None:
    rows, into, out = shape
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x, weight = drawn(rows, into), drawn(out, into)
        found.append((matmul(x, weight.T), apply_linear(x, weight), matmul(weight, x.T)))
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


def test_where_no_gradient_is_asked_for_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products._Linear, "apply", lambda *_: pytest.fail("goes by autograd"))
    weight = drawn(SIZE, SIZE).requires_grad_()
    with torch.no_grad():
        close(apply_linear(drawn(SIZE, SIZE), weight), (drawn(SIZE, SIZE) @ weight.T).double())
    apply_linear(drawn(SIZE, SIZE), drawn(SIZE, SIZE))


def test_every_linear_of_every_block_computes_so(llava) -> None:
    blocks = make_blocks(open_small(llava()).hf_config)
    searched = blocks.all()
    linears = [m for block in searched for m in block.module.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == len(blocks.quantizable())
    assert {type(layer) for layer in linears} == {OneDnnLinear}
    assert not any(p.requires_grad or not p.is_meta for layer in linears for p in layer.parameters())


def test_a_model_with_other_linears_keeps_them() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Bilinear(2, 2, 2), nn.Linear(5, 2))
    use_onednn_linears(model)
    assert [type(layer) for layer in model] == [OneDnnLinear, nn.Bilinear, OneDnnLinear]
    assert model[0].bias is None
    assert model[2].weight.shape == (2, 5)


def test_where_it_is_not_quicker_nothing_is_taken(taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)
    found = matmul(drawn(SIZE, SIZE), drawn(SIZE, SIZE))
    assert torch.equal(found, torch.mm(drawn(SIZE, SIZE), drawn(SIZE, SIZE)))
    assert not taken


def test_only_avx512_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for capability, wanted in (("AVX512", products.has_onednn_linear()), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert products.prefers_onednn() == wanted
