"""Attention that skips what is not seen, against attention that computes all of it and masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.attention import Past, attend, document_lengths, positions_within, see
from pretrain.models.attention import _block_mask as block_mask
from pretrain.models.gpt import GPT, Gpt
from pretrain.models.weights import initialize

BANDED = Gpt(layers=4, width=48, heads=4, context=64, vocab_size=101, attention=("dense", "banded"), band=8)


def visible(length: int, band: int | None, documents: Tensor | None, batch: int = 1) -> Tensor:
    """bool [B, T, T], pair by pair."""
    rows = torch.zeros(batch, length, dtype=torch.int64) if documents is None else documents
    table = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                inside = band is None or i - j < band
                table[b, i, j] = j <= i and inside and rows[b, i] == rows[b, j]
    return table


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    mixed: Tensor = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v
    return mixed


def numbers(*rows: list[int]) -> Tensor:
    """Document numbers of rows from the lengths of their documents."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]).int()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DOCUMENTS = numbers([37], [5, 1, 1, 20, 10])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("band", [None, 1, 2, 5, 12, 36, 37, 50])
def test_outputs_and_gradients_are_those_of_masked_attention(band: int | None, documents: Tensor | None) -> None:
    q, k, v, up = (normal(2, 3, 37, 8, seed=seed) for seed in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    mask = visible(37, band, documents, 2)
    expected = naive(q, k, v, mask)
    wanted = torch.autograd.grad(expected, (q, k, v), up)
    found = attend(q, k, v, see(torch.zeros(2, 37), band, documents))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, (q, k, v), up), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("band", [None, 1, 5, 40])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
def test_the_blocks_of_flex_attention_say_the_same(band: int | None, documents: Tensor | None) -> None:
    """Its forward alone: it has no backward on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (normal(2, 3, 37, 8, seed=seed).float() for seed in range(3))
    mask = block_mask(band, documents, 37, torch.device("cpu"))
    expected = naive(q, k, v, visible(37, band, documents, 2))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), expected)


def products(length: int, band: int | None = None, documents: Tensor | None = None) -> int:
    """Floating-point operations of the products in a forward and backward pass; the counter knows no fused kernel."""
    q, k, v = (normal(1, 2, length, 8, seed=seed).float().requires_grad_() for seed in range(3))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attend(q, k, v, see(torch.zeros(1, length), band, documents)).sum().backward()
    return int(counter.get_total_flops())


def test_a_band_costs_what_it_holds() -> None:
    dense = products(1024)
    assert 0 < products(1024, 16) <= dense * 2 * 16 / 1024
    assert products(2048, 16) < 2.05 * products(1024, 16)


def test_documents_cost_the_sum_of_their_squares() -> None:
    documents = numbers([256, 512, 128, 128])
    share = (256**2 + 512**2 + 2 * 128**2) / 1024**2
    assert products(1024, None, documents) == pytest.approx(products(1024) * share)


def test_the_blocks_of_flex_attention_are_few() -> None:
    sparse = block_mask(256, None, 4096, torch.device("cpu")).sparsity()
    assert sparse > 90  # per cent skipped; dense attention skips just under 50


def test_documents_are_counted_over_all_rows() -> None:
    assert document_lengths(numbers([3, 1, 2], [6], [1, 1, 4])) == (3, 1, 2, 6, 1, 1, 4)


def test_positions_begin_again_at_each_document() -> None:
    documents = numbers([3, 1, 2], [6], [1, 1, 4])
    assert positions_within(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]


# --- in a model -----------------------------------------------------------------------------------------------------


def started(config: Gpt = BANDED) -> GPT:
    model = config.build()
    initialize(model, 1)
    return model.eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(BANDED.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def test_every_second_layer_is_banded() -> None:
    assert BANDED.bands == [None, 8, None, 8]


def test_a_banded_layer_sees_no_further() -> None:
    """Two banded layers of 8 reach 14 positions back."""
    model = started(BANDED.model_copy(update={"layers": 2, "attention": ("banded",)}))
    row = tokens(1, 40)
    changed = row.clone()
    changed[0, 10] = (changed[0, 10] + 1) % BANDED.vocab_size
    differ = (model(row) - model(changed)).abs().amax(-1)[0] > 0
    assert differ.nonzero().flatten().tolist() == list(range(10, 25))


@pytest.mark.parametrize("pattern", [("dense",), ("dense", "banded")], ids="-".join)
def test_a_row_of_documents_is_as_each_by_itself(pattern: tuple[str, ...]) -> None:
    band = 8 if "banded" in pattern else None
    config = BANDED.model_copy(update={"attention": pattern, "band": band})
    packed, apart = started(config), started(config)
    lengths, rows = [[30, 2, 1, 7], [40], [12, 28]], tokens(3, 41)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    weights = torch.rand(3, 40, generator=torch.Generator().manual_seed(5))
    loss = packed(inputs, targets, weights, numbers(*lengths))
    loss.backward()
    total = torch.zeros(())
    for row, sizes in enumerate(lengths):
        parts = (x[row : row + 1].split(sizes, dim=1) for x in (inputs, targets, weights))
        for document in zip(*parts, strict=True):
            total = total + apart(*document)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    for (name, a), b in zip(packed.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_one_document_per_row_is_no_mask() -> None:
    model, rows = started(BANDED.model_copy(update={"attention": ("dense",), "band": None})), tokens(2, 40)
    whole = torch.zeros(2, 40, dtype=torch.int32)
    torch.testing.assert_close(model(rows, documents=whole), model(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (7, 8, 9), tuple(range(1, 40))], ids=lambda cuts: f"{len(cuts)} cuts")
@pytest.mark.parametrize("band", [1, 8])
def test_logits_with_a_past_equal_the_full_forward(cuts: tuple[int, ...], band: int) -> None:
    model, rows = started(BANDED.model_copy(update={"band": band})), tokens(2, 40)
    past = model.new_past()
    parts = [model(part, past=past) for part in rows.tensor_split(cuts, dim=1)]
    assert [memory.length for memory in past] == [40] * 4
    torch.testing.assert_close(torch.cat(parts, dim=1), model(rows), rtol=0, atol=1e-5)


def test_a_banded_past_keeps_its_band() -> None:
    past = Past(band=8)
    for _ in range(30):
        kept, _ = past.extend(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert kept.size(-2) == 8
    assert past.length == 30


def test_a_banded_model_compiles_whole_with_its_loss() -> None:
    model, rows = started(BANDED.model_copy(update={"layers": 2})), tokens(2, 41)
    batch = rows[:, :-1], rows[:, 1:], torch.ones(2, 40)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*batch), model(*batch))


def test_a_model_with_documents_compiles_once_for_all_lengths() -> None:
    model, rows = started(BANDED.model_copy(update={"layers": 2})), tokens(2, 41)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    graphs = []
    for lengths in ([[30, 10], [40]], [[1, 39], [20, 20]], [[5, 5, 30], [40]]):
        batch = rows[:, :-1], rows[:, 1:], torch.ones(2, 40), numbers(*lengths)
        torch.testing.assert_close(compiled(*batch), model(*batch))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]
