import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import region_means, region_routes

MAPS = [((14, 14), (7, 7)), ((9, 17), (4, 3)), ((3, 5), (7, 7)), ((1, 1), (2, 2)), ((8, 1), (3, 1))]


def oracle_means(x, regions):
    """Loops over regions; the mean of nothing is 0, its place is marked."""
    height, width = x.shape[1:3]
    h, w = math.ceil(height / regions[0]), math.ceil(width / regions[1])
    means, empty = [], []
    for i in range(regions[0]):
        for j in range(regions[1]):
            part = x[:, i * h : (i + 1) * h, j * w : (j + 1) * w].flatten(1, 2)
            means.append(part.mean(1) if part.shape[1] else torch.zeros_like(x[:, 0, 0]))
            empty.append(part.shape[1] == 0)
    return torch.stack(means, 1), torch.tensor(empty)


@pytest.mark.parametrize(("size", "regions"), MAPS)
def test_means_are_those_of_the_definition(size, regions):
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(region_means(x, regions), oracle_means(x, regions)[0])
    assert torch.autograd.gradcheck(lambda t: region_means(t, regions), x, fast_mode=True)


@pytest.mark.parametrize(("size", "regions"), MAPS)
def test_routes_are_the_best_regions_and_never_an_empty_one_before_a_full_one(size, regions):
    q, k = torch.randn(2, 2, *size, 6, dtype=torch.float64).unbind()
    (q_means, _), (k_means, empty) = oracle_means(q, regions), oracle_means(k, regions)
    affinity = (q_means @ k_means.transpose(1, 2)).masked_fill(empty, -math.inf)
    full = int((~empty).sum())
    for topk in {1, min(3, regions[0] * regions[1]), regions[0] * regions[1]}:
        routes, scores = region_routes(q, k, regions, topk)
        torch.testing.assert_close(scores, affinity.sort(descending=True).values[..., :topk])
        torch.testing.assert_close(affinity.gather(2, routes), scores)
        assert not empty[routes[..., :full]].any()


def test_keys_may_lie_on_another_map_and_memory_layout():
    q = torch.randn(2, 8, 12, 4)
    k = torch.randn(2, 10, 3, 4).transpose(1, 2).contiguous().transpose(1, 2)
    routes, _ = region_routes(q, k, (2, 3), 2)
    assert torch.equal(routes, region_routes(q, k.contiguous(), (2, 3), 2)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_routes_like_float32(dtype):
    q, k = torch.randn(2, 2, 14, 14, 32).unbind()
    _, scores = region_routes(q.to(dtype), k.to(dtype), (7, 7), 4)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float(), region_routes(q, k, (7, 7), 4)[1], atol=0.1, rtol=0.05)


def test_bad_input_is_named():
    x = torch.zeros(1, 4, 4, 2)
    with pytest.raises(ValueError, match=r"topk must be 1 to 4 .*got 5"):
        region_routes(x, x, (2, 2), 5)
    with pytest.raises(ValueError, match=r"q must be \(B, H, W, C\), got shape \(4, 2\)"):
        region_routes(x[0, 0], x, (2, 2), 1)
    with pytest.raises(ValueError, match="k must have q's batch and channels"):
        region_routes(x, x[..., :1], (2, 2), 1)
    with pytest.raises(ValueError, match="regions must be at least 1, got 0"):
        region_means(x, (0, 2))
    with pytest.raises(TypeError, match="x must be of a floating dtype, .*, got torch.int64"):
        region_means(x.long(), (2, 2))


WRONG = {
    "no tensor": ("q", lambda q: 3, "q must be a tensor"),
    "three dimensions": ("k", lambda k: k[0], r"k must be \(B, H, W, C\)"),
    "whole numbers": ("q", lambda q: q.long(), "q must be of a floating dtype"),
    "no positions": ("k", lambda k: k[:, :, :0], r"k must be \(B, H, W, C\), of which B alone may be 0"),
    "another batch": ("k", lambda k: k[:1], "k must have q's batch and channels"),
    "another device": ("k", lambda k: k.to("meta"), "k must be on the device of q"),
    "another dtype": ("k", lambda k: k.half(), r"k must have the dtype of q \(torch.float32\), got torch.float16"),
    "one number of regions": ("regions", lambda _: 6, "regions must be a pair, for rows and columns, got 6"),
    "no regions": ("regions", lambda _: (3, -2), "regions must be at least 1, got -2"),
    "no routes": ("topk", lambda _: 0, "topk must be at least 1, got 0"),
    "too many routes": ("topk", lambda _: 7, r"topk must be 1 to 6 \(the number of regions\), got 7"),
    "half a route": ("topk", lambda _: 1.5, "topk must be whole, got 1.5"),
}


@given(name=st.sampled_from(sorted(WRONG)), backend=st.sampled_from([None, "reference", "pooled", "triton"]))
@settings(max_examples=50)
def test_wrong_arguments_end_in_one_sentence_on_every_backend(name, backend):
    changed, change, sentence = WRONG[name]
    q, k = torch.randn(2, 2, 6, 4, 4).unbind()
    arguments = dict(q=q, k=k, regions=(3, 2), topk=2)
    region_routes(**arguments, backend=backend)
    with pytest.raises((ValueError, TypeError), match=f"^region_routes: [^\n]*{sentence}[^\n]*$"):
        region_routes(**arguments | {changed: change(arguments[changed])}, backend=backend)
    if changed in ("q", "regions"):
        given = dict(x=q, regions=(3, 2)) | ({"regions": change(None)} if changed == "regions" else {"x": change(q)})
        with pytest.raises((ValueError, TypeError), match=f"^region_means: [^\n]*{sentence.replace('q must', 'x must')}[^\n]*$"):
            region_means(**given, backend=backend)
