"""Multiple-instance heads: the authors' numbers and names, several bags at once, masking."""
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.errors import InputError
from zoo.layers import MultipleInstanceHead

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = ("gated", "multi_head")


def of_vector(case, **args):
    vector = load_file(GOLDEN / "acmil" / f"{case}.safetensors")
    head = MultipleInstanceHead(10, 2, 16, **{"num_branches": 3, "attention_dim": 6, **args})
    head.load_state_dict({name.removeprefix("state/"): value for name, value in vector.items() if name.startswith("state/")})
    return head, vector


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


@pytest.mark.parametrize("case", ["abmil", "gated", "gated_masked", "multi_head"])
def test_those_of_the_authors(case, monkeypatch):
    kind = "multi_head" if case == "multi_head" else "gated"
    head, vector = of_vector(case, kind=kind, num_branches=1 if case == "abmil" else 3, masked=6)
    x = vector["input"].requires_grad_()
    if case == "gated_masked":
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: vector["random"])
    out = head.train(case == "gated_masked")(x[0])
    outputs = {"output": out.logits, "bag_logits": out.logits, "branch_logits": out.branch_logits[0],
               "attention": out.attention[None] if case == "gated_masked" else out.scores[None] if case == "gated" else out.scores}
    given = {name.removeprefix("cotangent/"): value for name, value in vector.items() if name.startswith("cotangent/")}
    for name in given:
        close(outputs[name], vector[name])
    torch.autograd.backward([outputs[name] for name in given], list(given.values()))
    gradients = {name.removeprefix("grad/state/"): value for name, value in vector.items() if name.startswith("grad/state/")}
    names = MultipleInstanceHead(10, 2, 16, kind=head.kind, num_branches=head.num_branches, attention_dim=6)
    names.load_state_dict({name: gradients[name] if name in gradients else torch.zeros_like(value) for name, value in
                           ((name.removeprefix("state/"), value) for name, value in vector.items() if name.startswith("state/"))})
    for (name, parameter), expected in zip(head.named_parameters(), names.parameters(), strict=True):
        assert parameter.grad is not None and (parameter.grad - expected).abs().max() <= 1e-4 * (1 + expected.abs().max()), name
    assert (x.grad - vector["grad/input"]).abs().max() <= 1e-4


@pytest.mark.parametrize("path", sorted((GOLDEN / "manifests").glob("acmil_*.json")), ids=lambda path: path.stem)
def test_manifests(path):
    manifest = json.loads(path.read_text())
    shapes = manifest["state"]
    hidden, features = shapes["dimreduction.fc1.weight"]
    head = MultipleInstanceHead(features, 2, hidden, kind="multi_head" if "q" in shapes else "gated", device="meta")
    head.load_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, assign=True)
    assert sum(p.numel() for p in head.parameters()) == manifest["params"]


def test_loss_of_the_authors():
    head, vector = of_vector("loss")
    terms = zoo.MultipleInstanceLoss()(head.eval()(vector["input"][0]), vector["label"])
    names = dict(bag="bag_loss", branch="branch_loss", diversity="diversity_loss")
    for name, value in terms.items():
        close(value, vector[names[name]])
    sum(terms.values()).backward()
    close(sum(terms.values()), vector["loss"])
    assert all(parameter.grad is not None for parameter in head.parameters())


def bags(*sizes, features=12):
    return [torch.randn(size, features, generator=torch.Generator().manual_seed(size)) for size in sizes]


def build(kind, **args):
    torch.manual_seed(0)
    head = MultipleInstanceHead(12, 3, 16, kind=kind, num_branches=args.pop("num_branches", 3), **args)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return head.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_several_bags_are_bags_one_by_one(kind):
    head, given = build(kind), bags(7, 1, 4)
    together = head(given)
    in_a_row = head(torch.cat(given), torch.tensor([0, 7, 8]))
    for a, b in zip(together[:4], in_a_row[:4], strict=True):
        torch.testing.assert_close(a, b)
    for i, (bag, weights) in enumerate(zip(given, together.attention.split([7, 1, 4], -1), strict=True)):
        alone = head(bag)
        torch.testing.assert_close(alone.logits, together.logits[i:i + 1])
        torch.testing.assert_close(alone.branch_logits, together.branch_logits[i:i + 1])
        torch.testing.assert_close(alone.attention, weights)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(head(given[0][order]).logits, together.logits[:1])  # a bag has no order
    loss = zoo.MultipleInstanceLoss()
    labels = torch.tensor([0, 2, 1])
    alone = [loss(head(bag), label[None]) for bag, label in zip(given, labels, strict=True)]
    for name, value in loss(together, labels).items():
        torch.testing.assert_close(value, torch.stack([terms[name] for terms in alone]).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_masking_takes_a_share_of_the_largest_in_training_alone(kind):
    head = build(kind, masked=4, mask_drop=0.5, dropout=0.0).train()
    given = bags(30, 20)
    out = head(given)
    for weights, scores in zip(out.attention.split(out.sizes, -1), out.scores.split(out.sizes, -1), strict=True):
        gone = weights == 0
        assert (gone.sum(-1) == 2).all() and torch.equal(gone & scores.ge(scores.topk(4, -1).values[..., -1:]), gone)
    assert (head.eval()(given).attention > 0).all()
    with pytest.warns(UserWarning, match="masks 5 of the 9 instances of a bag in training"):
        build(kind).train()(bags(9))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_exported_captured_and_in_other_dtypes(kind, tmp_path):
    head, (bag,) = build(kind), bags(9)
    expected = head(bag)
    with zoo.capture(head) as maps:
        head(bag)
    assert torch.equal(maps[""]["attention"], expected.attention)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 14):
        torch.testing.assert_close(compiled(bags(n)[0]).logits, head(bags(n)[0]).logits)
    assert build(kind).to(torch.bfloat16)(bag.bfloat16()).logits.dtype == torch.bfloat16
    other = MultipleInstanceHead(12, 3, 16, kind=kind, num_branches=3).eval()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(bag).logits, expected.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_in_onnx_runtime_with_bags_of_any_size(kind, tmp_path):
    class Answer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = build(kind)

        def forward(self, bag):
            out = self.head(bag)
            return out.logits, out.attention

    model = Answer().eval()
    torch.onnx.export(model, (bags(9)[0],), tmp_path / "head.onnx", dynamo=True, verbose=False, input_names=["bag"],
                      dynamic_shapes=({0: torch.export.Dim("instances", min=2, max=10000)},))
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx")
    for bag in bags(9, 33):
        for found, expected in zip(session.run(None, {"bag": bag.numpy()}), model(bag), strict=True):
            np.testing.assert_allclose(found, expected.detach(), atol=1e-5, rtol=1e-4)


def test_bad_input_is_named():
    head = build("gated")
    for arguments, message in [
        ((torch.zeros(3, 5),), r"features must be \(N, 12\), or a list of such, got shape \(3, 5\)"), (([],), "at least one bag, got none"),
        ((bags(3) + [torch.zeros(0, 12)],), r"every bag must hold an instance, got bags of \[3, 0\]"),
        ((bags(3)[0], torch.tensor([1])), "offsets must be"), ((bags(3)[0], torch.tensor([0, 2, 1])), r"got bags of \[2, -1, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            head(*arguments)
    for arguments, message in [(dict(kind="gate"), "kind must be one of gated, multi_head, got 'gate'"),
                               (dict(mask_drop=1), r"mask_drop in \[0, 1\), got 10 and 1"),
                               (dict(kind="multi_head", num_heads=4), r"num_heads must divide hidden \(6\), got 4"),
                               (dict(num_branches=0), "num_branches must be at least 1, got 0")]:
        with pytest.raises(ValueError, match=message):
            MultipleInstanceHead(12, 2, **arguments)
    with pytest.raises(InputError, match=r"labels must be \(1,\), one of every bag, got shape \(2,\)"):
        zoo.MultipleInstanceLoss()(head(bags(3)[0]), torch.tensor([0, 1]))
