"""A teacher's attention as a loss, and other numbers of heads: by the authors' numbers, and by attention that is spelled out."""
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zoo
from zoo.changes import change
from zoo.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "unip"
SMALL = dict(img_size=32, patch_size=8, depth=3, num_classes=0)


def vit(dim: int = 24, heads: int = 2, name: str = "vit_tiny_patch16_224", **args) -> nn.Module:
    """With attention that is far from uniform."""
    model = timm.create_model(name, **{**SMALL, "embed_dim": dim, "num_heads": heads, **args})
    for path, parameter in model.named_parameters():
        if "qkv.weight" in path:
            parameter.data.mul_(20)
    return model.eval()


def images(batch: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(batch, 3, *size)


def read(case: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def logits_of(block: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    taken = []
    handle = block.attn.register_forward_pre_hook(lambda layer, inputs: taken.append(inputs[0]))
    model(x)
    handle.remove()
    q, k, _ = block.attn.qkv(taken[0]).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q @ k.mT / q.shape[-1] ** 0.5


def test_the_authors_loss_and_gradients():
    tensors, config = read("distillation")
    last_heads, block = config["student"].pop("last_heads"), config["teacher"].pop("intermediate") - 1
    config["student"].pop("drop_path")
    student, teacher = (VisionTransformer(**config[name], num_classes=0, norm_layer=nn.LayerNorm).eval() for name in ("student", "teacher"))
    for name, model in (("student", student), ("teacher", teacher)):
        model.load_state_dict(part_of(tensors, f"state/{name}."))
    student.pos_embed.requires_grad_(False)  # sines and cosines
    zoo.regroup_heads(student, {"blocks.1.attn": last_heads})
    torch.testing.assert_close(logits_of(teacher.blocks[block], teacher, tensors["input"]), tensors["teacher"], rtol=1e-5, atol=1e-5)
    x = tensors["input"].requires_grad_()
    loss = zoo.TeacherAttentionLoss(teacher, block)(student, x)
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=1e-5)
    loss.backward(tensors["cotangent/loss"])
    torch.testing.assert_close(x.grad, tensors["grad/input"], rtol=1e-4, atol=1e-5)
    expected = part_of(tensors, "grad/state/student.")
    for name, parameter in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert parameter.grad is None or not parameter.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_released_networks_are_timms(size):
    manifest = json.loads((GOLDEN.parent / "manifests" / f"unip_{size}.json").read_text())
    with torch.device("meta"):
        model = zoo.regroup_heads(timm.create_model(f"vit_{size}_patch16_224", num_classes=0), {"blocks.11.attn": 16})
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest["state"]
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["params"]


class Fixed(nn.Module):
    """Attention whose logits are given."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.eye(self.logits.shape[-1]).expand_as(self.logits)
        return F.scaled_dot_product_attention(self.logits, ones, ones, scale=1.0)


def test_the_authors_divergence():
    tensors, _ = read("loss_kl")
    student = tensors["student"].requires_grad_()
    loss = zoo.TeacherAttentionLoss(Fixed(tensors["teacher"]), 0)(Fixed(student), torch.zeros(2, 3, 8, 8))
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-5, atol=1e-5)
    loss.backward(tensors["cotangent/loss"])
    torch.testing.assert_close(student.grad, tensors["grad/student"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("args", [
    {}, dict(reg_tokens=2), dict(class_token=False, global_pool="avg"), dict(name="vit_small_patch16_rope_224", embed_dim=24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_every_kind(args, dtype):
    teacher, student = vit(48, 2, **args).to(dtype), vit(24, 2, **args).to(dtype)
    if "name" in args:
        teacher = student  # of the same width
    loss = zoo.TeacherAttentionLoss(teacher, 1)(student, images(1).to(dtype))
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert student.patch_embed.proj.weight.grad.isfinite().all() and student.patch_embed.proj.weight.grad.any()
    with torch.no_grad():
        same = zoo.TeacherAttentionLoss(student, -1)(student, images(1).to(dtype))
    assert abs(same) < 1e-6


@pytest.mark.parametrize("network_block", [-1, 0])
def test_the_formula_and_blocks(network_block):
    teacher, student, x = vit(48, 2, depth=2).double(), vit().double(), images().double()
    p, s = (model_logits.softmax(-1) for model_logits in (logits_of(teacher.blocks[1], teacher, x),
                                                          logits_of(student.blocks[network_block], student, x)))
    expected = (p * (p.log() - s.log())).sum(-1).mean()
    torch.testing.assert_close(zoo.TeacherAttentionLoss(teacher, -1, network_block)(student, x), expected)


def test_spelled_out_attention_and_checkpointing_change_nothing():
    teacher, student, x = vit(48), vit(), images()
    imitation = zoo.TeacherAttentionLoss(teacher, 2)
    expected = imitation(student, x)
    expected.backward()
    gradient = student.patch_embed.proj.weight.grad.clone()
    for block in student.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(imitation(student, x), expected)
    for block in student.blocks:
        block.attn.fused_attn = True
    student.zero_grad()
    student.train().set_grad_checkpointing()
    imitation(student, x).backward()
    torch.testing.assert_close(student.patch_embed.proj.weight.grad, gradient)


def test_a_network_learns_where_its_teacher_looks():
    torch.manual_seed(0)
    teacher, student, x = vit(48, 4), zoo.regroup_heads(vit(24, 2), {"blocks.2.attn": 4}), images(4)
    imitation, optimizer = zoo.TeacherAttentionLoss(teacher, 1), torch.optim.AdamW(student.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(imitation(student, x))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert not list(imitation.parameters()) and not imitation.state_dict()


@pytest.mark.parametrize(("teacher", "arguments", "student", "said"), [
    (lambda: vit(48, 4), (0,), vit, "has 2 heads, and block 0 of the teacher 4; zoo.regroup_heads gives it as many"),
    (lambda: vit(48), (3,), vit, "block must be from -3 to 2 for VisionTransformer, got 3"),
    (lambda: vit(48), (0, 5), vit, "network_block must be from -3 to 2"),
    (lambda: vit(48, patch_size=16), (0,), vit, "sees images as 17 tokens, and the teacher as 5"),
    (lambda: timm.create_model("test_resnet"), (0,), vit, "ResNet has no layer in which all tokens of an image attend to one another"),
    (lambda: vit(name="beit_base_patch16_224"), (0,), vit, "adds a bias or a mask"),
])
def test_what_does_not_fit_is_refused(teacher, arguments, student, said):
    with pytest.raises(InputError, match=said):
        zoo.TeacherAttentionLoss(teacher(), *arguments)(student(), images())


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_regrouped_heads_are_those_of_a_network_built_so(heads):
    model, built, x = vit(24, 2), vit(24, heads), images(2)
    built.load_state_dict(model.state_dict())
    before = model(x)
    change(model, [{"type": "regroup_heads", "heads": {f"blocks.{i}.attn": heads for i in range(3)}}])
    torch.testing.assert_close(model(x), built(x))
    assert not torch.allclose(model(x), before, atol=1e-4)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), built(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("args", "heads", "said"), [
    ({}, {"blocks.0.attn": 5}, "blocks.0.attn has 24 channels, which 5 heads do not divide"),
    ({}, {"blocks.0.attn": 3, "blocks.1.attn": 0}, "which 0 heads do not divide"),
    ({}, {"blocks.7.attn": 3}, "the model has no layer 'blocks.7.attn' of timm's Attention; did you mean"),
    (dict(qk_norm=True), {"blocks.0.attn": 3}, "blocks.0.attn has norms of its heads' queries and keys, which are for 12 channels"),
])
def test_what_cannot_be_regrouped_is_refused_and_left(args, heads, said):
    model = vit(**args)
    with pytest.raises(InputError, match=said):
        zoo.regroup_heads(model, heads)
    assert [block.attn.num_heads for block in model.blocks] == [2, 2, 2]
