import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.errors import InputError
from zoo.layers import AggregatedAttention, LengthScaledAttention, MixtureOfHeads

HEADS = {"mixed": (6, 2, 2), "one shared": (4, 1, 2), "none shared": (4, 0, 3), "all shared": (3, 3, 0),
         "one active": (5, 2, 1), "one head": (1, 1, 0)}


def made(heads: str) -> MixtureOfHeads:
    torch.manual_seed(0)
    router = MixtureOfHeads(8, *HEADS[heads]).double()
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.5)
    return router


def tokens(*shape):
    return torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def oracle(router: MixtureOfHeads, x: torch.Tensor) -> torch.Tensor:
    """The formula, of one token."""
    shared, active, count = router.shared_heads, router.active_heads, router.num_heads
    gates = [x.new_ones(())] if shared == 1 else list(shared * (router.shared.weight @ x).softmax(0)) if shared else []
    if count > shared:
        p = (router.routed.weight @ x).softmax(0)
        picked = sorted(range(len(p)), key=lambda e: -p[e].item())[:active]
        total = sum(p[e] for e in picked)
        routed = [active * p[e] / total if e in picked else x.new_zeros(()) for e in range(len(p))]
        if shared:
            alpha = 2 * (router.kinds.weight @ x).softmax(0)
            gates, routed = [alpha[0] * gate for gate in gates], [alpha[1] * gate for gate in routed]
        gates = [*gates, *routed]
    return torch.stack(gates)


@pytest.mark.parametrize("heads", HEADS)
def test_gates_are_the_formula(heads):
    router, x = made(heads), tokens(2, 3, 5)
    expected = torch.stack([oracle(router, token) for token in x.flatten(0, 2)]).unflatten(0, x.shape[:-1])
    torch.testing.assert_close(router(x), expected)
    assert ((router(x) > 0).sum(-1) == sum(HEADS[heads][1:])).all()
    parameters = list(router.parameters())
    if parameters:
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), parameters) for y in (router(x), expected)))


def test_balance_is_least_where_all_heads_are_picked_alike_and_largest_where_all_tokens_pick_the_same():
    router = MixtureOfHeads(8, 5, 1, 2)
    alike = torch.eye(4)[torch.arange(4)] + torch.eye(4)[(torch.arange(4) + 1) % 4]
    torch.testing.assert_close(router.balance(100 * alike), torch.tensor(2.0))
    torch.testing.assert_close(router.balance(100 * alike[:1].expand(4, 4)), torch.tensor(4.0))


def test_new_gates_of_shared_heads_are_one():
    gates = MixtureOfHeads(8, 6, 3, 2)(torch.randn(4, 8))
    assert torch.equal(gates[:, :3], torch.ones(4, 3))
    torch.testing.assert_close(gates.sum(-1), torch.full((4,), 5.0))


@pytest.mark.parametrize("numbers, message", [
    ((4, 5, 0), r"shared_heads must be 0 to num_heads \(4\), got 5"),
    ((4, 2, 0), "active_heads must be 1 to 2, the heads that are not shared, got 0"),
    ((4, 2, 3), "active_heads must be 1 to 2"), ((4, 4, 1), "active_heads must be 0, as all heads are shared, got 1"),
])
def test_wrong_numbers_of_heads_are_told(numbers, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfHeads(8, *numbers)


def small(**args):
    torch.manual_seed(0)
    return timm.create_model("moh_transnext_nano", depths=(1, 1, 2, 1), num_classes=3, **args)


def test_the_loss_is_the_mean_over_layers_that_route_and_leaves_nothing():
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    with zoo.capture(model) as maps:
        expected = model(x)
    out, balance = zoo.LoadBalancingLoss()(model, x)
    assert torch.equal(out, expected) and all(getattr(module, "take_scores", None) is None for module in model.modules())
    found = []
    for name, router in model.named_modules():
        if isinstance(router, MixtureOfHeads) and router.routed is not None:
            share = (maps[name]["gates"][..., router.shared_heads:] > 0).float().mean((0, 1, 2))
            assert share.sum() == pytest.approx(router.active_heads)
            found.append(router)
    assert len(found) == 4
    balance.backward()
    assert all(router.routed.weight.grad.any() for router in found) and model.head.fc.weight.grad is None
    with pytest.raises(InputError, match=r"VisionTransformer has no layer whose tokens pick heads, .* zoo.replace_attention\("):
        zoo.LoadBalancingLoss()(timm.create_model("test_vit"), x)


def test_checkpointing_and_compiling_change_no_loss_and_no_gradient():
    x, results = torch.randn(2, 3, 64, 64), []
    loss = zoo.LoadBalancingLoss()
    for way in ("plain", "checkpointed", "compiled"):
        model = small()
        model.set_grad_checkpointing(way == "checkpointed")
        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if way == "compiled" else loss
        out, balance = run(model, x)
        (out.square().sum() + balance).backward()
        results.append([out, balance, *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [AggregatedAttention, LengthScaledAttention])
def test_heads_that_are_not_picked_do_not_count(kind):
    """Whatever they put out: the columns of the projection that take them get no gradient from those tokens."""
    layer, x = kind(8, 4, shared_heads=1, active_heads=2), torch.randn(1, 1, 1, 8)
    with zoo.capture(layer) as maps:
        layer(x).sum().backward()
    picked = maps["router"]["gates"].flatten() > 0
    assert torch.equal(layer.proj.weight.grad.unflatten(1, (4, 2)).abs().sum((0, 2)) > 0, picked)


def test_a_vision_transformer_keeps_its_outputs_where_all_heads_are_active_at_equal_scores():
    model, x = timm.create_model("test_vit", num_classes=3).eval(), torch.randn(2, 3, 160, 160)
    before, heads = model(x), model.blocks[0].attn.num_heads
    zoo.replace_attention(model, "moh", shared_heads=1, active_heads=heads - 1)
    for module in model.modules():
        if isinstance(module, MixtureOfHeads):
            nn.init.zeros_(module.routed.weight)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"no attention for blocks.0.attn can be made: active_heads must be 1 to"):
        zoo.replace_attention(model, "moh", shared_heads=1, active_heads=99)
