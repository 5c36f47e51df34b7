"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

Muon replaces the momentum of a matrix by the nearest matrix with singular values of about 1, so
that a step moves every direction by the same amount: Jordan et al. 2024, "Muon: an optimizer for
hidden layers in neural networks"; Liu et al. 2025, "Muon is scalable for LLM training". The update
is that of `torch.optim.Muon`, with a sharper iteration by default; and matrices of one shape are
orthogonalised together, which for small models is what makes it affordable.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Steps of the iteration x -> a x + b x³ + c x⁵ that takes singular values in (0, 1] to about 1.
Steps = tuple[tuple[float, float, float], ...]
# One quintic, five times: 0.7 to 1.2, from 0.015 on. What torch.optim.Muon does.
JORDAN: Steps = ((3.4445, -4.7750, 2.0315),) * 5
# The best quintic for what each step is given: 0.88 to 1.13, from 0.004 on (Amsel et al. 2025, "The
# Polar Express"). The first is for
# x / 1.02, since rounding may leave a value above 1, where it is steep.
POLAR_EXPRESS: Steps = (
    (8.28721201814563 / 1.02, -23.595886519098837 / 1.02**3, 17.300387312530933 / 1.02**5),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
EPS = 1e-7  # of the norm, against a gradient of zeros
ADAMW_EPS = 1e-8


class MuonSettings(NamedTuple):
    """What an update of matrices depends on besides them."""

    momentum: float
    decay: float
    """Factor of the weights."""
    dtype: torch.dtype
    """Of the orthogonalisation."""
    steps: Steps
    """Of the orthogonalisation."""


Tensors = list[Tensor]
MuonUpdate = Callable[[Tensors, Tensors, Tensors, Sequence[float], MuonSettings], None]


def muon_update(
    weights: Tensors,
    gradients: Tensors,
    momenta: Tensors,
    lengths: Sequence[float],
    settings: MuonSettings,
) -> None:
    """Make one step of Muon with each matrix, in place.

    Args:
        weights: of two axes each.
        gradients: used up.
        momenta: running means of the gradients.
        lengths: of the step of each, about the singular values of the update.
        settings: see there.
    """
    momentum = settings.momentum
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    torch._foreach_lerp_(gradients, momenta, momentum)  # Nesterov's; in place: memory is slow
    updates = orthogonalize(gradients, settings.dtype, settings.steps)
    torch._foreach_mul_(updates, [-length for length in lengths])
    torch._foreach_mul_(weights, settings.decay)
    torch._foreach_add_(weights, updates)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Nesterov momentum, decoupled decay) for matrices, AdamW for the rest.

    ``param_groups[0]`` is Muon's, ``param_groups[1]`` is AdamW's; each has its own ``lr``.

    Args:
        matrices: parameters of two axes, (outputs, inputs) each.
        others: all other parameters.
        matrix_lr: learning rate of `matrices`; an update is a matrix with singular values of about
            this size, times sqrt(outputs / inputs) where that is above 1.
        momentum: Muon's memory of the gradient.
        weight_decay: of `matrices`, as a share of `matrix_lr` a step.
        lr: learning rate of `others`.
        embedding_decay: of those of `others` that have two axes, as a share of `lr` a step.
        betas: AdamW's memory of the gradient and of its square.
        dtype: of the orthogonalisation; bfloat16 is enough wherever it is fast.
        fused: run AdamW as one kernel.
        steps: of the orthogonalisation.
        parts: how many matrices of equal size a matrix is, one above the other; 1 if not named.
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
        embedding_decay: float = 0.0,
        dtype: torch.dtype,
        fused: bool,
        steps: Steps = POLAR_EXPRESS,
        parts: Mapping[Tensor, int] | None = None,
    ) -> None:
        assert all(matrix.dim() == 2 for matrix in matrices)
        muon = {"lr": matrix_lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype}
        groups = [
            {"params": list(matrices), **muon},
            {"params": list(others), "lr": lr, "betas": betas, "weight_decay": embedding_decay},
        ]
        self.steps = steps
        self.parts: dict[Tensor, int] = dict(parts or {})
        self.update: MuonUpdate = muon_update
        super().__init__(groups, {"fused": fused})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the gradients of `matrices` are used up.

        Args:
            closure: computes the loss anew, as for any optimizer of PyTorch.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon, rest = self.param_groups
        self._step_matrices(muon)
        self._step_others(rest)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        params, grads = _with_gradient(group)
        if not params:
            return
        buffers = [self._momentum_of(p) for p in params]
        counts = [self.parts.get(p, 1) for p in params]
        # The factor is the whole matrix's, cut or not.
        lengths = [group["lr"] * math.sqrt(max(1, _ratio(p))) for p in params]
        self.update(
            _cut(params, counts),
            _cut(grads, counts),
            _cut(buffers, counts),
            [length for length, n in zip(lengths, counts, strict=True) for _ in range(n)],
            MuonSettings(
                momentum=group["momentum"],
                decay=1 - group["lr"] * group["weight_decay"],
                dtype=group["dtype"],
                steps=self.steps,
            ),
        )

    def _momentum_of(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _step_others(self, group: dict[str, Any]) -> None:
        params, grads = _with_gradient(group)
        if not params:
            return
        tables = [p for p in params if p.dim() == 2]
        if tables:
            torch._foreach_mul_(tables, 1 - group["lr"] * group["weight_decay"])
        states = [self._moments_of(p, group["fused"]) for p in params]
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"] or None,  # None: PyTorch chooses among the others
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=ADAMW_EPS,
            maximize=False,
        )

    def _moments_of(self, param: Tensor, fused: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def _cut(matrices: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Return views of the parts of each matrix."""
    pairs = zip(matrices, counts, strict=True)
    return [part for matrix, count in pairs for part in matrix.chunk(count)]


def orthogonalize(
    matrices: Sequence[Tensor], dtype: torch.dtype, steps: Steps = POLAR_EXPRESS
) -> list[Tensor]:
    """Return U V' for each matrix U S V', with singular values not quite 1: see `Steps`.

    Matrices of one shape, or of its transpose, go through the iteration together.

    Args:
        matrices: of two axes each.
        dtype: to compute in.
        steps: of the iteration.

    Returns:
        Matrices of the shapes and dtypes given.
    """
    alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        alike[tuple(sorted(matrix.shape))].append(i)
    result = list(matrices)
    for indices in alike.values():
        stack = torch.stack([_flip_if_tall(matrices[i]).to(dtype) for i in indices])  # (n, R, C)
        through_gram = dtype.itemsize >= 4 and stack.size(1) < stack.size(2)
        iterate = newton_schulz_gram if through_gram else newton_schulz
        solved = iterate(_normalize(stack), steps)
        for i, wide in zip(indices, solved, strict=True):
            tall = _ratio(matrices[i]) > 1
            result[i] = (wide.T.contiguous() if tall else wide).to(matrices[i].dtype)
    return result


def newton_schulz(x: Tensor, steps: Steps) -> Tensor:
    """Take the singular values of each matrix in a stack to about 1.

    A step maps X to a X + b (X X') X + c (X X')² X, which acts on each singular value alone.

    Args:
        x: (n, R, C), singular values at most 1; best with R ≤ C, which makes products small.
        steps: a, b and c of each step.

    Returns:
        (n, R, C), in the dtype of `x`.
    """
    for a, b, c in steps:
        gram = x @ x.mT  # (n, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def newton_schulz_gram(x: Tensor, steps: Steps) -> Tensor:
    """Do what `newton_schulz` does with products of R × R matrices alone, but for two.

    Every step multiplies X from the left by a polynomial P of its Gram matrix G = X X', and so
    makes G into P G P; all these commute. For C = 4 R that is 25 products of R³ in place of 45. It
    takes fp32: what bf16 leaves of a small eigenvalue may be negative, and grows.

    Args:
        x: (n, R, C), R < C, singular values at most 1.
        steps: a, b and c of each step.

    Returns:
        (n, R, C), in the dtype of `x`.
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


def _normalize(x: Tensor) -> Tensor:
    """Return a stack whose matrices have Frobenius norm 1: no singular value is above 1."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (n, 1, 1)
    return x / norm.clamp(min=EPS)


def _flip_if_tall(matrix: Tensor) -> Tensor:
    return matrix.T if _ratio(matrix) > 1 else matrix


def _with_gradient(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]


def _ratio(matrix: Tensor) -> float:
    """Return rows per column."""
    return matrix.size(0) / matrix.size(1)
