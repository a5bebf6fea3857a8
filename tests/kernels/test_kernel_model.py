"""The model of what kernels and rivals take: what it counts is what there is."""
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernel_cases, kernel_model
from benchmarks.kernel_model import DEVICES, Part, parts
from zoo.measuring.kernel_benchmark import PASSES, Side

MEGABYTE = 2 * 512 * 1024


def meta(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


@pytest.fixture
def products():
    """relu(x y) + 1, of matrices of a megabyte."""
    x, y = meta(512, 1024), meta(1024, 512)
    return Side(lambda: (x @ y).relu() + 1, (x, y))


def test_eager_calls_move_what_they_read_and_write(products):
    product, relu, plus = parts(products, PASSES[0], False, {})
    half = MEGABYTE // 2
    assert (product.bytes, product.operations) == (2 * MEGABYTE + half, 2 * 512 * 1024 * 512)
    assert (relu.bytes, relu.operations) == (plus.bytes, plus.operations) == (2 * half, 0)
    both = parts(products, PASSES[1], False, {})
    assert sum(part.operations for part in both) == 3 * product.operations


def test_compiled_calls_move_what_products_and_ends_need(products):
    product, ends = parts(products, PASSES[0], True, {})
    assert product.bytes == ends.bytes == 2 * MEGABYTE + MEGABYTE // 2


def test_views_and_broadcast_copies_are_counted_by_their_memory():
    x = meta(1, 1024)
    (only,) = parts(Side(lambda: x.expand(512, -1).transpose(0, 1) * 1, (x,)), PASSES[0], False, {})
    assert only.bytes == 2 * 1024 + MEGABYTE


def test_gathers_read_what_they_write():
    x, index = meta(4096, 8), torch.empty(10, dtype=torch.int64, device="meta")
    (only,) = parts(Side(lambda: x.index_select(0, index), (x,)), PASSES[0], False, {})
    assert only.bytes == 2 * 10 * 8 * 2 + 10 * 8


def test_grouped_convolutions_are_not_dense():
    x, weight = meta(1, 64, 8, 8), meta(64, 1, 3, 3)
    found = parts(Side(lambda: torch.nn.functional.conv2d(x, weight, padding=1, groups=64), (x, weight)), PASSES[1], False, {})
    assert [part.operations for part in found] == [2 * 64 * 64 * 9, 4 * 64 * 64 * 9]


def test_the_longest_of_three_times_counts():
    h200, _, a100 = DEVICES
    assert h200.seconds(Part("", 4.8e12, 1.0, {"sm_90": 1.0})) == pytest.approx(1)
    assert a100.seconds(Part("", 1.0, 312e12, {"sm_80": 1.0})) == pytest.approx(1)
    assert a100.seconds(Part("", 1.0, 1.0, {"sm_80": 4 * 108 * 1.41e9, "sm_90": 9e20})) == pytest.approx(1)


def test_flash_attention_is_counted_in_torchs_own_binary():
    for target in ("sm_80", "sm_90"):
        counted = kernel_model.flash_instructions(target)
        assert 0.2 < counted["forward"] < counted["backward"] < 1
    assert kernel_model.padded(64, 129) == 128 * 256


def test_scores_of_our_kernels_are_counted_with_their_padding(monkeypatch):
    monkeypatch.setattr(kernel_cases, "BATCHES", {(224, 224): 64})
    monkeypatch.setattr(kernel_cases, "BIFORMER_WIDTHS", {"T and S": 64})
    with kernel_model.modelled():
        first = next(kernel_model.of_one_image())["sm_90"]
    monkeypatch.setattr(kernel_model, "_counted", lambda launch, target: 0.5)  # the interpreter of the tests has no machine code
    assert len(first) == 3
    for launch in first:  # regions of 64 positions, two heads: no tile is larger than a region
        assert kernel_model._routed_scores(launch) == 2 * 49 * 64 * 64
    assert kernel_model.own_instructions(first, "sm_90", 64) == 64 * 3 * 0.5 * 2 * 49 * 64 * 64


def test_states_of_scans_are_counted_with_what_is_beyond_their_length(monkeypatch):
    launch = SimpleNamespace(arguments=dict(length=9, WIDTH=16), configuration=dict(CHANNELS=32, STEPS=4), grid=(3, 2))
    assert kernel_model._states(launch) == 6 * 16 * 32 * 12


def test_the_page_holds_every_side_of_every_operator():
    page = kernel_model.FILE.read_text()
    for operator, cases in kernel_cases.CASES.items():
        if operator in kernel_model.LEFT_OUT:
            continue
        case = next(cases("cpu", torch.float32, True))
        for side in ("ours", *case.rivals, *case.floors):
            held = f"| {side} |" in page and f"| {operator}, " in page
            assert held or side in kernel_model.UNSEEN, f"{operator}, {side}: run python -m benchmarks.kernel_model"
