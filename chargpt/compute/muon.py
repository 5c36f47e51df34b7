"""One optimizer: Muon for the hidden matrices, AdamW for all other parameters.

Muon replaces a matrix's momentum by the nearest matrix with singular values of about 1, so a step
moves every direction by the same amount: Jordan et al. 2024, "Muon: an optimizer for hidden layers
in neural networks"; Liu et al. 2025, "Muon is scalable for LLM training". The update is that of
`torch.optim.Muon`, by default with a sharper iteration. Matrices of one shape are orthogonalised
together, which makes Muon affordable for small models.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from chargpt.compute.sharding import is_shared, own, shared_like, whole

# (a, b, c) of each step x -> a x + b x³ + c x⁵, which moves singular values in (0, 1] to about 1.
Steps = tuple[tuple[float, float, float], ...]
# Jordan et al. 2024 and torch.optim.Muon: one quintic, 5 times. Values above 0.015 reach 0.7 to 1.2
JORDAN: Steps = ((3.4445, -4.7750, 2.0315),) * 5
# Amsel et al. 2025, "The Polar Express": the best quintic for each step's input. Values above 0.004
# reach 0.88 to 1.13. Above its largest input a quintic is steep, and rounding to bfloat16 may leave
# a value there, which the next steps make thousands. So all steps but the last divide x by 1.02.
_QUINTICS: Steps = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)
POLAR_EXPRESS: Steps = (
    *((a / 1.02, b / 1.02**3, c / 1.02**5) for a, b, c in _QUINTICS),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
EPS = 1e-7  # least norm to divide by: a gradient may be 0
ADAMW_EPS = 1e-8


class MuonSettings(NamedTuple):
    """What all matrices of an update share."""

    momentum: float  # share of the old momentum that is kept
    decay: float  # factor that multiplies the weights before the step
    dtype: torch.dtype  # type that the orthogonalisation computes in
    steps: Steps


class AdamWSettings(NamedTuple):
    """What all tensors of an update share."""

    lr: float
    betas: tuple[float, float]  # shares of the running means that a step keeps
    weight_decay: float  # per step, as a share of lr
    eps: float
    fused: bool | None  # whether to use PyTorch's fused kernel; None: PyTorch chooses


Tensors = list[Tensor]
MuonUpdate = Callable[[Tensors, Tensors, Tensors, Sequence[float], MuonSettings], None]
AdamWUpdate = Callable[["AdamWTensors", AdamWSettings], None]


class AdamWTensors(NamedTuple):
    """Parameters and their states, in one order; an update changes all but the gradients."""

    weights: Tensors
    gradients: Tensors
    means: Tensors  # running means of the gradients
    squares: Tensors  # running means of the squared gradients
    steps: Tensors  # updates made so far, a scalar each


def muon_update(
    weights: Tensors,
    gradients: Tensors,
    momenta: Tensors,
    lengths: Sequence[float],
    settings: MuonSettings,
) -> None:
    """Update each matrix by one step of Muon, in place.

    Args:
        weights: matrices.
        gradients: they are overwritten.
        momenta: running means of the gradients, updated in place.
        lengths: the step length of each matrix, about the singular values of its update.
        settings: what all matrices share.
    """
    torch._foreach_lerp_(momenta, gradients, 1 - settings.momentum)
    torch._foreach_lerp_(gradients, momenta, settings.momentum)  # Nesterov; in place is faster
    updates = orthogonalize(gradients, settings.dtype, settings.steps)
    torch._foreach_mul_(updates, [-length for length in lengths])
    torch._foreach_mul_(weights, settings.decay)
    torch._foreach_add_(weights, updates)


def adamw_update(tensors: AdamWTensors, settings: AdamWSettings) -> None:
    """Update each tensor by one step of AdamW, in place."""
    beta1, beta2 = settings.betas
    adamw(
        tensors.weights,
        tensors.gradients,
        tensors.means,
        tensors.squares,
        [],
        tensors.steps,
        fused=settings.fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Nesterov momentum, decoupled decay) for matrices, AdamW for the rest.

    ``param_groups[0]`` belongs to Muon and ``param_groups[1]`` to AdamW; each has its own ``lr``.

    Args:
        matrices: parameters of shape (outputs, inputs).
        others: all other parameters.
        matrix_lr: learning rate of `matrices`. The singular values of an update have about this
            size, times sqrt(outputs / inputs) if that is above 1.
        momentum: share of Muon's running mean of the gradient that a step keeps.
        weight_decay: decay of `matrices` per step, as a share of `matrix_lr`.
        lr: learning rate of `others`.
        embedding_decay: decay per step of two-dimensional `others`, as a share of `lr`.
        betas: shares of AdamW's running means that a step keeps: gradient, squared gradient.
        dtype: type that the orthogonalisation computes in; bfloat16 is exact enough.
        fused: whether to run AdamW as one kernel.
        parts: number of equal matrices that a parameter stacks along its first axis; default 1.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        matrix_lr: float,
        momentum: float,
        weight_decay: float,
        lr: float,
        betas: tuple[float, float],
        embedding_decay: float,
        dtype: torch.dtype,
        fused: bool,
        parts: Mapping[Tensor, int],
    ) -> None:
        assert all(matrix.dim() == 2 for matrix in matrices)
        muon = {"lr": matrix_lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype}
        groups = [
            {"params": list(matrices), **muon},
            {"params": list(others), "lr": lr, "betas": betas, "weight_decay": embedding_decay},
        ]
        self.steps, self.parts = POLAR_EXPRESS, parts
        self.muon_update: MuonUpdate = muon_update
        self.adamw_update: AdamWUpdate = adamw_update
        super().__init__(groups, {"fused": fused})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient; the gradients of `matrices` are overwritten.

        As in other PyTorch optimizers, `closure` computes the gradients and the loss to return.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, step in zip(self.param_groups, (self._muon, self._adamw), strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                step(group, params, [p.grad for p in params])
        return loss

    def _muon(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> None:
        buffers = self._states(params, "momentum_buffer", torch.zeros_like)
        counts = [self.parts.get(p, 1) for p in params]
        # The whole parameter sets the factor, even if it stacks several matrices.
        lengths = [group["lr"] * math.sqrt(max(1, _ratio(p))) for p in params]
        settings = MuonSettings(
            momentum=group["momentum"],
            decay=1 - group["lr"] * group["weight_decay"],
            dtype=group["dtype"],
            steps=self.steps,
        )
        if is_shared(params[0]):
            _update_shares(params, grads, buffers, lengths, counts=counts, settings=settings)
            return
        self.muon_update(
            _cut(params, counts),
            _cut(grads, counts),
            _cut(buffers, counts),
            [length for length, n in zip(lengths, counts, strict=True) for _ in range(n)],
            settings,
        )

    def _adamw(self, group: dict[str, Any], params: Tensors, grads: Tensors) -> None:
        fused = group["fused"] or None  # None: PyTorch chooses another
        pairs = list(zip(params, grads, strict=True))
        for is_table, decay in ((True, group["weight_decay"]), (False, 0.0)):
            some = [(p, grad) for p, grad in pairs if (p.dim() == 2) == is_table]
            if not some:
                continue
            weights, gradients = (list(column) for column in zip(*some, strict=True))
            steps = self._states(
                weights, "step", lambda p: torch.zeros((), device=p.device if fused else "cpu")
            )
            means = self._states(weights, "exp_avg", torch.zeros_like)
            squares = self._states(weights, "exp_avg_sq", torch.zeros_like)
            self.adamw_update(
                AdamWTensors(weights, gradients, means, squares, steps),
                AdamWSettings(group["lr"], group["betas"], decay, ADAMW_EPS, fused),
            )

    def _states(self, params: Tensors, name: str, create: Callable[[Tensor], Tensor]) -> Tensors:
        """Return one state tensor of each parameter, created on first use."""
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = create(param)
        return [self.state[param][name] for param in params]


def _cut(matrices: Tensors, counts: Sequence[int]) -> Tensors:
    """Return views of the equal parts of each matrix."""
    return [part for m, count in zip(matrices, counts, strict=True) for part in m.chunk(count)]


def _update_shares(
    weights: Tensors,
    gradients: Tensors,
    momenta: Tensors,
    lengths: Sequence[float],
    *,
    counts: Sequence[int],
    settings: MuonSettings,
) -> None:
    """Compute `muon_update` for matrices that processes share; each stacks a number of them.

    Orthogonalisation needs whole matrices: every process gathers the updates, orthogonalises all of
    them, and applies its share. The momentum stays shared.
    """
    own_gradients, own_momenta = ([own(t) for t in tensors] for tensors in (gradients, momenta))
    torch._foreach_lerp_(own_momenta, own_gradients, 1 - settings.momentum)
    torch._foreach_lerp_(own_gradients, own_momenta, settings.momentum)
    wholes = _cut([whole(gradient) for gradient in gradients], counts)
    updates = iter(orthogonalize(wholes, settings.dtype, settings.steps))
    for weight, length, count in zip(weights, lengths, counts, strict=True):
        update = torch.cat([next(updates) for _ in range(count)])
        share = own(shared_like(update, weight))
        own(weight).mul_(settings.decay).sub_(share, alpha=length)


def orthogonalize(
    matrices: Sequence[Tensor], dtype: torch.dtype, steps: Steps = POLAR_EXPRESS
) -> list[Tensor]:
    """Return about U Vᵀ for each matrix U S Vᵀ; its singular values are not exactly 1: see `Steps`.

    The matrices keep their shapes and dtypes; `dtype` is the type to compute in. Matrices of one
    shape, or of its transpose, are computed together.
    """
    alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        alike[tuple(sorted(matrix.shape))].append(i)
    result = list(matrices)
    for indices in alike.values():
        wide = [matrices[i].T if _ratio(matrices[i]) > 1 else matrices[i] for i in indices]
        x = torch.stack([matrix.to(dtype) for matrix in wide])  # (n, R, C)
        # With a Frobenius norm of 1, no singular value is above 1.
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
        use_gram = dtype.itemsize >= 4 and x.size(1) < x.size(2)
        iterate = newton_schulz_gram if use_gram else newton_schulz
        for i, solved in zip(indices, iterate(x, steps), strict=True):
            tall = _ratio(matrices[i]) > 1
            result[i] = (solved.T.contiguous() if tall else solved).to(matrices[i].dtype)
    return result


def newton_schulz(x: Tensor, steps: Steps) -> Tensor:
    """Move the singular values of each matrix in a stack, (n, R, C), from at most 1 to about 1.

    A step maps X to a X + b (X Xᵀ) X + c (X Xᵀ)² X, which acts on each singular value separately.
    R ≤ C makes the products small.
    """
    for a, b, c in steps:
        gram = x @ x.mT  # (n, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def newton_schulz_gram(x: Tensor, steps: Steps) -> Tensor:
    """Compute `newton_schulz`, for R < C, with R × R products, except the first and the last.

    A step multiplies X from the left by a polynomial P of its Gram matrix G = X Xᵀ, which turns G
    into P G P; all of these commute. For C = 4 R this takes 25 products of R³ instead of 45. It
    needs fp32: bf16 may round a small eigenvalue to a negative one, which then grows.
    """
    gram = x @ x.mT  # (n, R, R)
    (a, b, c), *rest = steps
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a
    product = polynomial + a * torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    for next_a, b, c in rest:
        gram = torch.baddbmm(gram, polynomial, gram, beta=a)  # P G
        gram = torch.baddbmm(gram, polynomial, gram, beta=a)  # P P G
        a = next_a
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, polynomial, product, beta=a)
    return product @ x


def _ratio(matrix: Tensor) -> float:
    """Return rows per column."""
    return matrix.size(0) / matrix.size(1)
