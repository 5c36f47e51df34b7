"""The kernels against formulas in float64: values, every gradient, dropout, and lack of memory.

The kernels run as compiled for this processor (fp32, and bf16 if it supports it), for AVX2, and
without vector extensions: other widths of vectors have other tiles and other remainders.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import COMPILERS, VARIANTS, kernels_of

from chargpt.compute import native
from chargpt.compute.muon import MuonSettings
from chargpt.compute.native import Kernels, load_kernels

if not COMPILERS:
    pytest.skip("no C++ compiler here", allow_module_level=True)

FP32, BF16 = torch.float32, torch.bfloat16


class Setting(NamedTuple):
    """A compiled variant of the kernels and the value type to run them with."""

    kernels: Kernels
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", BF16, enabled=self.dtype == BF16)


SETTINGS = [f"{name}-fp32" for name in VARIANTS]
SETTINGS += [f"{name}-bf16" for name in ("avx512bf16", "amx", "neonbf16")]


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    variant, precision = request.param.split("-")
    dtype = {"fp32": FP32, "bf16": BF16}[precision]
    kernels = kernels_of(variant)
    assert (BF16 in kernels.dtypes) == any(f"{variant}-bf16" == name for name in SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_kernels", lambda: kernels)
        yield Setting(kernels, dtype)


# --- the comparison


def noise(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    """Return standard normal values that bf16 represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(BF16).to(dtype)


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype, what: str) -> None:
    """Compare with float64.

    fp32: the largest error is below 1e-5 of the largest value, about a hundred roundings of 2^-24.

    bf16: a rounding errs by at most u = 2^-8 of the value, by u / √3 in root mean square at worst.
    A result is a rounded sum of products of two factors that were each rounded once or twice: five
    roundings, √5 u / √3 = 1.3 u of a typical value. The test allows twice that in root mean square,
    and four times as much for a single value among thousands.
    """
    assert ours.shape == exact.shape, what
    if exact.numel() == 0:
        return
    error = (ours.detach().double() - exact.detach()).abs()
    if dtype == FP32:
        assert error.max() <= 1e-5 * max(1e-3, exact.abs().max()), what
    else:
        bound = 2 * 1.3 * 2**-8 * exact.square().mean().sqrt()
        assert error.square().mean().sqrt() <= bound, what
        assert error.max() <= 4 * max(bound, 2**-8 * exact.abs().max()), what


def compare(
    setting: Setting,
    kernel: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    **inputs: Tensor | None,
) -> None:
    """Compare a kernel's output and the gradient of every input with those of a formula."""
    ours = {n: None if x is None else x.clone().requires_grad_() for n, x in inputs.items()}
    exact = {n: None if x is None else x.double().requires_grad_() for n, x in inputs.items()}
    with setting.autocast():
        out = kernel(**ours)
    expected = formula(**exact)
    upstream = noise(*out.shape, seed=99)
    out.backward(upstream.to(out.dtype))
    expected.backward(upstream.double())
    assert_close(out, expected, setting.dtype, "output")
    for name, leaf in ours.items():
        if leaf is not None:
            assert_close(leaf.grad, exact[name].grad, setting.dtype, name)


# --- the formulas


def attention_formula(n_head: int, scaled_mask: Tensor | None = None) -> Callable[..., Tensor]:
    """Return attention whose weights are multiplied by `scaled_mask`, (B, H, T, T)."""

    def formula(qkv: Tensor) -> Tensor:
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        q, k, v = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(C // n_head)
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        if scaled_mask is not None:
            weights = weights * scaled_mask
        return (weights @ v).transpose(1, 2).reshape(B, T, C)

    return formula


def linear_formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.t()
    return y if bias is None else y + bias


def feed_forward_formula(
    x: Tensor, expand: Tensor, expand_bias: Tensor | None, project: Tensor, bias: Tensor | None
) -> Tensor:
    h = linear_formula(x, expand, expand_bias)
    h = 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
    return linear_formula(h, project, bias)


def layer_norm_formula(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    return y if bias is None else y + bias


def attend(n_head: int, p: float = 0.0) -> Callable[..., Tensor]:
    return lambda qkv: native.attention(qkv, n_head, p)


def norm(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    return native.layer_norm(x, gain, bias, 1e-5)


def add(x: Tensor, update: Tensor) -> Tensor:
    return native.residual_sum(x, update, 0.0)


def cases(
    tokens: tuple[int, ...], c: int, f: int, bias: bool = True, dtype: torch.dtype = FP32
) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]]:
    """Return kernel, formula and inputs by name; `tokens` is the shape without the last axis."""
    x, expand = noise(*tokens, c, seed=1), noise(f, c, seed=2) / c**0.5
    long, short = (noise(n, seed=3) if bias else None for n in (f, c))
    project, update = noise(c, f, seed=4) / f**0.5, noise(*tokens, c, seed=5, dtype=dtype)
    wide = {"expand": expand, "expand_bias": long, "project": project, "bias": short}
    norms = {"x": 2 * x + 1, "gain": noise(c, seed=6), "bias": short}
    return {
        "linear": (native.linear, linear_formula, {"x": x, "weight": expand, "bias": long}),
        "feed_forward": (native.feed_forward, feed_forward_formula, {"x": x} | wide),
        "layer_norm": (norm, layer_norm_formula, norms),
        "residual": (add, lambda x, update: x + update, {"x": x, "update": update}),
    }


# --- values and gradients


sizes = st.integers(1, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=sizes, time=st.integers(1, 70), n_head=sizes, lanes=sizes, f=sizes, bias=st.booleans())
@example(batch=1, time=1, n_head=1, lanes=1, f=3, bias=True)
@example(batch=2, time=64, n_head=1, lanes=4, f=1, bias=True)
@example(batch=1, time=130, n_head=2, lanes=2, f=8, bias=True)  # more rows than in a block
@example(batch=2, time=129, n_head=1, lanes=3, f=2, bias=False)
@example(batch=1, time=203, n_head=1, lanes=4, f=5, bias=True)
def test_values_and_gradients(
    setting: Setting, batch: int, time: int, n_head: int, lanes: int, f: int, bias: bool
) -> None:
    """Every kernel, with widths of any whole number of vectors."""
    c, f = n_head * lanes * native.LANES, f * native.LANES
    qkv = noise(batch, time, 3 * c, seed=time, dtype=setting.dtype)
    compare(setting, attend(n_head), attention_formula(n_head), qkv=qkv)
    for name, (kernel, formula, inputs) in cases((batch, time), c, f, bias, setting.dtype).items():
        if name == "layer_norm" and c <= 4:
            continue  # its values may be nearly equal; then a LayerNorm amplifies their noise
        compare(setting, kernel, formula, **inputs)


def test_sharp_attention(setting: Setting) -> None:
    """Scores of tens and hundreds, like those of heads that attend to a single position."""
    qkv = noise(2, 70, 3 * 64, seed=1)
    qkv[..., :64] *= 32
    compare(setting, attend(2), attention_formula(2), qkv=qkv.to(setting.dtype))


def test_the_exponential_is_exact_to_a_few_millionths(setting: Setting) -> None:
    """With scores x and 0, the first key's weight is e^x times the second's."""
    x = torch.linspace(-80, 80, 999).to(BF16)
    qkv = torch.zeros(len(x), 2, 3, 16, dtype=setting.dtype)
    qkv[:, 1, 0, 0] = x.to(setting.dtype)
    qkv[:, 0, 1, 0] = 4  # × x / √16
    qkv[:, 0, 2, 0] = qkv[:, 1, 2, 1] = 1
    weights = native.attention(qkv.flatten(2), 1, 0.0)[:, 1].double()
    error = weights[:, 0] / weights[:, 1] / x.double().exp() - 1
    # fp32: the polynomial's error (2.4e-6) and some roundings; bf16: a weight is rounded twice.
    assert error.abs().max() < (4e-6 if setting.dtype == FP32 else 4 * 2**-8)


def test_feed_forward_of_large_values(setting: Setting) -> None:
    """GELU of large values, where its exponential would overflow, is 0 or the identity."""
    arguments = cases((9,), 32, 64)["feed_forward"][2]
    signs = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1, 1]).view(9, 1)
    arguments["x"] = 1024 * signs.expand(9, 32)
    arguments["expand"] = noise(64, 32, seed=2).abs()  # far from 0 on both sides
    compare(setting, native.feed_forward, feed_forward_formula, **arguments)


def test_layer_norm_far_from_zero(setting: Setting) -> None:
    """E[x²] - E[x]² in float would lose the variance of values around 1000."""
    arguments = cases((7,), 64, 16)["layer_norm"][2]
    arguments["x"] += 1024
    with setting.autocast():
        out = norm(**arguments)
    exact = layer_norm_formula(**{name: value.double() for name, value in arguments.items()})
    assert (out.double() - exact).abs().max() < (1e-3 if setting.dtype == FP32 else 0.05)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_share_the_work(set_threads: Callable[[int], None], threads: int) -> None:
    """Each thread has its own rows or heads; the weights' gradients are sums over all threads."""
    setting = Setting(load_kernels(), FP32)
    set_threads(threads)
    compare(setting, attend(3), attention_formula(3), qkv=noise(2, 70, 3 * 48, seed=1))
    for n in (1, 129, 500):
        for kernel, formula, inputs in cases((n,), 32, 48).values():
            compare(setting, kernel, formula, **inputs)


def test_gradients_have_the_same_bits_on_any_number_of_threads(
    setting: Setting, set_threads: Callable[[int], None]
) -> None:
    """With 3,000 rows, the number of threads cuts a weight's gradient in several places."""
    x, weight, up = noise(3000, 48, seed=1), noise(64, 48, seed=2), noise(3000, 64, seed=3)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    results = []
    for threads in (1, 4, 5, 7):
        set_threads(threads)
        with setting.autocast():
            out = native.linear(x, weight, None)
        results.append(torch.autograd.grad(out, (x, weight), up.to(out.dtype)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_types_of_results(setting: Setting) -> None:
    """Inputs of products have the type of products; the residual stream stays float."""
    x, weight = noise(3, 16, seed=1), noise(16, 16, seed=2)
    with setting.autocast():
        assert native.linear(x, weight, None).dtype == setting.dtype
        assert native.feed_forward(x, weight, None, weight, None).dtype == setting.dtype
        assert native.layer_norm(x, weight[0], None, 1e-5).dtype == setting.dtype
        assert native.residual_sum(x, x.to(setting.dtype), 0.0).dtype == FP32
        assert native.residual_sum(x, x, 0.0).dtype == FP32  # a float update under autocast


# --- tensors that are not contiguous


def test_any_strides(setting: Setting) -> None:
    """Inputs, weights and upstream gradients may be transposed, sliced or expanded."""
    T, c = 9, 32
    transposed = noise(c, T, 2, seed=1).permute(2, 1, 0)  # (2, T, c)
    sliced = noise(2, 2 * T, 3 * c + 1, seed=2)[:, ::2, 1:]  # (2, T, 3c)
    weight, vector = noise(c, c, seed=3).t() / c**0.5, noise(c, 2, seed=8)[:, 0]
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (attend(2), [sliced.to(setting.dtype)]),
        (native.linear, [transposed, weight, vector]),
        (native.feed_forward, [transposed, weight, vector, weight, vector]),
        (norm, [transposed, vector, vector]),
        (add, [transposed, transposed.flip(0).to(setting.dtype)]),
        (add, [transposed, noise(1, 1, c, seed=4, dtype=setting.dtype).expand(2, T, c)]),
    ]
    upstreams = [
        torch.tensor(0.5).expand(2, T, c),
        noise(c, seed=5).expand(2, T, c),
        noise(T, 2, c, seed=6).transpose(0, 1),
    ]
    for kernel, tensors in calls:
        for upstream in upstreams:
            results = []
            for copy in (lambda x: x.detach(), lambda x: x.detach().contiguous()):
                leaves = [copy(x).requires_grad_() for x in tensors]
                with setting.autocast():
                    out = kernel(*leaves)
                gradients = torch.autograd.grad(out, leaves, copy(upstream).to(out.dtype))
                results.append((out, *gradients))
            for ours, expected in zip(*results, strict=True):
                torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# --- NaN


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("time", [5, 70])
def test_nan_in_attention_reaches_what_sees_it(setting: Setting, part: str, time: int) -> None:
    """It reaches no other head and no other sequence."""
    at, head_size = time // 2, 16
    column = {"query": 0, "key": 1, "value": 2}[part] * 2 * head_size + 3  # in the first head
    qkv = noise(2, time, 6 * head_size, seed=1, dtype=setting.dtype)
    qkv[1, at, column] = math.nan
    qkv.requires_grad_()
    out = native.attention(qkv, 2, 0.0)
    first_head = out[1, :, :head_size]
    sees_it = {"query": first_head[at], "key": first_head[at:], "value": first_head[at:, 3]}[part]
    assert sees_it.isnan().all()
    assert not any(other.isnan().any() for other in (out[0], out[1, :, head_size:]))
    out.float().sum().backward()
    assert [gradient.isnan().any().item() for gradient in qkv.grad] == [False, True]


def test_nan_upstream_of_attention_reaches_the_gradients(setting: Setting) -> None:
    T, at = 40, 35
    qkv = noise(1, T, 3 * 16, seed=1, dtype=setting.dtype).requires_grad_()
    upstream = torch.zeros(1, T, 16, dtype=setting.dtype)
    upstream[0, at] = math.nan
    native.attention(qkv, 1, 0.0).backward(upstream)
    d_q, d_k, d_v = qkv.grad[0].split(16, dim=-1)
    assert d_q[at].isnan().all()
    assert d_k[: at + 1].isnan().all()
    assert d_v[: at + 1].isnan().all()


def test_nan_spreads_as_in_the_formulas(setting: Setting) -> None:
    """With NaN in each input and in the upstream gradient."""
    for kernel, formula, inputs in cases((3, 3), 32, 48, dtype=setting.dtype).values():
        for poisoned in (*inputs, "upstream"):
            ours = {name: x.clone() for name, x in inputs.items()}
            if poisoned != "upstream":
                ours[poisoned].flatten()[-5] = math.nan
            exact = {name: x.double().requires_grad_() for name, x in ours.items()}
            ours = {name: x.requires_grad_() for name, x in ours.items()}
            with setting.autocast():
                out = kernel(**ours)
            expected = formula(**exact)
            upstream = noise(*out.shape, seed=9)
            if poisoned == "upstream":
                upstream.flatten()[7] = math.nan
            d_ours = torch.autograd.grad(out, list(ours.values()), upstream.to(out.dtype))
            d_exact = torch.autograd.grad(expected, list(exact.values()), upstream.double())
            for x, y in zip((out, *d_ours), (expected, *d_exact), strict=True):
                assert torch.equal(x.isnan(), y.isnan()), (kernel, poisoned)


# --- causality


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_position_changes_no_output_before_it(setting: Setting, p: float) -> None:
    T = 69
    qkv = noise(2, T, 3 * 32, seed=1, dtype=setting.dtype)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return native.attention(x, 2, p)

    out = run(qkv)
    for changed in (0, 1, 15, 31, 32, 33, 64, 68):
        other = qkv.clone()
        other[:, changed] = noise(2, 3 * 32, seed=changed, dtype=setting.dtype)
        new = run(other)
        assert torch.equal(new[:, :changed], out[:, :changed])
        assert not torch.equal(new[:, changed], out[:, changed])


def test_later_positions_have_a_weight_of_exactly_zero(setting: Setting) -> None:
    """With values of 1e30, even a weight of e^-87 would show, in outputs and in gradients."""
    T, at = 40, 20
    qkv = noise(1, T, 3 * 16, seed=1, dtype=setting.dtype)
    qkv[:, :at, 32:] = 0
    qkv[:, at:, 32:] = 1e30
    qkv.requires_grad_()
    out = native.attention(qkv, 1, 0.0)
    assert (out[:, at:] > 1e20).all()
    assert (out[:, :at] == 0).all()
    (gradient,) = torch.autograd.grad(out[:, :at].float().sum(), qkv)
    assert (gradient[:, at:] == 0).all()


def test_huge_scores_stay_causal(setting: Setting) -> None:
    """Scores far below those of trained models must not be mistaken for masked ones."""
    T = 40
    qkv = noise(1, T, 3 * 16, seed=1)
    qkv[..., :16], qkv[..., 16:32] = 128.0, -128.0  # scores of -2^16
    out = native.attention(qkv.to(setting.dtype), 1, 0.0)
    assert_close(out, attention_formula(1)(qkv.double()), setting.dtype, "output")


# --- dropout in attention


def attention_mask(setting: Setting, n_head: int, p: float, seed: int, *shape: int) -> Tensor:
    """Return the factor of each attention weight, (B, H, T, T), computed from the output.

    With queries of 0, a row has equal weights. With columns of the identity as values, position t
    returns mask[t] / (t + 1); each pass reads as many columns as a head is wide.
    """
    (B, T), head_size, columns = shape, 16, []
    for first in range(0, T, head_size):
        qkv = torch.zeros(B, T, 3, n_head, head_size, dtype=setting.dtype)
        for j in range(min(head_size, T - first)):
            qkv[:, first + j, 2, :, j] = 1
        torch.manual_seed(seed)
        out = native.attention(qkv.flatten(2), n_head, p)
        columns.append(out.view(B, T, n_head, head_size).transpose(1, 2))
    shares = torch.cat(columns, dim=-1)[..., :T].double()
    return (shares * torch.arange(1, T + 1).view(-1, 1)).tril()


def visible(mask: Tensor) -> Tensor:
    """Return the entries on and below the diagonal of each head's mask, (B × H, n)."""
    T = mask.size(-1)
    return mask.flatten(0, 1)[:, torch.ones(T, T, dtype=torch.bool).tril()]


def assert_rate(kept: Tensor, p: float) -> None:
    """Allow five standard deviations: a false alarm is a chance of one in two million."""
    rate = kept.double().mean().item()
    assert abs(rate - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_attention_drops_weights_at_the_given_rate(setting: Setting, p: float) -> None:
    values = visible(attention_mask(setting, 3, p, 1, 2, 67))
    assert_rate(values != 0, p)
    scale = values[values != 0]
    tolerance = 1e-5 if setting.dtype == FP32 else 2 * 2**-8  # a weight and the output are rounded
    assert ((scale * (1 - p) - 1).abs() <= tolerance).all()


def test_heads_sequences_and_seeds_drop_independently(setting: Setting) -> None:
    p = 0.3
    kept = visible(attention_mask(setting, 3, p, 1, 2, 67)) != 0
    alike = p**2 + (1 - p) ** 2
    n = kept.size(1)
    for i in range(len(kept)):
        assert_rate(kept[i], p)
        for j in range(i):
            agreement = (kept[i] == kept[j]).double().mean().item()
            assert abs(agreement - alike) < 5 * math.sqrt(alike * (1 - alike) / n)
    assert torch.equal(visible(attention_mask(setting, 3, p, 1, 2, 67)) != 0, kept)
    other_seed = visible(attention_mask(setting, 3, p, 2, 2, 67)) != 0
    agreement = (kept == other_seed).double().mean().item()
    assert abs(agreement - alike) < 5 * math.sqrt(alike * (1 - alike) / kept.numel())
    rows = kept.double()  # neighbours are uncorrelated, within a head and between heads
    centred = (rows - rows.mean()).flatten()
    for lag in (1, 2, 4, 8, 16, 67, 68):
        correlation = (centred[lag:] * centred[:-lag]).mean() / (p * (1 - p))
        assert abs(correlation.item()) < 5 / math.sqrt(len(centred))


@pytest.mark.parametrize(("batch", "time", "n_head", "p"), [(2, 33, 2, 0.2), (1, 130, 1, 0.5)])
def test_backward_drops_the_weights_that_forward_dropped(
    setting: Setting, batch: int, time: int, n_head: int, p: float
) -> None:
    kept = attention_mask(setting, n_head, p, 5, batch, time) != 0
    formula = attention_formula(n_head, kept.double() / (1 - p))
    qkv = noise(batch, time, 48 * n_head, seed=1, dtype=setting.dtype)
    torch.manual_seed(5)  # `compare` calls the kernel once
    compare(setting, attend(n_head, p), formula, qkv=qkv)


# --- dropout in the residual sum


def scaled_mask(n: int, p: float, seed: int) -> npt.NDArray[np.float32]:
    """Return `n` factors of ``Dropout`` in ``dropout.h``, stream 0, by a second implementation.

    It compares 31 bits of Wellons' lowbias32(index × golden ratio + key) with p × 2^31. numpy's
    unsigned integers wrap around like C's.
    """
    key = np.uint32((seed * 0x9E3779B97F4A7C15 >> 32) & 0xFFFFFFFF)
    x = np.arange(n, dtype=np.uint32) * np.uint32(0x9E3779B9) + key
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    keep = (x >> np.uint32(1)) >= round(p * 2**31)
    return np.where(keep, np.float32(1) / (np.float32(1) - np.float32(p)), np.float32(0))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_mask_is_the_hash_of_torchs_next_random_number(setting: Setting, p: float) -> None:
    """Bit by bit, for every vector width, forward and backward; a second mask is another one."""
    torch.manual_seed(4)
    seeds = [int(torch.randint(2**62, ())) for _ in range(2)]
    torch.manual_seed(4)
    for seed in seeds:
        expected = torch.from_numpy(scaled_mask(333 * 48, p, seed)).view(333, 48)
        x = noise(333, 48, seed=1).requires_grad_()
        update = torch.ones(333, 48, dtype=setting.dtype, requires_grad=True)
        out = native.residual_sum(x, update, p)
        assert torch.equal(out, x + expected)
        d_x, d_update = torch.autograd.grad(out.sum(), (x, update))
        assert (d_x == 1).all()
        assert torch.equal(d_update, expected.to(setting.dtype))


def residual_mask(n: int, p: float, setting: Setting) -> Tensor:
    return native.residual_sum(torch.zeros(n), torch.ones(n, dtype=setting.dtype), p)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_neighbours_in_a_mask_are_uncorrelated(p: float) -> None:
    n = 1 << 18
    kept = torch.from_numpy(scaled_mask(n, p, 5)) != 0
    assert_rate(kept, p)
    centred = (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))
    for lag in (*range(1, 17), 32, 64, 128, 4096):
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) < 5 / math.sqrt(n - lag), lag


def test_without_dropout_the_generator_keeps_its_state(setting: Setting) -> None:
    state = torch.get_rng_state()
    residual_mask(16, 0.0, setting)
    native.attention(torch.zeros(1, 3, 48, dtype=setting.dtype), 1, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    residual_mask(16, 0.5, setting)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_p_near_one_gives_finite_values(setting: Setting) -> None:
    assert residual_mask(1 << 16, 1 - 1e-7, setting).isfinite().all()


# --- Muon


@pytest.mark.parametrize(
    "sizes", [[(16, 16)], [(16, 48), (48, 16)], [(80, 48), (96, 96), (80, 48)]]
)
def test_muon_update(setting: Setting, sizes: list[tuple[int, int]]) -> None:
    """An update maps each singular value by the polynomials and keeps the directions."""
    steps = ((3.4445, -4.7750, 2.0315), (2.3, -1.7, 0.42), (1.875, -1.25, 0.375))
    settings_ = MuonSettings(momentum=0.9, decay=0.75, dtype=setting.dtype, steps=steps)
    weights, gradients, momenta = (
        [noise(*size, seed=10 * kind + i) for i, size in enumerate(sizes)] for kind in range(3)
    )
    lengths = [0.5 + i for i in range(len(sizes))]
    everything = zip(weights, gradients, momenta, lengths, strict=True)
    exact = [by_definition(*(t.double() for t in ts), n, settings_) for *ts, n in everything]
    untouched = [gradient.clone() for gradient in gradients]
    native.muon_update(weights, gradients, momenta, lengths, settings_)
    for i, (weight, momentum) in enumerate(exact):
        assert torch.equal(gradients[i], untouched[i])
        torch.testing.assert_close(momenta[i].double(), momentum, rtol=0, atol=1e-6)
        error = (weights[i].double() - weight).square().mean().sqrt() / lengths[i]
        # An entry of the direction is about 1 / sqrt(the larger side). A step of the iteration
        # enlarges the rounding errors of the step before, 8 bits in bf16, by up to 3.4.
        size = max(sizes[i]) ** -0.5
        assert error < size * (1e-5 if setting.dtype == FP32 else 4 * 3.4 * 2**-8)
    gradients[0][0, 0] = math.nan
    native.muon_update(weights, gradients, momenta, lengths, settings_)
    assert weights[0].isnan().any()
    assert not any(weight.isnan().any() for weight in weights[1:])


def by_definition(
    weight: Tensor, gradient: Tensor, momentum: Tensor, length: float, settings_: MuonSettings
) -> tuple[Tensor, Tensor]:
    """Return a weight and its momentum after a step, from a singular value decomposition."""
    keep = settings_.momentum
    momentum = keep * momentum + (1 - keep) * gradient
    ahead = keep * momentum + (1 - keep) * gradient
    u, values, v = torch.linalg.svd(ahead / ahead.norm(), full_matrices=False)
    for a, b, c in settings_.steps:
        values = a * values + b * values**3 + c * values**5
    return settings_.decay * weight - length * (u * values) @ v, momentum


# --- which tensors the kernels support


def test_supports(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = native.LANES
    x = torch.zeros(2, lanes)
    assert native.supports(x, widths=(lanes, 3 * lanes))
    assert not native.supports(x, widths=(lanes, lanes + 1))
    for dtype in (torch.float64, torch.float16):
        assert not native.supports(x.to(dtype), widths=(lanes,))
        assert not native.supports(x, x.to(dtype), widths=(lanes,))
    assert native.supports(x.to(BF16), widths=(lanes,)) == (BF16 in setting.kernels.dtypes)
    assert not native.supports(x, torch.zeros(1, device="meta"), widths=(lanes,))
    with torch.autocast("cpu", torch.float16):
        assert not native.supports(x, widths=(lanes,))
    with torch.autocast("cpu", BF16):
        assert native.supports(x, widths=(lanes,)) == (BF16 in setting.kernels.dtypes)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not native.supports(x, widths=(lanes,))


# --- out of memory


def test_a_kernel_without_memory_raises_memory_error_and_works_again(
    monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    """Each allocation of each kernel fails once, on two threads; no exception ends the process."""
    kernels = kernels_of("failing")
    c, settings_ = 48, MuonSettings(momentum=0.9, decay=0.75, dtype=FP32, steps=((2.3, -1.7, 0.4),))
    weight, tall, momentum = noise(c, c, seed=2), noise(96, c, seed=3), noise(96, c, seed=4)

    def muon(gradient: Tensor) -> Tensor:
        updated = tall.clone()
        native.muon_update([updated], [gradient], [momentum.clone()], [0.5], settings_)
        return updated

    calls: list[tuple[Callable[..., Tensor], Tensor]] = [
        (attend(3), noise(2, 70, 3 * c, seed=6)),
        (lambda x: native.linear(x, weight, weight[0]), noise(300, c, seed=1)),
        (lambda x: native.feed_forward(x, weight, None, weight, None), noise(9, c, seed=1)),
        (lambda x: norm(x, weight[0], weight[1]), noise(300, c, seed=1)),
        (muon, noise(96, c, seed=5)),
    ]
    set_threads(2)
    monkeypatch.setattr(native, "load_kernels", lambda: kernels)
    for kernel, x in calls:
        leaf = x.requires_grad_(kernel is not muon)
        expected = forward_and_backward(kernel, leaf)
        failures, results = 0, None
        while results is None:
            kernels.library.fail_allocation(failures)
            try:
                results = forward_and_backward(kernel, leaf)
            except MemoryError:
                failures += 1
        kernels.library.fail_allocation(-1)
        assert failures > 0
        for result, before in zip(results, expected, strict=True):
            assert torch.equal(result, before)


def forward_and_backward(kernel: Callable[..., Tensor], leaf: Tensor) -> list[Tensor]:
    out = kernel(leaf)
    return [out, *torch.autograd.grad(out.sum(), leaf)] if leaf.requires_grad else [out]
