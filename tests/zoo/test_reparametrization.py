"""σReparam on given models; the authors' numbers are in tests/models/test_conformance.py."""
import copy
import io

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.errors import InputError
from zoo.reparametrization import SigmaReparametrization


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, mlp_ratio=2)


def step(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A pass whose gradients move all weights."""
    y = layer(x)
    y.square().sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.sub_(0.05 * parameter.grad)
    layer.zero_grad()
    return y


@pytest.mark.parametrize("build", [
    small_vit, lambda: timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3),
    lambda: timm.create_model("resnet18", num_classes=3), lambda: timm.create_model("biformer_nano"),
    lambda: timm.create_model("tap_fan_nano"),
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 12, 3, groups=12)),
], ids=["vit", "beit", "resnet", "biformer", "fan", "grouped"])
def test_outputs_stay_and_folding_gives_plain_layers_with_them(build):
    model = build()
    for parameter in model.parameters():  # of those that start at 0, too
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, 3, *getattr(getattr(model, "patch_embed", None), "img_size", (48, 48)))
    names, before = set(model.state_dict()), model.eval()(x)
    assert zoo.reparametrize(model) is model
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    step(model.train(), x)
    trained = model.eval()(x)
    assert not torch.allclose(trained, before, atol=1e-4)
    zoo.fold(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) == names
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_number_of_a_layer_is_the_spectral_norm_of_the_whole_convolution(groups):
    torch.manual_seed(0)
    layer = zoo.reparametrize(nn.Conv2d(6, 12, 3, groups=groups))
    x = torch.randn(2, 6, 8, 8)
    for _ in range(3):
        step(layer, x)
    with torch.no_grad():
        for _ in range(300):
            layer(x)
    whole = torch.block_diag(*layer.weight.detach().reshape(groups, 12 // groups, -1))
    sigma = layer.parametrizations.weight[0].sigma
    torch.testing.assert_close(torch.linalg.matrix_norm(whole, 2), sigma.detach().abs()[0], rtol=1e-5, atol=0)


def test_evaluation_changes_nothing_and_training_takes_a_step_of_the_power_iteration():
    layer = zoo.reparametrize(nn.Linear(7, 5))
    nn.init.normal_(layer.parametrizations.weight.original)
    x, u = torch.randn(2, 7), layer.parametrizations.weight[0].u.clone()
    torch.testing.assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)
    assert torch.equal(layer.parametrizations.weight[0].u, u)
    with parametrize.cached():
        layer.train()(x)
        layer(x)
    after = layer.parametrizations.weight[0].u
    matrix = layer.parametrizations.weight.original.detach()
    torch.testing.assert_close(after[0], nn.functional.normalize(matrix.T @ (matrix @ u[0]), dim=0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_and_vectors(reentrant):
    plain = zoo.reparametrize(small_vit())
    for name, parameter in plain.named_parameters():
        if name.endswith("original"):
            nn.init.normal_(parameter, std=0.1)  # far from u
    checkpointed, x = copy.deepcopy(plain), torch.randn(2, 3, 16, 16, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(checkpointed, x, use_reentrant=reentrant).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(a, b)


def test_under_autocast_the_norm_is_in_float32():
    layer = zoo.reparametrize(nn.Linear(64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
    torch.testing.assert_close(weight, layer.parametrizations.weight.original, rtol=1e-6, atol=1e-7)
    assert weight.dtype == torch.float32


def test_bfloat16_weights_keep_their_dtype():
    layer = zoo.reparametrize(nn.Linear(8, 8, dtype=torch.bfloat16))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiles_without_graph_breaks_in_training():
    model, x = zoo.reparametrize(small_vit()), torch.randn(2, 3, 16, 16)
    for name, parameter in model.named_parameters():
        if name.endswith("original"):
            nn.init.normal_(parameter, std=0.1)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        model(x).sum().backward()
        compiled(x).sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_state_is_saved_and_loaded():
    trained, x = zoo.reparametrize(small_vit()), torch.randn(2, 3, 16, 16)
    step(trained, x)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = zoo.reparametrize(small_vit())
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.eval()(x), trained.eval()(x))


def test_folded_models_are_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'zoo-attention[export]'")
    model, x = zoo.reparametrize(small_vit(), keep_norms=False), torch.randn(1, 3, 16, 16)
    step(model, x)
    zoo.fold(model.eval())
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def _train_in_parallel(rank: int, store: str, seen: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # weights and vectors differ until DDP broadcasts the first process's
    layer = zoo.reparametrize(nn.Linear(6, 4))
    model = DistributedDataParallel(layer)
    for _ in range(3):
        step(model, torch.randn(5, 6))
    seen[rank] = {name: value.clone() for name, value in layer.state_dict().items()}
    dist.destroy_process_group()


def test_processes_have_the_same_vectors(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        seen = manager.dict()
        torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path / "store"), seen), nprocs=2)
        first, second = dict(seen)[0], dict(seen)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_where_and_norms_choose_what_changes():
    model = zoo.reparametrize(small_vit(), where=["blocks.*.attn", "patch_embed"], keep_norms=False)
    changed = {name for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    assert changed == {"patch_embed.proj", *(f"blocks.{i}.attn.{layer}" for i in range(2) for layer in ("qkv", "proj"))}
    assert isinstance(model.blocks[0].norm1, nn.LayerNorm)  # not within where
    bare = zoo.reparametrize(small_vit(), keep_norms=False)
    assert not any(isinstance(module, nn.LayerNorm) for module in bare.modules())


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _zero(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[1].weight, value)
    return model


@pytest.mark.parametrize(("model", "options", "said"), [
    (nn.Sequential(nn.ReLU()), {}, "Sequential has no linear layer or 2-D convolution to reparametrize"),
    (small_vit(), {"where": "blok.0"}, "the model has no module 'blok.0'; did you mean"),
    (small_vit(), {"where": "norm"}, "has no linear layer or 2-D convolution to reparametrize in 'norm'"),
    (_tied(), {}, "0.weight and 1.weight are one parameter"),
    (_zero(0.0), {}, "the weights of 1 are all 0"),
    (_zero(float("nan")), {}, "the weights of 1 are not finite"),
    (nn.Linear(3, 3, device="meta"), {}, "the weights of Linear are on the meta device"),
    (zoo.reparametrize(nn.Linear(3, 3)), {}, "has a parametrization already"),
])
def test_what_cannot_be_reparametrized_is_refused_and_left(model, options, said):
    before = list(model.state_dict())
    with pytest.raises(InputError, match=said):
        zoo.reparametrize(model, **options)
    assert list(model.state_dict()) == before


def test_only_reparametrized_layers_are_folded():
    with pytest.raises(InputError, match="has no layer that zoo.reparametrize has reparametrized"):
        zoo.fold(small_vit())
    layer = zoo.reparametrize(nn.Linear(3, 3))
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(InputError, match="have further parametrizations"):
        zoo.fold(layer)
    assert isinstance(layer.parametrizations.weight[0], SigmaReparametrization)
