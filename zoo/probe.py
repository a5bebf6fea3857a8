"""Heads on frozen backbones: what a network has learned, asked with few parameters and in minutes."""
import copy
from typing import Any, Literal, Self, cast

import timm
import torch
from torch import Tensor, nn

import zoo.models  # noqa: F401  registers what is named
from zoo.errors import InputError, near_misses
from zoo.layers import EfficientProbing, SimPool
from zoo.modules import evaluating

Pooling = Literal["attentive", "simpool", "linear", "class"]
POOLINGS: tuple[Pooling, ...] = Pooling.__args__
EPS = 1e-6  # of the heads' batch norm, the authors' (billpsomas/efficient-probing, probe_heads.py)


class TokenMean(nn.Module):
    """(B, N, C) → (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def head_for(dim: int, classes: int, pooling: Pooling = "attentive", queries: int = 32, d_out: int = 1) -> nn.Sequential:
    """Tokens (B, N, C) → logits: a pooling, a batch norm without parameters, a linear layer, as the authors of EP probe.

    Its state has their names: `0.cls_token`, `0.v.weight`, `1.*`, `2.*`. Raises InputError for what `probe` refuses.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}{near_misses(str(pooling), POOLINGS)}")
    if classes < 1:
        raise InputError(f"classes must be at least 1, got {classes}")
    if pooling == "attentive":
        try:
            pool: nn.Module = EfficientProbing(dim, queries, d_out)
        except ValueError as error:
            fitting = [str(q) for q in range(1, 65) if d_out > 0 and dim % (d_out * q) == 0]
            raise InputError(f"{error}; of tokens {dim} wide, queries can be {', '.join(fitting) or 'none'}") from error
    else:
        pool = SimPool(dim) if pooling == "simpool" else TokenMean()
    width = dim // d_out if pooling == "attentive" else dim
    return nn.Sequential(pool, nn.BatchNorm1d(width, EPS, affine=False), nn.Linear(width, classes))


class Probe(nn.Module):
    """A head on a frozen network; see `zoo.probe`, which makes it. Images (B, C, H, W) → logits (B, classes).

    `backbone` is the network, always in evaluation mode, `head` what learns: its pooling, which reports its `attention` to
    `zoo.capture`, a batch norm and a linear layer. No graph is recorded through the network, unless the images themselves require
    gradients, as attributions let them.
    """

    def __init__(self, backbone: nn.Module, head: nn.Sequential, pooling: Pooling, class_token: bool):
        super().__init__()
        self.backbone, self.head, self.pooling, self.class_token = backbone.requires_grad_(False).eval(), head, pooling, class_token
        self.num_classes = cast(nn.Linear, head[-1]).out_features
        self.num_prefix_tokens = _prefix_tokens(backbone)
        self.output_fmt = getattr(backbone, "output_fmt", "NCHW")

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The network's, with the names that its modules have here."""
        return [{**info, "module": f"backbone.{info['module']}"} for info in getattr(self.backbone, "feature_info", [])]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """The network's, tokens or maps."""
        return cast(Any, self.backbone).forward_features(x)

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from the network's features."""
        return self.head(self._pooled(*patches_and_class_token(self.backbone, features)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def tokens(self, x: Tensor) -> Tensor:
        """What the head pools, (B, N, D): the patch tokens, behind the class token where that is asked for, or that alone."""
        return self._pooled(*patches_and_class_token(self.backbone, self.forward_features(x)))

    def _pooled(self, patches: Tensor, class_token: Tensor | None) -> Tensor:
        if self.pooling == "class":
            return cast(Tensor, class_token)
        return torch.cat([cast(Tensor, class_token), patches], 1) if self.class_token else patches


def probe(
    backbone: nn.Module | str,
    classes: int,
    queries: int = 32,
    *,
    pooling: Pooling = "attentive",
    d_out: int = 1,
    norm: bool = True,
    class_token: bool = False,
) -> Probe:
    """A head that learns to tell `classes` apart from what a frozen network sees: efficient probing (arXiv 2506.10178), or simpler ones.

        model = zoo.probe("vit_base_patch14_dinov2.lvd142m", classes=10)
        optimizer = torch.optim.AdamW(model.head.parameters(), 1e-3)

    Args:
        backbone: a network of timm or the zoo, whose `forward_features` gives tokens (B, N, C) or maps, which are flattened; or the
            name of one, with the weights that timm downloads. It is frozen: its parameters require no gradients from here on, and it
            stays in evaluation mode.
        classes: of the logits.
        queries: of the attentive pooling. They have to divide its width.
        pooling: "attentive", which is EP; "simpool"; "linear", the mean of the tokens; "class", the class token.
        d_out: what the attentive pooling divides the width by.
        norm: whether tokens are taken as `forward_features` gives them, after the network's last norm, or before it.
        class_token: whether the class token is pooled with the patch tokens, before them.

    Raises:
        InputError: no such network or pooling; one that hands over neither tokens nor maps, or no class token where that is asked for, or
            whose last norm cannot be told apart; queries that do not divide the width.
    """
    if isinstance(backbone, str):
        backbone = _pretrained(backbone)
    if not callable(getattr(backbone, "forward_features", None)):
        raise InputError(f"{type(backbone).__name__} has no forward_features, by which timm's networks hand over tokens or maps")
    backbone = backbone if norm else _without_last_norm(backbone)
    width, with_class_token = width_of(backbone)
    if (class_token or pooling == "class") and not with_class_token:
        raise InputError(f"{type(backbone).__name__} has no class token, of which a head could be made")
    head = head_for(width, classes, pooling, queries, d_out)
    reference = next(backbone.parameters())
    return Probe(backbone, head.to(reference.device, reference.dtype), pooling, class_token)


def patches_and_class_token(network: nn.Module, features: Any) -> tuple[Tensor, Tensor | None]:
    """Of what the network's `forward_features` gave: patch tokens (B, N, D), and the class token (B, 1, D), or None."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"{type(network).__name__}.forward_features gives {found}, neither tokens (B, N, C) nor maps")
    if features.ndim == 4:
        channels_last = str(getattr(network, "output_fmt", "NCHW")) == "NHWC"
        return features.flatten(1, 2) if channels_last else features.flatten(2).mT, None
    return features[:, _prefix_tokens(network) :], features[:, :1] if _has_class_token(network) else None


def _has_class_token(network: nn.Module) -> bool:
    """Whether a class token is the first of its tokens, if they are tokens."""
    return isinstance(getattr(network, "cls_token", None), Tensor)


def _prefix_tokens(network: nn.Module) -> int:
    """How many tokens stand before the patches'."""
    return int(cast(Any, getattr(network, "num_prefix_tokens", _has_class_token(network))))


def _pretrained(name: str) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"there is no model {name!r}{near_misses(name, timm.list_models())}")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except RuntimeError as error:
        raise InputError(f"no weights of {name} can be had: {' '.join(str(error).split())}; a network that is built can be given "
                         "instead of its name") from error


def _without_last_norm(network: Any) -> nn.Module:
    """The network with the identity in the place of its norm, all else being the same objects."""
    found = getattr(network, "norm", None)
    if isinstance(found, nn.Identity) and isinstance(getattr(network, "fc_norm", None), nn.Module):
        return network  # timm's networks that norm what is pooled: their tokens are not
    if not isinstance(found, nn.Module) or isinstance(found, nn.Identity):
        raise InputError(f"{type(network).__name__} has no norm called `norm` at its end, before which tokens could be taken; leave "
                         "norm=True for tokens as its forward_features gives them")
    without = copy.copy(network)
    vars(without)["_modules"] = dict(vars(network)["_modules"])
    without.norm = nn.Identity()
    try:
        with evaluating(network), torch.no_grad():
            image = _image(network)
            is_last = torch.allclose(found(without.eval().forward_features(image)), network.forward_features(image), rtol=1e-3, atol=1e-4)
    except Exception:  # maps of another layout, lists, steps between that need the norm: in many ways
        is_last = False
    if not is_last:
        raise InputError(f"the norm of {type(network).__name__} is not the last thing done to its tokens, so that they cannot be taken "
                         "before it")
    return without


def width_of(network: nn.Module) -> tuple[int, bool]:
    """How wide the network's tokens are, and whether a class token comes with them, found out with an image.

    Raises InputError if it hands over none.
    """
    try:
        with evaluating(network), torch.no_grad():
            patches, class_token = patches_and_class_token(network, cast(Any, network).forward_features(_image(network)))
    except InputError:
        raise
    except Exception as error:  # every network stumbles in its own way
        raise InputError(f"{type(network).__name__} does not run on an image of its own size: {error}") from error
    if patches.shape[1] < 1:
        raise InputError(f"{type(network).__name__}.forward_features hands over no patch tokens, only {_prefix_tokens(network)} of its own")
    return patches.shape[-1], class_token is not None


def _image(network: Any) -> Tensor:
    """Random, of the size and with the channels that the network takes."""
    weight = next(network.parameters())
    channels = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), 3)
    fixed = (size for layer in network.modules() if isinstance(size := getattr(layer, "img_size", None), tuple))  # of patch embeddings
    size = next(fixed, None) or tuple((getattr(network, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224))[1:]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, *size, generator=generator).to(weight.device, weight.dtype)
