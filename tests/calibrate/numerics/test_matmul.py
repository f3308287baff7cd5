"""Matrix products by oneDNN and in parts: equal to exact products, with gradients; the same bits on all threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_export import open_small
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.numerics import matmul as matmul_module
from qvlm_export.calibrate.numerics.matmul import (
    MIN_ONEDNN_SIZE,
    PART_ROWS,
    MatmulLinear,
    apply_linear,
    deterministic_small_matmul,
    gram,
    is_intel,
    matmul,
    transposed_matmul,
    use_matmul_linears,
)

SIZE = MIN_ONEDNN_SIZE + 9
# Rows, input features, output features.
SHAPES = (
    (600, 1024, 2816),
    (MIN_ONEDNN_SIZE, 4096, MIN_ONEDNN_SIZE),
    (2048, MIN_ONEDNN_SIZE, 2048),
    (75, 256, 512),
    (256, 4800, 256),
)


@pytest.fixture(autouse=True)
def _onednn_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN works on every processor, so the tests use it also where it is not faster."""
    monkeypatch.setattr(matmul_module, "prefers_onednn", matmul_module.has_onednn_linear)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def onednn_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that oneDNN has computed, (..., in, out)."""
    shapes: list[tuple[int, ...]] = []
    apply = matmul_module._apply_large_linear

    def apply_and_record(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append((*x.shape, len(weight)))
        return apply(x, weight, bias)

    monkeypatch.setattr(matmul_module, "_apply_large_linear", apply_and_record)
    return shapes


def random_tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2e-6 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(SIZE, SIZE), (2, MIN_ONEDNN_SIZE, SIZE)])
def test_a_linear_layer_equals_a_float64_layer(
    shape: tuple[int, ...], bias: bool, onednn_shapes: list[tuple[int, ...]]
) -> None:
    layer, x = MatmulLinear(SIZE, MIN_ONEDNN_SIZE, bias=bias), random_tensor(*shape).requires_grad_()
    exact = nn.Linear(SIZE, MIN_ONEDNN_SIZE, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    output_gradient = random_tensor(*shape[:-1], MIN_ONEDNN_SIZE)
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], output_gradient)
    exact_x = x.detach().double().requires_grad_()
    expected = exact(exact_x)
    assert onednn_shapes == [(*shape, MIN_ONEDNN_SIZE)]
    assert_close(y, expected)
    exact_gradients = torch.autograd.grad(expected, [exact_x, *exact.parameters()], output_gradient.double())
    for actual, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert_close(actual, exact_gradient)


def test_only_tensors_that_the_gradients_need_are_saved() -> None:
    """Frozen weights need no gradients, so the input of a layer need not be saved."""
    saved: list[int] = []
    x, weight = random_tensor(SIZE, SIZE).requires_grad_(), random_tensor(MIN_ONEDNN_SIZE, SIZE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        apply_linear(x, weight)
    assert saved == [weight.data_ptr()]


def test_the_pinned_torch_has_onednns_linear_layer() -> None:
    assert matmul_module.has_onednn_linear() == torch.backends.mkldnn.is_available()


def test_products_are_right_for_any_strides(onednn_shapes: list[tuple[int, ...]]) -> None:
    a, b = random_tensor(SIZE, MIN_ONEDNN_SIZE), random_tensor(SIZE, MIN_ONEDNN_SIZE + 50)
    product_of_transposed, transposed_product = matmul(a.T, b), matmul(b.T, a).T
    expected = a.double().T @ b.double()
    assert len(onednn_shapes) == 2
    for product in (product_of_transposed, transposed_product, matmul(a.T.contiguous(), b.T.contiguous().T)):
        assert_close(product, expected)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (random_tensor(MIN_ONEDNN_SIZE - 1, SIZE), random_tensor(SIZE, SIZE)),
        (random_tensor(SIZE, MIN_ONEDNN_SIZE - 1), random_tensor(MIN_ONEDNN_SIZE - 1, SIZE)),
        (random_tensor(SIZE, SIZE), random_tensor(SIZE, MIN_ONEDNN_SIZE - 1)),
        (random_tensor(SIZE, SIZE).double(), random_tensor(SIZE, SIZE).double()),
        (random_tensor(2, SIZE, SIZE), random_tensor(2, SIZE, SIZE)),
        (random_tensor(SIZE), random_tensor(SIZE, SIZE)),
        (random_tensor(SIZE, SIZE), random_tensor(SIZE)),
    ],
    ids=["rows", "summands", "columns", "float64", "batches", "a row", "a column"],
)
def test_other_products_are_computed_by_blas(
    left: torch.Tensor, right: torch.Tensor, onednn_shapes: list[tuple[int, ...]]
) -> None:
    assert torch.equal(matmul(left, right), left @ right)
    assert not onednn_shapes


@pytest.mark.usefixtures("_threads")
def test_large_products_have_the_same_bits_on_one_thread_and_on_two() -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows, into, out in SHAPES:
            x = random_tensor(rows, into).requires_grad_()
            y = apply_linear(x, random_tensor(out, into))
            results += [y.detach(), *torch.autograd.grad(y, x, random_tensor(rows, out))]
    half = len(results) // 2
    assert all(torch.equal(one, two) for one, two in zip(results[:half], results[half:], strict=True))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("rows", [1, 5, 7, 9, MIN_ONEDNN_SIZE - 1])
def test_few_rows_have_the_same_bits_on_one_thread_and_on_two(rows: int) -> None:
    """BLAS computes them, and splits some of them in another way on two threads. Gradients are compared, too."""
    results = []
    x, weight = random_tensor(rows, 768).requires_grad_(), random_tensor(256, 768)
    for count in (1, 2):
        torch.set_num_threads(count)
        y = apply_linear(x, weight)
        with deterministic_small_matmul(x):
            (gradient,) = torch.autograd.grad(y, x, random_tensor(rows, 256))
        results.append((y.detach(), matmul(x.detach(), weight.T), gradient))
        assert torch.get_num_threads() == count
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(65, 2112, 5), (243, 1100, 37), (MIN_ONEDNN_SIZE + 1, 1088, MIN_ONEDNN_SIZE - 1)])
def test_few_columns_have_the_same_bits_on_any_number_of_threads(shape: tuple[int, int, int]) -> None:
    rows, into, out = shape
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x, weight = random_tensor(rows, into), random_tensor(out, into)
        results.append((matmul(x, weight.T), apply_linear(x, weight), matmul(weight, x.T)))
    assert all(torch.equal(one, other) for others in results[1:] for one, other in zip(results[0], others, strict=True))


def test_without_gradients_autograd_is_not_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_module._LargeLinearFunction, "apply", lambda *_: pytest.fail("autograd was entered"))
    weight = random_tensor(SIZE, SIZE).requires_grad_()
    with torch.no_grad():
        assert_close(apply_linear(random_tensor(SIZE, SIZE), weight), (random_tensor(SIZE, SIZE) @ weight.T).double())
    apply_linear(random_tensor(SIZE, SIZE), random_tensor(SIZE, SIZE))


def test_every_linear_of_every_block_is_a_onednn_linear(llava) -> None:
    blocks = make_blocks(open_small(llava()).hf_config)
    linears = [m for block in blocks.all() for m in block.module.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == len(blocks.quantizable())
    assert {type(layer) for layer in linears} == {MatmulLinear}
    assert not any(p.requires_grad or not p.is_meta for layer in linears for p in layer.parameters())


def test_only_plain_linears_are_replaced() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Bilinear(2, 2, 2), nn.Linear(5, 2))
    use_matmul_linears(model)
    assert [type(layer) for layer in model] == [MatmulLinear, nn.Bilinear, MatmulLinear]
    assert model[0].bias is None
    assert model[2].weight.shape == (2, 5)


def test_onednn_is_not_used_where_it_is_not_faster(
    onednn_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_module, "prefers_onednn", lambda: False)
    product = matmul(random_tensor(SIZE, SIZE), random_tensor(SIZE, SIZE))
    assert torch.equal(product, torch.mm(random_tensor(SIZE, SIZE), random_tensor(SIZE, SIZE)))
    assert not onednn_shapes


def test_onednn_is_preferred_only_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for capability, expected in (("AVX512", matmul_module.has_onednn_linear()), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert matmul_module.prefers_onednn() == expected


@pytest.fixture(params=["oneDNN", "parts", "BLAS"])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as on an AMD and on an Intel processor with AVX-512, and as on one without."""
    monkeypatch.setattr(matmul_module, "is_intel", lambda: request.param == "parts")
    if request.param == "BLAS":
        monkeypatch.setattr(matmul_module, "prefers_onednn", lambda: False)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(0, 3), (1, 1), (5, 700), (700, 5), (300, 192), (1500, 193), (90, 577)])
def test_a_gram_matrix_is_exactly_symmetric_and_equals_the_exact_one(tokens: int, width: int, weighted: bool) -> None:
    rows = random_tensor(tokens, 2 * width)[:, ::2]
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) if weighted else None
    product, exact = gram(rows, weights), rows.double()
    assert torch.equal(product, product.T)
    expected = exact.T @ (exact if weights is None else exact * weights[:, None].double())
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-4)
    assert gram(exact).dtype == torch.float64


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("shape", [(1, 3, 5), (700, 193, 70), (65, 200, 600), (5000, 64, 300)])
def test_a_sum_over_tokens_equals_the_exact_one(shape: tuple[int, int, int]) -> None:
    tokens, columns, others = shape
    a, b = random_tensor(tokens, columns), random_tensor(tokens, others)
    assert_close(transposed_matmul(a, b), a.double().T @ b.double())


@pytest.mark.usefixtures("_threads", "_library")
@pytest.mark.parametrize("shape", [(5000, 300, 200), (300, 700, 64), (1030, 96, 2000)])
def test_sums_over_tokens_have_the_same_bits_on_any_number_of_threads(shape: tuple[int, int, int]) -> None:
    tokens, columns, others = shape
    a, b, results = random_tensor(tokens, columns), random_tensor(tokens, others), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append((gram(a), gram(b, a[:, 0].abs()), transposed_matmul(a, b)))
    assert all(torch.equal(one, other) for others in results[1:] for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2 * PART_ROWS - 1, 2 * PART_ROWS, 3 * PART_ROWS + 7])
def test_products_of_many_rows_are_divided_on_intel(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bias and gradients, with and without autograd, from views and on several threads."""
    layer = MatmulLinear(SIZE, MIN_ONEDNN_SIZE, bias=bias)
    exact = nn.Linear(SIZE, MIN_ONEDNN_SIZE, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    for intel in (False, True):
        monkeypatch.setattr(matmul_module, "is_intel", lambda intel=intel: intel)
        x = random_tensor(rows, SIZE)
        with torch.inference_mode():
            assert_close(layer(x), exact(x.double()))
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
        exact_x = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(exact(exact_x).square().sum(), exact_x)
        assert_close(gradient, expected)


def test_who_made_the_processor_is_read_from_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = tmp_path / "cpuinfo"
    monkeypatch.setattr(matmul_module, "_CPU_INFO", description)
    monkeypatch.setattr(matmul_module.platform, "processor", lambda: "x86_64")
    for maker, intel in (("GenuineIntel", True), ("AuthenticAMD", False)):
        description.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n", encoding="utf-8")
        assert is_intel.__wrapped__() == intel
    description.unlink()
    assert not is_intel.__wrapped__()
    monkeypatch.setattr(matmul_module.platform, "processor", lambda: "Intel64 Family 6 Model 85, GenuineIntel")
    assert is_intel.__wrapped__()
