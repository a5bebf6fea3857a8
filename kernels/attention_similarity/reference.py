"""The similarity of attention rows in PyTorch, which holds the attention of all queries at once."""
import torch.nn.functional as F
from torch import Tensor


def attention_similarity(q: Tensor, k: Tensor, threshold: float, scale: float) -> Tensor:
    """The definition."""
    return row_similarity((scale * q @ k.mT).softmax(-1).mean(1), threshold)


def row_similarity(attention: Tensor, threshold: float) -> Tensor:
    """The same of the attention (B, N, M) itself, already averaged over heads."""
    mean = attention.mean(1, keepdim=True)
    rows, mean = (a * (a > threshold / a.shape[-1]) for a in (attention, mean))
    return F.cosine_similarity(rows, mean, dim=-1).mean()
