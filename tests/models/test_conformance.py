"""The authors' own numbers: every vector of `tests/golden`, or of the folder in the environment variable GOLDEN_DIR.

A case loads the reference's state through our checkpoint conversion and must give its outputs and gradients. See
`tests/golden/README.md` for the format and the bounds.
"""
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import Attention, AttentionRope, RmsNorm
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.xcit import ClassAttentionBlock
from torch import Tensor, nn

import zoo
from zoo import part_losses
from zoo.fixations import correlation, divergence, scanpath, similarity
from zoo.kernels import attention_cross_entropy, attention_similarity, entmax, pyramid_sparse_attention, selective_scan
from zoo.layers import (
    AggregatedAttention,
    ATConv,
    AttentionGate,
    AttentionInAttention,
    BiLevelRoutingAttention,
    ChannelProcessing,
    ChannelSpatialAttention,
    DeformableTokenMerging,
    DualAttention,
    EfficientProbing,
    HedgehogAttention,
    HiLoAttention,
    LayerAttention,
    LengthScaledAttention,
    PartDiscovery,
    PolarizedSelfAttention,
    RelationalAttention,
    SelectiveScan2d,
    SelfAttention,
    SimPool,
    SparsifinerAttention,
    SymbolicAttention,
    TokenAwareAvgPool,
    TokenMixing,
    bilateral_voting,
    connectivity_target,
)
from zoo.layers._capture import report
from zoo.layers.part_discovery import Parts
from zoo.measuring.fixations import auc_judd
from zoo.models import (
    a2n,
    attnet,
    biformer,
    dconnnet,
    fan,
    han,
    ifam,
    lambda_deit,
    litv2,
    polarized,
    saliency_mamba,
    sknet,
    transnext,
    unet,
    vidat,
    vmamba,
)
from zoo.models.staged import named
from zoo.probe import head_for
from zoo.reparametrization import checkpoint_filter_fn as sigma_names

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
ELSEWHERE = ("inspyrenet", "msinet")  # of several inputs and outputs, or other axes, whose tests are their own
CASES = [case for case in json.loads((GOLDEN / "index.json").read_text()) if case["family"] not in ELSEWHERE]
OUTPUT_BOUND, GRADIENT_BOUND = 1e-5, 1e-4  # times 1 + the largest absolute number of the reference

KV_POOL = {"identity": "identity", "ada_avgpool": "adaptive_avg", "ada_maxpool": "adaptive_max", "avgpool": "avg", "maxpool": "max"}


class _ChannelsFirst(nn.Module):
    """A layer that takes NHWC behind an interface that takes NCHW, with the layer's own parameter names."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer
        self._modules, self._parameters, self._buffers = layer._modules, layer._parameters, layer._buffers

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Tokens(nn.Module):
    """A layer of maps behind an interface of tokens (B, N, C) of a map of one size, with the layer's own parameter names."""

    def __init__(self, layer: nn.Module, height: int, width: int, channels_first: bool):
        super().__init__()
        self.__dict__["layer"] = layer
        self._modules, self._parameters, self._buffers = layer._modules, layer._parameters, layer._buffers
        self.size, self.channels_first = (height, width), channels_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.size)
        if self.channels_first:
            return self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        return self.layer(x).flatten(1, 2)


def _attention_arguments(config: dict[str, Any]) -> dict[str, Any]:
    mode = config.get("kv_downsample_mode", "identity")
    size = config.get("kv_per_win", 4) if mode.startswith("ada") else config.get("kv_downsample_ratio", 4)
    return dict(
        regions=config.get("n_win", 7), qk_dim=config.get("qk_dim"), scale=config.get("qk_scale"), lepe_kernel=config.get("side_dwconv", 3),
        kv_pool=KV_POOL[mode], kv_pool_size=max(size, 1), soft_routing=config.get("soft_routing", False),
        differentiable_routing=config.get("diff_routing", False), learned_routing=config.get("param_routing", False),
        mask_padding=not config.get("auto_pad", False), out_proj=config.get("param_attention", "qkvo") == "qkvo",
    )


def _bra(config: dict[str, Any], reference: str) -> nn.Module:
    layer = BiLevelRoutingAttention(config["dim"], config.get("num_heads", 8), topk=config.get("topk", 4), **_attention_arguments(config))
    return _ChannelsFirst(layer) if "NCHW" in reference else layer


def _biformer(config: dict[str, Any], reference: str) -> nn.Module:
    stl = "BiFormerSTL" in reference
    attn_args = []
    per_stage = {"qk_dims": "qk_dim", "n_wins": "n_win", "kv_per_wins": "kv_per_win", "kv_downsample_ratios": "kv_downsample_ratio"}
    for i, dim in enumerate(config["embed_dim"]):
        at = config | {one: config[many][i] for many, one in per_stage.items() if many in config}
        attn_args.append(dict(_attention_arguments(at), num_heads=(at.get("qk_dim") or dim) // config["head_dim"]))
    return biformer.BiFormer(
        num_classes=config["num_classes"], dims=config["embed_dim"], depths=config["depth"], mlp_ratio=config["mlp_ratios"],
        topks=[None if topk == -2 else topk for topk in config["topks"]], swin_layout=stl, lepe_of_values="nchw" in reference,
        attn_args=attn_args,
    )


def _polarized(config: dict[str, Any], reference: str) -> nn.Module:
    return PolarizedSelfAttention(config["planes"], "parallel" if reference.endswith("PSA_p") else "sequential")


def _sk(config: dict[str, Any], reference: str) -> nn.Module:
    unit_args = dict(kernel_sizes=(3, 3), groups=(1, 32), min_width=1)
    return sknet.SKBottleneck(config["inplanes"], config["planes"], config["stride"], unit_args=unit_args)


def _atconv(config: dict[str, Any], reference: str) -> nn.Module:
    return ATConv(**config)


def _attnet(config: dict[str, Any], reference: str) -> nn.Module:
    assert all(config["glu_dconv"]) and len(set(config["glu_norm"])) == 1
    return attnet.AttNet(
        num_classes=config["num_classes"], dims=config["dims"], depths=config["depths"], mlp_ratios=config["exp_rates"],
        kernel_sizes=config["kernel_sizes"], mlp_norm=config["glu_norm"][0], layer_scale=config["use_layer_scale"],
    )


def _attention_gate(config: dict[str, Any], reference: str) -> nn.Module:
    normalization = "softmax" if config["mode"] == "concatenation_residual" else "sigmoid"
    dims = config["in_channels"], config["gating_channels"], config["inter_channels"]
    return AttentionGate(*dims, spatial_dims=len(config["sub_sample_factor"]), normalization=normalization)


def _attention_unet(config: dict[str, Any], reference: str) -> nn.Module:
    widths = [width // config["feature_scale"] for width in (64, 128, 256, 512, 1024)]
    return unet.UNet(config["in_channels"], config["n_classes"], widths, num_gates=2, deep_supervision=True, spatial_dims=3)


def _hilo(config: dict[str, Any], reference: str) -> nn.Module:
    if "DTM" in reference:
        return _Tokens(DeformableTokenMerging(config["dim"]), *config["input_resolution"], channels_first=True)
    height, width = map(int, re.search(r"H=(\d+), W=(\d+)", reference).groups())
    layer = HiLoAttention(config["dim"], config["num_heads"], config["window_size"], config["alpha"], config["qkv_bias"])
    return _Tokens(layer, height, width, channels_first=False)


def _litv2(config: dict[str, Any], reference: str) -> nn.Module:
    width = config["embed_dim"]
    return litv2.LITv2(
        num_classes=config["num_classes"], dims=[width * 2**i for i in range(4)], depths=config["depths"], num_heads=config["num_heads"],
        windows=[window or None for window in config["local_ws"]], alpha=config["alpha"],
    )


class _SquareTokens(nn.Sequential):
    """A layer that takes NHWC behind an interface that takes (B, N, C), of square maps."""

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        return super().forward(x.unflatten(1, (side, side))).flatten(1, 2)


class _Diversification(nn.Module):
    """The attention diversification loss of given logits: queries are their rows, keys the unit vectors."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, *logits: Tensor) -> Tensor:
        layers = [attention_similarity(x, torch.eye(x.shape[-1]).expand_as(x), self.threshold, scale=1.0) for x in logits]
        return torch.stack(layers).mean()


def _tap(config: dict[str, Any], reference: str) -> nn.Module:
    return _ChannelsFirst(named(pool=TokenAwareAvgPool(**config)))


def _fan(config: dict[str, Any], reference: str) -> nn.Module:
    if "TokenMixing" in reference:
        return _SquareTokens(OrderedDict(layer=TokenMixing(config["dim"], config["num_heads"])))
    if "ChannelProcessing" in reference:
        return _SquareTokens(OrderedDict(layer=ChannelProcessing(config["dim"], config["num_heads"], config["mlp_hidden_dim"])))
    if "ClassAttentionBlock" in reference:  # timm's, used as it is
        return ClassAttentionBlock(**config)
    backbone = config.get("backbone")
    hybrid = dict(hybrid_dims=tuple(backbone["dims"][:2]), hybrid_depths=tuple(backbone["depths"])) if backbone else {}
    return fan.Fan(num_classes=config["num_classes"], embed_dim=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"],
                   num_scales=config["num_scales"], **hybrid)


def _convert_fan(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, ClassAttentionBlock):
        return state
    converted = fan.checkpoint_filter_fn(state, model)
    return {f"layer.{name}": value for name, value in converted.items()} if isinstance(model, _SquareTokens) else converted


def _adl(config: dict[str, Any], reference: str) -> nn.Module:
    return _Diversification(config["threshold"])


class _Entmax(nn.Module):
    """The operator, with alpha as a parameter where it is learned."""

    def __init__(self, alpha: float | str):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, 3, 1, 1)) if isinstance(alpha, str) else alpha

    def forward(self, logits: Tensor) -> Tensor:
        p = entmax(logits, self.alpha)
        report(self, attention=p)
        return p


def _entmax(config: dict[str, Any], reference: str) -> nn.Module:
    return _Entmax(config["alpha"])


def _cog(config: dict[str, Any], reference: str) -> nn.Module:
    return SelfAttention(config["dim"], config["num_heads"], "cog", qkv_bias=config["qkv_bias"])


def _rela(config: dict[str, Any], reference: str) -> nn.Module:
    return SelfAttention(config["dim"], config["num_heads"], "rela", qkv_bias=True)


def _convert_rela(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    names = {"qkv_map": "qkv", "o_map": "proj", "post_scale": "mechanism.scale", "post_gate": "mechanism.gate"}
    kinds = {"_W": ".weight", "_b": ".bias"}
    return {names.get(name) or names[name[:-2]] + kinds[name[-2:]]: value.mT if name.endswith("_W") else value
            for name, value in state.items()}


def _gated_attention(config: dict[str, Any], reference: str) -> nn.Module:
    """timm's attention, around which the mechanism is put: with its own elementwise gate, or the headwise one."""
    biased, elementwise = config["qkv_bias"], config["elementwise_attn_output_gate"]
    attention = AttentionRope(
        config["hidden_size"], config["num_attention_heads"], qkv_fused=False, attn_head_dim=config["head_dim"], qkv_bias=biased,
        proj_bias=biased, qk_norm=config["use_qk_norm"], norm_layer=partial(RmsNorm, eps=config["rms_norm_eps"]), gated=elementwise,
        num_kv_heads=config["num_key_value_heads"])
    return zoo.replace_attention(nn.Sequential(attention), "softmax", gate=None if elementwise else "head")


def _convert_gated(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`q_proj` holds of every head of keys its queries' rows, and then their gates'."""
    attention, converted = model[0], {}
    groups, width = attention.num_kv_groups, attention.head_dim
    for name, value in state.items():
        if not name.startswith("q_proj"):
            converted[f"0.{name.replace('o_proj', 'proj')}"] = value
            continue
        rows = value.unflatten(0, (attention.num_kv_heads, -1))
        converted[f"0.{name}"] = rows[:, : groups * width].flatten(0, 1)
        converted[f"0.{name.replace('q_proj', 'gate')}"] = rows[:, groups * width :].flatten(0, 1)
    return converted


class _Hedgehog(HedgehogAttention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_q, of_k = self.features(q, k)
        loss = attention_cross_entropy(q.detach(), k.detach(), of_q, of_k)
        report(self, **{"features.q": of_q, "distillation_loss": loss})
        return super().forward(q, k, v)


def _hedgehog(config: dict[str, Any], reference: str) -> nn.Module:
    return _Hedgehog(config["num_heads"], config["head_dim"], config["feature_dim"], config["feature_map"],
                     skip=config["skip_connection"], both_signs=config["fullspace"])


def _convert_hedgehog(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".mlp.", "."): value for name, value in state.items()}


class _Sparsifiner(SelfAttention):
    def __init__(self, reconstruction: bool, dim: int, num_heads: int, **mechanism_args: Any):
        super().__init__(dim, num_heads, qkv_bias=True)
        self.reconstruction = reconstruction
        self.mechanism = SparsifinerAttention(num_heads, self.head_dim, **mechanism_args)

    def forward(self, x: Tensor) -> Tensor:
        with zoo.capture(self.mechanism) as maps:
            if self.reconstruction:
                q, k, v = self._heads(x)
                report(self, reconstruction_loss=self.mechanism.reconstruction_error(q, k))
                out = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            else:
                out = super().forward(x)
                report(self, attn_mask=maps[""]["mask"].float(), attention=maps[""]["attention"])
        report(self, basis_coef=maps[""]["coefficients"], approx_attn=maps[""]["approximation"])
        return out


class _SparsifinerModel(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        with zoo.capture(self) as maps:
            tokens = self.forward_features(x)
        report(self, features=tokens[:, 1:])
        for i in range(len(self.blocks)):
            report(self, **{f"attn_mask.{i}": maps[f"blocks.{i}.attn.mechanism"]["mask"].float()})
        return self.forward_head(tokens)


def _sparsifiner(config: dict[str, Any], reference: str) -> nn.Module:
    choice, factor = config["cfg"]["SPAR"], config["reduce_n_factor"]
    coefficients = choice["BASIS_COEF"]
    args = dict(
        threshold=None if choice["ATTN_SCORE"]["USE_TOPK"] else choice["ATTN_SCORE"]["THRESHOLD"],
        basis_threshold=choice["BASIS_THRESHOLD"], keep_coefficients=coefficients["TOPK"],
        coefficient_threshold=None if coefficients["USE_TOPK"] else coefficients["THRESHOLD"])
    if reference.endswith("Attention"):
        tokens = config["num_tokens"]
        return _Sparsifiner(config.get("training", False), config["dim"], config["num_heads"], grid_size=(1, tokens - 1),
                            num_basis=tokens // factor, keep=config["attn_keep_rate"], shared_basis=config["share_inout_proj"], **args)
    model = _SparsifinerModel(config["img_size"], config["patch_size"], num_classes=config["num_classes"], embed_dim=config["embed_dim"],
                              depth=config["depth"], num_heads=config["num_heads"], mlp_ratio=config["mlp_ratio"])
    for i, keep in enumerate(config["attn_keep_rate_list"]):
        tokens = 1 + model.patch_embed.num_patches
        zoo.replace_attention(model, "sparsifiner", where=f"blocks.{i}", keep=keep, num_basis=tokens // factor, **args)
    return model


def _convert_sparsifiner(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("mask_predictor.", "mechanism."): value for name, value in state.items()}


def _dual_attention(config: dict[str, Any], reference: str) -> nn.Module:
    kind = reference.split()[-1]
    if kind == "SymbolicAttention":
        return SymbolicAttention(config["d_model"], config["n_heads"], config["n_symbols"])
    relations = config.get("ra_kwargs", config)
    args = dict(num_relations=relations["n_relations"], activation=relations.get("rel_activation", "identity"),
                symmetric=relations.get("symmetric_rels", False))
    if kind == "RelationalAttention":
        return RelationalAttention(config["d_model"], config["n_heads"], **args)
    heads = dict(self_heads=config["n_heads_sa"], relational_heads=config["n_heads_ra"])
    if kind == "DualAttention":
        return DualAttention(config["d_model"], **heads, **args)
    symbols = config["symbol_retrieval_kwargs"]
    return vidat.VisionDualAttentionTransformer(
        **heads, **args, img_size=config["image_shape"][1:], patch_size=config["patch_size"], in_chans=config["image_shape"][0],
        num_classes=config["num_classes"], embed_dim=config["d_model"], depth=config["n_layers"],
        mlp_ratio=config["dff"] / config["d_model"], num_symbols=symbols["n_symbols"], symbol_heads=symbols["n_heads"])


def _convert_dual(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return vidat.checkpoint_filter_fn(state, model) if isinstance(model, vidat.VisionDualAttentionTransformer) else state


class _PyramidSparse(nn.Module):
    """The operator, with a last block of keys as the authors have it: for levels above 1 filled with its last token."""

    def __init__(self, block: int):
        super().__init__()
        self.block = block

    def forward(self, q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> Tensor:
        last, lacking = levels[..., -1:], -k.shape[2] % self.block
        k, v = (torch.cat((x, x[:, :, -1:].expand(-1, -1, lacking, -1), x[:, :, lacking - self.block :]), 2) for x in (k, v))
        levels = torch.cat((levels[..., :-1], torch.where(last > 1, last, 0), torch.where(last > 1, 0, last)), 3)
        return pyramid_sparse_attention(q, k, v, levels, (self.block, self.block))


def _pyramid_sparse(config: dict[str, Any], reference: str) -> nn.Module:
    assert config["block_m"] == config["block_n"]
    return _PyramidSparse(config["block_n"])


class _SelectiveScan(nn.Module):
    """The operator of that name, as a module."""

    def __init__(self, delta_softplus: bool) -> None:
        super().__init__()
        self.delta_softplus = delta_softplus

    def forward(self, *inputs: Tensor) -> Tensor:
        return selective_scan(*inputs, delta_softplus=self.delta_softplus)


def _ss2d(config: dict[str, Any], reference: str) -> nn.Module:
    if "VSSBlock" in reference:
        return vmamba.VSSBlock(config["hidden_dim"], config["d_state"], eps=1e-6)
    return SelectiveScan2d(config["d_model"], config["d_state"]) if "SS2D" in reference else _SelectiveScan(config["delta_softplus"])


class _Conditional(saliency_mamba.ConditionalVSSBlock):
    """The block, given the kinds of pictures one-hot, as the authors' is."""

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return super().forward(x, kind.argmax(1))


class _Encoder(saliency_mamba.Encoder):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        last, given = super().forward(x)
        return last, *given


class _Fixations(nn.Module):
    """SUM's losses of maps, and where nothing is to be learned the area under the curve."""

    def __init__(self, losses: bool) -> None:
        super().__init__()
        self.losses = losses

    def forward(self, prediction: Tensor, saliency: Tensor, fixations: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not self.losses:
            return torch.tensor([auc_judd(p, f) for p, f in zip(prediction, fixations, strict=True)])
        found = divergence(prediction, saliency), correlation(prediction, saliency), similarity(prediction, saliency)
        means = (each.mean() for each in (*found, scanpath(prediction, fixations)))
        return *means, zoo.FixationLoss()(prediction, saliency, fixations)


def _sum(config: dict[str, Any], reference: str) -> nn.Module:
    if "loss_function" in reference:
        return _Fixations("SaliencyLoss" in reference)
    if "VSSBlock" in reference:
        return _Conditional(config["hidden_dim"], config["d_state"], eps=1e-6, conditions=config["condition_size"])
    if "PatchMerging2D" in reference:
        return vmamba.PatchMerging(config["dim"], 2 * config["dim"])
    if "PatchExpand2D" in reference:
        return saliency_mamba.PatchExpand(*((config["dim"], 4) if "Final" in reference else (2 * config["dim"],)))
    sizes = dict(dims=config["dims"], depths=config["depths"], state_dim=config["d_state"])
    if "forward_features" in reference:
        return _Encoder(3, **sizes)
    return saliency_mamba.SUM(decoder_depths=config["depths_decoder"], **sizes)


def _convert_sum(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    family = vmamba if isinstance(model, saliency_mamba.Encoder) else saliency_mamba
    return family.checkpoint_filter_fn(state, model)


def _as_it_is(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return state


def _sigma_reparam(config: dict[str, Any], reference: str) -> nn.Module:
    config = {name: value for name, value in config.items() if name != "training"}
    build = {"SNLinear": nn.Linear, "SNConv2d": nn.Conv2d}.get(reference.split()[2], VisionTransformer)
    return zoo.reparametrize(build(**config), keep_norms=False)


class _Balanced(nn.Module):
    """A layer that reports its load balancing loss in training, with the layer's own parameter names."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer
        self._modules, self._parameters = layer._modules, layer._parameters

    def forward(self, x: Tensor) -> Tensor:
        if not self.layer.train(self.training).training:
            return self.layer(x)
        out, balance = zoo.LoadBalancingLoss()(self.layer, x)
        report(self, load_balancing_loss=balance)
        return out


def _moh(config: dict[str, Any], reference: str) -> nn.Module:
    shared, active = config["shared_head"], config["routed_head"]
    if "TransNeXt" in reference:
        return transnext.TransNeXt(
            num_classes=config["num_classes"], dims=config["embed_dims"], depths=config["depths"], num_heads=config["num_heads"],
            mlp_ratios=config["mlp_ratios"], sr_ratios=[*config["sr_ratios"][:3], None], shared_heads=shared, active_heads=active,
            pretrain_size=config["pretrain_size"])
    if "MoHAttention" in reference:
        norms = dict(qk_norm=config["qk_norm"], norm_layer=nn.LayerNorm)
        attention = Attention(config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"], **norms)
        return _Balanced(zoo.replace_attention(nn.Sequential(attention), "moh", shared_heads=shared, active_heads=active))
    args = dict(pretrain_size=config["pretrain_size"], qkv_bias=config["qkv_bias"], shared_heads=shared, active_heads=active)
    layer = (AggregatedAttention(config["dim"], config["num_heads"], config["sr_ratio"], **args) if "sr_ratio" in config
             else LengthScaledAttention(config["dim"], config["num_heads"], **args))
    return _Balanced(_Tokens(layer, *config["input_resolution"], channels_first=False))


def _convert_moh(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    converted = transnext.checkpoint_filter_fn(state, model)
    if "0" not in model._modules:
        return converted
    return {f"0.{name.replace('router.', 'mechanism.router.')}": value for name, value in converted.items()}


def _efficient_probing(config: dict[str, Any], reference: str) -> nn.Module:
    if "simpool" in reference:
        return SimPool(config["dim"])
    if "num_classes" in config:
        return head_for(config["dim"], config["num_classes"], queries=config["num_queries"], d_out=config["d_out"])
    return EfficientProbing(config["dim"], config["num_queries"], config["d_out"])


def _attention_removal(config: dict[str, Any], reference: str) -> nn.Module:
    config = dict(config)
    if "Block" in reference:
        return zoo.remove_attention(Block(**{k: v for k, v in config.items() if k != "lambda_v"}), [0], share=config["lambda_v"])
    epoch, diluted, gone = (config.pop(name) for name in ("epoch", "prune_layer", "done_layer"))
    config.pop("frozen_stages", None)
    if "models_shrink" in reference:
        return lambda_deit.LambdaVisionTransformer(gone, **config)
    model = zoo.remove_attention(VisionTransformer(**config), diluted, share=zoo.attention_share(epoch, epochs=300))
    return zoo.remove_attention(model, gone, share=0.0)


def _with_shares(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' λ is no part of their state."""
    return {name: value for name, value in model.state_dict().items() if name.endswith("attention_share")} | state


class _Stages(nn.Module):
    """Both stages of iFAM, or one: what they put out, with the network's own parameter names."""

    def __init__(self, network: ifam.TwoStageVisionTransformer, which: str):
        super().__init__()
        self.__dict__["network"], self.which = network, which
        self._modules = network._modules

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | None:
        if mask is not None:
            side = math.isqrt(mask.shape[1])
            seen = mask.unflatten(1, (side, side))
            nothing = torch.empty(0)
            tokens, _ = self.network._stage_2(x, Parts(nothing, nothing, torch.stack([seen, 1 - seen], 1), seen, nothing))
            return self.network.forward_head(tokens)
        with part_losses.discoveries(self.network) as found:
            out = self.network(x) if self.which == "both" else self.network.discover(x)[0].maps
        parts = found.parts
        likeliness = parts.mask - parts.mask.detach()
        report(self, maps=parts.maps, features=parts.features.mT, soft_mask=parts.soft_mask, part_logits=parts.products,
               hard_mask=torch.stack([parts.mask, 1 - parts.mask.detach() + likeliness], 1),
               scores=self.network.part_head(parts.features[:, :-1]).mT)
        return out


class _PartLosses(nn.Module):
    def forward(self, features: Tensor, logits: Tensor) -> None:
        maps, background = logits.softmax(1), logits.softmax(1)[:, -1]
        report(self, concentration=part_losses.concentration(maps[:, :-1]), entropy=part_losses.pixel_entropy(maps),
               orthogonality=part_losses.orthogonality(features.mT), total_variation=part_losses.total_variation(maps),
               presence=part_losses.presence(maps), enforced_presence=part_losses.enforced_presence(background),
               **{f"presence_{kind}": part_losses.presence(maps, kind, 0.1) for kind in ("soft_constraint", "soft_tanh", "tanh")},
               **{f"enforced_presence_{kind}": part_losses.enforced_presence(background, kind) for kind in ("linear", "log", "mse")})


class _Equivariance(nn.Module):
    def __init__(self, side: int, angle: float, translate: list[int], scale: float):
        super().__init__()
        self.there = angle, tuple(translate), scale, (side, side)

    def forward(self, logits: Tensor, transformed: Tensor) -> None:
        maps, moved = (x.softmax(1)[:, :-1] for x in (logits, transformed))
        report(self, equivariance=part_losses.equivariance(maps, moved, *self.there))


def _ifam(config: dict[str, Any], reference: str) -> nn.Module:
    if "losses/*.py" in reference:
        return _PartLosses()
    if "losses/" in reference:
        return _Equivariance(config["image_side"], config["angle"], config["translate"], config["scale"])
    stages = (VisionTransformer(num_classes=0, **config["vit"]) for _ in range(2))
    network = ifam.TwoStageVisionTransformer(
        *stages, config["num_classes"], config.get("num_landmarks", 1), "soft" if config.get("use_soft_masks") else "hard", "always",
        config.get("gumbel_softmax", True), config.get("part_dropout_stage_2", 0), config.get("part_dropout", 0),
        drop_masked=not config.get("use_soft_masks", False))
    which = {"IndividualLandmarkViT2StageMod": "stage_1", "AttnMaskViT2Stage": "stage_2"}.get(reference.split()[2], "both")
    return _Stages(network, which)


def _convert_ifam(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, _Stages):
        return state
    alone = "" if model.which == "both" else f"{model.which}."
    converted = ifam.checkpoint_filter_fn({f"{alone}{name}": value for name, value in state.items()}, model)
    return {name: torch.zeros_like(value) for name, value in model.state_dict().items() if alone} | converted


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def _connectivity_loss(**args: Any) -> nn.Module:
    loss = zoo.ConnectivityLoss(**args)
    return _Function(lambda logits, masks: loss(logits, (masks[:, 0] if masks.ndim == 4 else masks).long()))


def _connectivity(config: dict[str, Any], reference: str) -> nn.Module:
    match reference.split()[2]:
        case "sal2conn":
            return _Function(connectivity_target)
        case "bv_test":
            return _Function(lambda logits: bilateral_voting(logits.sigmoid())[0])
        case "Bilateral_voting":
            return _Function(bilateral_voting)
        case "bicon_loss":
            return _connectivity_loss(variant="bicon")
        case "connect_loss":
            return _connectivity_loss(variant="dconn")
        case "SDE_module":
            return dconnnet.DirectionalExcitation(config["in_channels"], config["num_class"])
        case "SpaceBlock":
            return dconnnet.SpaceBlock(config["in_channels"], config["channel_in"], config["out_channels"])
        case "FeatureBlock":
            return dconnnet.FeatureBlock(config["in_planes"], config["out_planes"], spread=not config["last"])
    return dconnnet.LightDecoder(config["in_channels"], config["out_channels"])


def _convert_connectivity(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    unused = "conv_3x3." if isinstance(getattr(model, "spread", None), nn.Identity) else "nothing"
    return dconnnet.checkpoint_filter_fn({name: value for name, value in state.items() if not name.startswith(unused)}, model)


def _a2n(config: dict[str, Any], reference: str) -> nn.Module:
    kernel = config["non_attention_kernel"]
    if "AAN" not in reference:
        assert config["K"] == 2
        return AttentionInAttention(config["nf"], config["reduction"], config["t"], kernel)
    return a2n.AttentionInAttentionNetwork(
        config["in_nc"], scale=config["scale"], dim=config["nf"], depth=config["nb"], up_dim=config["unf"], plain_kernel=kernel)


class _Layers(LayerAttention):
    """The layer as the authors return it, without an axis of layers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1, 2)


def _han(config: dict[str, Any], reference: str) -> nn.Module:
    if "LAM_Module" in reference:
        return _Layers()
    if "CSAM_Module" in reference:
        return ChannelSpatialAttention(config["in_dim"])
    if "RCAB" in reference:
        return han.ResidualChannelAttentionBlock(config["n_feat"], config["reduction"])
    return han.HolisticAttentionNetwork(config["n_colors"], scale=config["scale"], dim=config["n_feats"], groups=config["n_resgroups"],
                                        depth=config["n_resblocks"], reduction=config["reduction"])


BUILD: dict[str, Callable[[dict[str, Any], str], nn.Module]] = dict(
    a2n=_a2n, adl=_adl, atconv=_atconv, attention_gate=_attention_gate, attention_removal=_attention_removal,
    attention_unet=_attention_unet, attnet=_attnet, biformer=_biformer, bra=_bra, cog=_cog, connectivity=_connectivity,
    dual_attention=_dual_attention,
    efficient_probing=_efficient_probing, entmax=_entmax, fan=_fan,
    gated_attention=_gated_attention, han=_han, hedgehog=_hedgehog,
    hilo=_hilo, ifam=_ifam, litv2=_litv2, moh=_moh, polarized=_polarized,
    pyramid_sparse=_pyramid_sparse, rela=_rela, sigma_reparam=_sigma_reparam,
    sk=_sk, sparsifiner=_sparsifiner, ss2d=_ss2d, sum=_sum, tap=_tap)
CONVERT = dict(
    a2n=a2n.checkpoint_filter_fn, adl=_as_it_is, atconv=attnet.checkpoint_filter_fn, attention_gate=unet.checkpoint_filter_fn,
    attention_removal=_with_shares, attention_unet=unet.checkpoint_filter_fn, attnet=attnet.checkpoint_filter_fn,
    biformer=biformer.checkpoint_filter_fn, bra=biformer.checkpoint_filter_fn, cog=_as_it_is, connectivity=_convert_connectivity,
    dual_attention=_convert_dual,
    efficient_probing=_as_it_is, entmax=_as_it_is, fan=_convert_fan,
    gated_attention=_convert_gated, han=han.checkpoint_filter_fn,
    hedgehog=_convert_hedgehog, hilo=litv2.checkpoint_filter_fn, ifam=_convert_ifam,
     litv2=litv2.checkpoint_filter_fn, moh=_convert_moh,
    polarized=polarized.checkpoint_filter_fn, pyramid_sparse=_as_it_is, rela=_convert_rela, sigma_reparam=sigma_names,
    sk=sknet.checkpoint_filter_fn, sparsifiner=_convert_sparsifiner, ss2d=vmamba.checkpoint_filter_fn, sum=_convert_sum,
    tap=fan.checkpoint_filter_fn)


def _attention_of(model: nn.Module) -> dict[str, Tensor]:
    """Fills with the attention of the model's token mixing once the model runs."""
    layers, found = [layer for layer in model.modules() if isinstance(layer, TokenMixing)], {}
    for i, layer in enumerate(layers):
        name = f"attention.{i}" if len(layers) > 1 else "attention"
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: found.update({name: layer.attention(*inputs)}))
    return found


def _draw(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What parts are discovered with draws the reference's numbers."""
    draws = iter([tensors[name] for name in sorted(tensors) if name.startswith("exponential.")])
    for layer in model.modules():
        if isinstance(layer, PartDiscovery):
            layer.exponential = lambda z: next(draws)


def _close(name: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    difference, allowed = (ours - theirs).abs().max().item(), bound * (1 + theirs.abs().max().item())
    assert difference <= allowed, f"{name}: largest difference {difference:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("case", CASES, ids=[f"{case['family']}/{case['case']}" for case in CASES])
def test_reference_vector(case: dict[str, Any]) -> None:
    if case["family"] not in BUILD:
        pytest.skip(f"the family {case['family']} is not in the zoo yet")
    tensors = load_file(GOLDEN / case["file"])
    state, grads, after = ({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)}
                           for p in ("state/", "grad/state/", "after/"))
    model = BUILD[case["family"]](case["config"], case["reference"]).train(case["config"].get("training", False))
    convert = CONVERT[case["family"]]
    model.load_state_dict(convert(state, model), strict=True)
    _draw(model, tensors)
    given = case.get("inputs") or [
        "input", "gating", "symbols", "q", "k", "v", "mask", *sorted(name for name in tensors if name.startswith("logits."))]
    given = [*given, *(("features", "logits", "logits_transformed") if "losses/" in case["reference"] else ())]
    inputs = {name: tensors[name].requires_grad_(f"grad/{name}" in tensors) for name in given if name in tensors}
    attention = _attention_of(model)
    with zoo.capture(model) as maps:
        out = model(*inputs.values())
    outputs = dict(zip(case.get("outputs", ["output"]), out if isinstance(out, tuple) else (out,), strict=True))
    outputs |= maps.get("", {}) | attention  # what a single layer reports of itself, and token mixing's
    outputs |= {"weights": maps["mechanism"]["attention"]} if "mechanism" in maps else {}
    names = [name.removeprefix("cotangent/") for name in tensors if name.startswith("cotangent/")]
    for name in case.get("outputs", names):
        _close(name, outputs[name], tensors[name], OUTPUT_BOUND)
    if names:
        sum((outputs[name] * tensors[f"cotangent/{name}"]).sum() for name in names).backward()
    for name, x in ((name, x) for name, x in inputs.items() if x.requires_grad):
        _close(f"gradient of {name}", x.grad, tensors[f"grad/{name}"], GRADIENT_BOUND)
    parameters = dict(model.named_parameters())
    converted = convert({**state, **grads}, model)  # conversion may look at neighbouring entries
    own_names = convert({name: torch.full_like(value, name in grads) for name, value in state.items()}, model)
    compared = [name for name in parameters if bool(own_names[name].flatten()[0])]
    assert len(compared) == len(convert(grads, model) if case["family"] == "gated_attention" else grads)
    for name in compared:
        _close(f"gradient of {name}", parameters[name].grad, converted[name], GRADIENT_BOUND)
    changed = convert({**state, **after}, model)
    for name, buffer in model.named_buffers():
        if name in changed:
            _close(f"{name} afterwards", buffer, changed[name], OUTPUT_BOUND)
