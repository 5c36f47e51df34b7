"""The training loop: learning, resuming, ending, and numerical failures."""

import signal
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, count, pairwise, repeat
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUICK, SMALL
from safetensors.torch import load_file
from torch import Tensor

import chargpt
from chargpt import train as training
from chargpt.base.errors import TrainingError
from chargpt.compute.optimizers import schedule
from chargpt.config import DataConfig, GPT2Config
from chargpt.runs.checkpoint import read_state
from chargpt.runs.report import Reporter, read_metrics
from chargpt.runs.weights import model_tensors
from chargpt.train import NonFiniteError, TrainResult, fit, train, train_step
from chargpt.training import speed
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing loss.png takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_loss", lambda _: None)
        yield


def trainer_for(
    text_file: Path, out: Path, model_config: GPT2Config = SMALL, **changes: Any
) -> Trainer:
    """Return a trainer before its first step; `changes` are fields of TrainConfig."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    configs = {"train_config": QUICK.replace(**changes), "data_config": DataConfig()}
    plan = make_plan(
        [str(text_file)], model_config=model_config, **configs, out=out, resuming=False
    )
    return plan.trainer


def train_with(text_file: Path, out: Path, resume: bool = False, **changes: Any) -> TrainResult:
    """Train a small model; `changes` are fields of TrainConfig."""
    options = {"train_config": QUICK.replace(**changes), "out": out, "resume": resume}
    return train(str(text_file), model_config=SMALL, quiet=True, **options)


def weights(run: Path, name: str = "last/model") -> dict[str, Tensor]:
    return load_file(run / f"{name}.safetensors")


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same_run(a: Path, b: Path) -> None:
    """Compare every weight, moment and metric, except the clock."""
    for name in ("last/model", "best/model", "last/optimizer"):
        assert_equal(weights(a, name), weights(b, name))
    clocks = {"train_seconds", "tokens_per_second"}
    metrics = [
        [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(run)]
        for run in (a, b)
    ]
    assert metrics[0] == metrics[1]


def rows_of(run: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row["split"] == split]


# --- learning


def test_targets_are_shifted_exactly_once(tmp_path: Path) -> None:
    """A shift in the data set and another in the loss would learn two characters ahead."""
    text = tmp_path / "abc.txt"
    text.write_text("abc" * 700)
    result = train_with(text, tmp_path / "run", steps=60, learning_rate=1e-2, eval_interval=60)
    greedy = {"prompt": "abca", "max_new_tokens": 9, "temperature": 0}
    assert chargpt.sample(result.model, result.tokenizer, **greedy) == "abcabcabcabca"


def test_loss_falls_and_the_best_model_is_returned(result: TrainResult, text_file: Path) -> None:
    rows = rows_of(result.run, "validation")
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert result.summary.val_loss == min(row["val_loss"] for row in rows) < rows[0]["val_loss"]
    corpus = chargpt.load_corpus([str(text_file)])
    again = chargpt.evaluate(result.model, corpus.validation, 16)
    assert again == pytest.approx(result.summary.val_loss, abs=1e-6)


def test_accumulated_batches_make_the_step_of_one_large_batch(
    text_file: Path, tmp_path: Path
) -> None:
    no_dropout, parts = SMALL.replace(dropout=0.0), {"gradient_accumulation_steps": 4}
    a = trainer_for(text_file, tmp_path / "a", no_dropout, batch_size=8)
    b = trainer_for(text_file, tmp_path / "b", no_dropout, batch_size=2, **parts)
    for step in range(3):
        a.state.step = b.state.step = step
        ra, rb = train_step(a), train_step(b)
        assert ra.loss == pytest.approx(rb.loss, abs=1e-5)
        assert ra.grad_norm == pytest.approx(rb.grad_norm, rel=1e-4)


def test_gradients_are_clipped_to_their_norm(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", grad_clip=0.01)
    norms: list[float] = []

    def record(*_: Any) -> None:
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    trainer.optimizer.register_step_pre_hook(record)
    assert train_step(trainer).grad_norm > 0.1
    assert norms == [pytest.approx(0.01, rel=1e-3)]


# --- determinism


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    text_file: Path, tmp_path: Path
) -> None:
    a = train_with(text_file, tmp_path / "a").run
    torch.manual_seed(99)  # the caller's random numbers do not matter
    before = torch.get_rng_state()
    b = train_with(text_file, tmp_path / "b").run
    assert torch.equal(torch.get_rng_state(), before)
    c = train_with(text_file, tmp_path / "c", seed=1).run
    assert_equal(weights(a), weights(b))
    assert not torch.equal(weights(a)["final_norm.weight"], weights(c)["final_norm.weight"])


def test_evaluation_and_samples_do_not_affect_training(text_file: Path, tmp_path: Path) -> None:
    """They do if they draw from the random numbers of training, as in nanoGPT."""
    often = train_with(text_file, tmp_path / "a", eval_interval=1).run
    never = train_with(text_file, tmp_path / "b", eval_interval=100, sample_length=0).run
    assert_equal(weights(often), weights(never))


MUON = {"optimizer": "muon", "cooldown": "linear", "cooldown_fraction": 0.5}


@pytest.fixture(scope="module", params=[{}, MUON], ids=["adamw", "muon"])
def whole(
    request: pytest.FixtureRequest, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run and its changes to QUICK."""
    changes = request.param | {"gradient_accumulation_steps": 2}
    return train_with(text_file, tmp_path_factory.mktemp("whole"), **changes).run, changes


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 7, 11])
def test_a_resumed_run_equals_the_uninterrupted_run(
    whole: tuple[Path, dict[str, Any]],
    text_file: Path,
    tmp_path: Path,
    cut: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stop with Ctrl-C after step `cut`, then resume."""
    run, changes = whole
    interrupt_after(cut, monkeypatch)
    part = train_with(text_file, tmp_path / "part", **changes)
    assert (part.summary.stop_reason, part.summary.steps) == ("interrupted", cut)
    monkeypatch.undo()
    assert_same_run(run, train_with(text_file, tmp_path / "part", resume=True, **changes).run)


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch, sent: int = signal.SIGINT) -> None:
    """Send a signal to this process after `step` steps."""
    plain = Reporter.step

    def with_signal(self: Reporter, values: dict[str, Any], **options: Any) -> None:
        plain(self, values, **options)
        if values["step"] == step:
            signal.raise_signal(sent)

    monkeypatch.setattr(Reporter, "step", with_signal)


def test_one_schedule_sets_both_rates_and_that_of_adamw_is_logged(
    text_file: Path, tmp_path: Path
) -> None:
    rates = {"learning_rate": 0.01, "muon_learning_rate": 0.04}
    trainer = trainer_for(text_file, tmp_path / "run", optimizer="muon", **rates)
    trainer.state.step = 8
    share = schedule(8 / 12, trainer.train_config)
    assert 0.1 < share < 1
    assert train_step(trainer).learning_rate == pytest.approx(0.01 * share)
    set_rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert set_rates == pytest.approx([0.04 * share, 0.01 * share])


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_no_step_has_rate_zero(text_file: Path, tmp_path: Path, steps: int) -> None:
    """Also with a floor of 0, where the last step would learn nothing."""
    changes = {"steps": steps, "learning_rate_floor": 0.0, "warmup_fraction": 0.02}
    trainer = trainer_for(text_file, tmp_path / "run", **changes)
    rates = []
    for trainer.state.step in range(steps):
        rates.append(train_step(trainer).learning_rate)
    assert min(rates) > 0
    assert rates[0] == QUICK.learning_rate  # warm-up is shorter than a step
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_muon_orthogonalizes_in_the_precision_of_the_products(
    text_file: Path, tmp_path: Path, precision: Any, dtype: torch.dtype
) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", optimizer="muon", precision=precision)
    assert trainer.optimizer.param_groups[0]["dtype"] == dtype


# --- the end of a run


@pytest.mark.parametrize(
    ("sent", "reason"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_ends_the_run_after_its_step_and_saves_it(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int, reason: str
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupt_after(3, monkeypatch, sent)
    result = train_with(text_file, tmp_path / "run")
    summary = result.summary
    assert (summary.stop_reason, summary.steps, summary.val_loss) == (reason, 3, None)
    assert "stopped at step 3, before the first evaluation" in summary.verdict
    assert chargpt.load(result.run).model.config.vocab_size > 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(("name", "best_step"), [("evaluate", 5), ("generate", 10)])
def test_an_evaluation_interrupted_by_a_signal_is_repeated_on_resume(
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    result: TrainResult,
    name: str,
    best_step: int,
) -> None:
    plain, calls = getattr(training, name), count()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the signal did not end it")
        return plain(*args, **kwargs)

    monkeypatch.setattr(training, name, interrupted)
    summary = train_with(text_file, tmp_path / "part").summary
    assert (summary.stop_reason, summary.steps) == ("terminated", 10)
    assert summary.best_step == best_step
    monkeypatch.undo()
    assert_same_run(result.run, train_with(text_file, tmp_path / "part", resume=True).run)


def test_patience_ends_a_run_without_progress_and_returns_the_best_model(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.2, 1.0])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: next(losses))
    result = train_with(text_file, tmp_path / "run", steps=100, eval_interval=2, patience=3)
    summary = result.summary
    assert (summary.stop_reason, summary.steps) == ("patience", 10)
    assert (summary.val_loss, summary.best_step, summary.final_val_loss) == (2.0, 4, 2.2)
    assert "overfitting since step 4" in summary.verdict
    best = weights(result.run, "best/model")
    assert torch.equal(result.model.final_norm.weight, best["final_norm.weight"])
    assert not torch.equal(weights(result.run)["final_norm.weight"], best["final_norm.weight"])


def test_epochs_count_windows(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", epochs=2.0)
    # 2,700 characters without one window of 16: 167 windows, 4 per step
    assert trainer.total_steps == round(2 * 167 / 4)


def set_clock(monkeypatch: pytest.MonkeyPatch, lengths: Iterable[float]) -> None:
    """Let steps and evaluations take these seconds, one after another; nothing else takes time."""
    reads = chain.from_iterable(pairwise(accumulate(lengths, initial=0.0)))
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(reads)))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: 0.0))


@pytest.mark.parametrize("beside", [{}, {"steps": 1000}, {"epochs": 100.0}])
def test_minutes_end_the_run_and_its_schedule(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: dict[str, Any]
) -> None:
    """A step takes two seconds: a minute is thirty steps."""
    set_clock(monkeypatch, repeat(2.0))
    changes = beside | {"minutes": 1.0, "eval_interval": 10, "warmup_fraction": 0.1}
    result = train_with(text_file, tmp_path / "run", **changes)
    summary = result.summary
    assert (summary.steps, summary.train_seconds, summary.stop_reason) == (30, 60, "budget")
    assert summary.eval_seconds == 6  # not part of the budget
    rates = [row["learning_rate"] for row in rows_of(result.run)]
    assert max(rates) == pytest.approx(QUICK.learning_rate, rel=0.01)
    assert rates[-1] == pytest.approx(0.1 * QUICK.learning_rate, rel=0.05)


LIMITED = {"steps": 40, "minutes": 1.0, "eval_interval": 20, "sample_length": 0}


def test_a_limit_that_is_not_reached_changes_nothing(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with a slow first step: 2.9 s are more of a minute than 1 step is of 40."""
    free = train_with(text_file, tmp_path / "free", **LIMITED | {"minutes": None})
    set_clock(monkeypatch, chain([2.9], repeat(1.4)))
    limited = train_with(text_file, tmp_path / "limited", **LIMITED)
    assert limited.summary.train_seconds == pytest.approx(57.5)
    assert_same_run(free.run, limited.run)


def test_a_limit_takes_over_where_steps_become_slow(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps of one second, then steps of four: the minute ends at step 30."""
    free = train_with(text_file, tmp_path / "free", **LIMITED | {"minutes": None})
    set_clock(monkeypatch, chain(repeat(1.0, 21), repeat(4.0)))  # 20 steps and an evaluation
    limited = train_with(text_file, tmp_path / "limited", **LIMITED)
    assert (limited.summary.steps, limited.summary.train_seconds) == (30, 60)
    before, after = ([row["learning_rate"] for row in rows_of(run.run)] for run in (free, limited))
    assert before[:20] == after[:20]
    assert after == sorted(after[:4]) + sorted(after[4:], reverse=True)  # no rate rises again
    assert after[-1] < before[29]


@pytest.mark.parametrize("budget", [{"steps": 40}, {"epochs": 1.0}, {}])
@pytest.mark.parametrize("seed", range(5))
def test_progress_never_falls_and_ends_at_what_comes_first(
    text_file: Path, tmp_path: Path, budget: dict[str, Any], seed: int
) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", minutes=1.0, **budget)
    state, random = trainer.state, Random(seed)
    state.train_seconds = state.compile_seconds = 3.0
    before, total = trainer.progress, trainer.total_steps or 10**9
    assert before == 0
    while before < 1:
        assert state.step < total and state.train_seconds < 60
        assert before <= trainer.next_progress
        state.step += 1
        state.train_seconds += random.choice([0.0, 0.1, 5.0])
        if random.random() < 0.1:  # as a resume does
            state.compile_seconds += 0.5
            state.train_seconds += 0.5
        assert trainer.progress >= before
        before = trainer.progress
    assert state.step >= total or state.train_seconds >= 60


def test_a_run_that_the_clock_ends_resumes_with_its_time_and_takes_a_longer_limit(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It equals the uninterrupted run if the clock does the same."""
    set_clock(monkeypatch, repeat(2.0))
    whole = train_with(text_file, tmp_path / "whole", **LIMITED)
    assert whole.summary.steps == 30
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(11, patch)
        assert train_with(text_file, tmp_path / "part", **LIMITED).summary.steps == 11
    part = train_with(text_file, tmp_path / "part", resume=True, **LIMITED)
    assert_same_run(whole.run, part.run)
    longer = train_with(text_file, tmp_path / "part", resume=True, **LIMITED | {"minutes": 2.0})
    assert (longer.summary.steps, longer.summary.train_seconds) == (40, 80)


@pytest.mark.parametrize(
    ("validation", "epoch_windows", "expected"),
    [(100, 4, 25), (100, 400, 100), (100, 40_000, 250), (64_000, 40_000, 3333)],
)
def test_evaluations_are_once_per_epoch_within_limits(
    text_file: Path, tmp_path: Path, validation: int, epoch_windows: int, expected: int
) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", eval_interval=0)
    trainer.validation = trainer.validation[:1].repeat(validation)
    trainer.windows.per_epoch = epoch_windows
    assert trainer.eval_interval == expected


# --- numerical failures


def fit_quietly(trainer: Trainer) -> None:
    with Reporter(trainer.out, quiet=True) as reporter:
        fit(trainer, reporter)


def poison(trainer: Trainer, value: float, at_steps: set[int]) -> None:
    """Make the loss non-finite at some steps."""
    plain = trainer.forward

    def forward(ids: Tensor) -> Tensor:
        logits = plain(ids)
        return logits * value if trainer.state.step in at_steps else logits

    trainer.forward = forward


def test_a_non_finite_loss_stops_before_the_update(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run")
    train_step(trainer)
    before = {k: v.clone() for k, v in model_tensors(trainer.model).items()}
    poison(trainer, float("nan"), {0})
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        train_step(trainer)
    assert_equal(before, model_tensors(trainer.model))
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_diverging_run_keeps_its_last_finite_state(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run")
    poison(trainer, float("inf"), {7})
    with pytest.raises(TrainingError, match=r"step 8 stopped before its update .*--learning-rate"):
        fit_quietly(trainer)
    assert read_state(trainer.out / "last")["step"] == 7
    assert all(torch.isfinite(t).all() for t in weights(trainer.out).values())


def with_scaler(trainer: Trainer) -> Trainer:
    """Scale the loss as for fp16 on a GPU; the arithmetic stays fp32."""
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return trainer


def test_steps_that_overflow_fp16_are_skipped_and_counted(text_file: Path, tmp_path: Path) -> None:
    trainer = with_scaler(trainer_for(text_file, tmp_path / "run"))
    poison(trainer, float("inf"), {2, 3, 6})
    fit_quietly(trainer)
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (3, 0)
    assert trainer.state.scaler["scale"] == 2.0**13
    assert [row["step"] for row in rows_of(trainer.out) if row["loss"] is None] == [3, 4, 7]
    assert all(torch.isfinite(t).all() for t in weights(trainer.out).values())


def test_an_infinite_loss_with_a_finite_gradient_is_not_a_skipped_step(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler checks the gradient only: it makes this update, so the step counts."""
    trainer = with_scaler(trainer_for(text_file, tmp_path / "run"))
    loss = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda *arguments: loss(*arguments) + torch.inf)
    before = trainer.model.token_embedding.weight.detach().clone()
    result = train_step(trainer)
    assert not torch.equal(trainer.model.token_embedding.weight, before)
    assert (result.loss, result.skipped) == (torch.inf, False)


def test_scaled_steps_equal_unscaled_steps(text_file: Path, tmp_path: Path) -> None:
    plain = trainer_for(text_file, tmp_path / "a")
    scaled = with_scaler(trainer_for(text_file, tmp_path / "b"))
    a, b = train_step(plain), train_step(scaled)
    assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)


def test_a_run_that_only_overflows_stops(text_file: Path, tmp_path: Path) -> None:
    trainer = with_scaler(trainer_for(text_file, tmp_path / "run", steps=1000, eval_interval=1000))
    poison(trainer, float("inf"), set(range(1000)))
    message = "50 steps in a row overflowed fp16 .* --precision bf16"
    with pytest.raises(TrainingError, match=message):
        fit_quietly(trainer)
