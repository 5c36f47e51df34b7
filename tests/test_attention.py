"""Both attention backends against an explicit loop, and the dropout of attention weights."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from chargpt.model import AttentionBackend, causal_attention

LENGTHS = [1, 2, 5]
NO_DROPOUT = nn.Dropout(0.0)


def queries_keys_values(
    length: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, 3, length, 4, generator=generator, dtype=dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, T, D = q.shape
    q, k, v = q.detach(), k.detach(), v.detach()
    out = torch.empty(B, H, T, D, dtype=torch.float64)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        visible = range(t + 1)
        weights = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(D)) for s in visible]
        out[b, h, t] = sum(weights[s] / sum(weights) * v[b, h, s] for s in visible)
    return out


@pytest.mark.parametrize("backend", ["sdpa", "matmul", None])
@pytest.mark.parametrize("length", LENGTHS)
def test_each_backend_equals_the_loop(length: int, backend: AttentionBackend | None) -> None:
    q, k, v = queries_keys_values(length)
    out = causal_attention(q, k, v, NO_DROPOUT, backend)
    torch.testing.assert_close(out.detach(), by_hand(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("length", LENGTHS)
def test_backends_agree_in_value_and_gradient(
    length: int, dtype: torch.dtype, tolerance: float
) -> None:
    results = []
    upstream = torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for backend in ("sdpa", "matmul"):
        q, k, v = queries_keys_values(length, dtype)
        out = causal_attention(q, k, v, NO_DROPOUT, backend)
        assert out.dtype == dtype
        out.backward(upstream)
        results.append((out, q.grad, k.grad, v.grad))
    for fused, written_out in zip(*results, strict=True):
        torch.testing.assert_close(fused, written_out, rtol=tolerance, atol=tolerance)


def test_weights_of_huge_scores_are_finite() -> None:
    q, k, v = (1e4 * x.detach().float() for x in queries_keys_values(5))
    for backend in ("sdpa", "matmul"):
        assert causal_attention(q, k, v, NO_DROPOUT, backend).isfinite().all()


# --- dropout of attention weights


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_weights_independently_and_scales_the_rest(
    p: float, backend: AttentionBackend
) -> None:
    """With the identity as values, the output is the weights after dropout."""
    torch.manual_seed(0)
    B, T = 64, 48
    q = torch.zeros(B, 2, T, T)
    v = torch.eye(T).expand(B, 2, T, T)
    out = causal_attention(q, q, v, nn.Dropout(p), backend)

    plain = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]  # equal weights
    visible = plain > 0
    kept = out[:, :, visible] != 0  # (B, H, visible)
    assert (out[:, :, ~visible] == 0).all()
    n = kept.numel()
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    scaled = (plain / (1 - p)).expand_as(out)[:, :, visible][kept]
    torch.testing.assert_close(out[:, :, visible][kept], scaled, rtol=1e-4, atol=0)
    # The row of the last query is an average of T independent values of mean 1.
    rows = out[:, :, -1].sum(-1)
    assert abs(rows.mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / (T * rows.numel()))


def test_heads_and_sequences_drop_different_weights() -> None:
    torch.manual_seed(0)
    q = torch.zeros(2, 2, 16, 16)
    out = causal_attention(q, q, torch.eye(16).expand_as(q), nn.Dropout(0.5))
    masks = {tuple((head != 0).flatten().tolist()) for head in out.flatten(0, 1)}
    assert len(masks) == 4


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_weights_are_dropped_and_not_outputs(backend: AttentionBackend) -> None:
    """A dropped weight removes a whole value vector, so equal columns stay equal."""
    torch.manual_seed(0)
    q = torch.zeros(2, 2, 32, 4)
    column = torch.randn(2, 2, 32, 1)
    out = causal_attention(q, q, column.expand(2, 2, 32, 4), nn.Dropout(0.5), backend)
    torch.testing.assert_close(out, out[..., :1].expand_as(out))
    assert not torch.equal(out, causal_attention(q, q, column.expand(2, 2, 32, 4), NO_DROPOUT))
