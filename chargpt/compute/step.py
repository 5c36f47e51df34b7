"""What a training step computes besides the layers: loss, norm of the gradient, clipping, updates.

If the model is on the kernels (`chargpt.compute.fast_layers.FastGPT2`), so are these, wherever the
kernels support the tensors. Otherwise they are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.compute import native
from chargpt.compute.fast_layers import FastGPT2, fast_muon_update
from chargpt.compute.muon import AdamWSettings, AdamWTensors, MuonAdamW, Tensors, adamw_update
from chargpt.compute.sharding import is_shared, own, whole

# --- loss


def cross_entropy(
    model: nn.Module,
    logits: Tensor,
    targets: Tensor,
    surplus: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """Return the mean loss in nats, a scalar, for the model's logits (B, T, V), targets (B, T).

    With `surplus`, (B, T, V), which is soft targets less one-hot targets, the gradient is that of
    (1 − share) · loss + share · cross-entropy to the soft targets; the loss stays as it is.
    """
    if isinstance(model, FastGPT2) and native.supports(logits, widths=()):
        return native.cross_entropy(logits, targets, surplus, share)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    if surplus is None:
        return loss
    # The two losses differ by this: the normaliser of softmax cancels out.
    change = -share / targets.numel() * (surplus * logits).sum()
    return loss + (change - change.detach())


def token_losses(model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target, (B × T,), without gradient; see `cross_entropy`."""
    if isinstance(model, FastGPT2) and native.supports(logits, widths=()):
        return native.token_losses(logits, targets)
    logits = logits.float().flatten(0, 1)  # (B × T, V)
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


# --- gradient


def gradient_norm(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of the gradients of all parameters together, a scalar."""
    gradients = _gradients(parameters)
    if isinstance(model, FastGPT2) and native.in_kernels_memory(*gradients):
        return native.norm(gradients)
    return whole(nn.utils.get_total_norm(gradients, foreach=_foreach(parameters)))


def clip_gradient(
    model: nn.Module, parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float
) -> None:
    """Shorten gradients of norm `norm` to `max_norm`, in place, if they are longer."""
    gradients = _gradients(parameters)
    on_kernels = isinstance(model, FastGPT2) and native.in_kernels_memory(*gradients)
    if on_kernels or any(map(is_shared, gradients)):
        factor = max_norm / (float(norm) + 1e-6)  # as in clip_grads_with_norm_
        if factor < 1:
            scale = native.scale_ if on_kernels else torch._foreach_mul_
            scale([own(gradient) for gradient in gradients], factor)
    else:
        foreach = _foreach(parameters)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=foreach)


def _gradients(parameters: Sequence[nn.Parameter]) -> Tensors:
    return [p.grad for p in parameters if p.grad is not None]


def _foreach(parameters: Sequence[nn.Parameter]) -> bool | None:
    """PyTorch's default is slow on CPUs."""
    return True if all(p.device.type == "cpu" for p in parameters) else None


# --- updates


def use_fast_updates(optimizer: torch.optim.Optimizer) -> None:
    """Let an AdamW or MuonAdamW optimizer use the kernels, in place; its state stays."""
    if isinstance(optimizer, MuonAdamW):
        optimizer.muon_update, optimizer.adamw_update = fast_muon_update, fast_adamw_update
    elif type(optimizer) is torch.optim.AdamW:
        optimizer.__class__ = FastAdamW
        optimizer._patch_step_function()  # step calls registered hooks
        # PyTorch's fused step itself leaves out an update that overflowed; this one relies on the
        # gradient scaler for it.
        optimizer._step_supports_amp_scaling = False


class FastAdamW(torch.optim.AdamW):
    """AdamW on the kernels, with its parent's groups, state and formula."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; `closure` returns the loss, as in PyTorch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: list[Tensors] = [[] for _ in range(6)]
            self._init_group(group, *lists)  # type: ignore[no-untyped-call]
            weights, gradients, means, squares, _, steps = lists
            tensors = AdamWTensors(weights, gradients, means, squares, steps)
            settings = AdamWSettings(*(group[name] for name in AdamWSettings._fields))
            fast_adamw_update(tensors, settings)
        return loss


def fast_adamw_update(tensors: AdamWTensors, settings: AdamWSettings) -> None:
    """Call `native.adamw_update` where the kernels support the tensors, else `adamw_update`."""
    fits = native.in_kernels_memory(*chain(*tensors))
    (native.adamw_update if fits else adamw_update)(tensors, settings)
