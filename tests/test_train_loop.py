import json
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUICK, SMALL
from safetensors.torch import load_file
from torch import Tensor

import chargpt
import chargpt.train
import chargpt.train as training
from chargpt.base.errors import TrainingError
from chargpt.compute.optimizers import schedule
from chargpt.config import DataConfig, GPT2Config, TrainConfig
from chargpt.runs.checkpoint import read_state
from chargpt.runs.report import Reporter, read_metrics
from chargpt.runs.weights import model_tensors
from chargpt.train import NonFiniteError, TrainResult, fit, train, train_step
from chargpt.training import speed
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing loss.png takes longer than these runs; test_run.py looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chargpt.train, "plot_loss", lambda _: None)
        yield


DETERMINED = QUICK.replace(gradient_accumulation_steps=2)


def trainer_for(
    text_file: Path, out: Path, config: TrainConfig = QUICK, model: GPT2Config = SMALL
) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    return make_plan(
        [str(text_file)],
        model_config=model,
        train_config=config,
        data_config=DataConfig(),
        out=out,
        resuming=False,
    ).trainer


def weights(run: Path, which: str = "last") -> dict[str, Tensor]:
    return load_file(run / which / "model.safetensors")


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# --- what is learned


def test_targets_are_shifted_exactly_once(tmp_path: Path) -> None:
    """The original shifted in the data set and again in the loss: it learned two ahead."""
    text = tmp_path / "abc.txt"
    text.write_text("abc" * 700)
    config = QUICK.replace(steps=60, learning_rate=1e-2, eval_interval=60, sample_length=0)
    result = train(
        str(text), model_config=SMALL, train_config=config, out=tmp_path / "run", quiet=True
    )
    sample = chargpt.sample(
        result.model, result.tokenizer, prompt="abca", max_new_tokens=9, temperature=0
    )
    assert sample == "abcabcabcabca"


def test_loss_falls_and_the_best_model_is_returned(result: TrainResult, text_file: Path) -> None:
    rows = [row for row in read_metrics(result.run) if row["split"] == "validation"]
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert result.summary.val_loss == min(row["val_loss"] for row in rows) < rows[0]["val_loss"]
    corpus = chargpt.load_corpus([str(text_file)])
    again = chargpt.evaluate(result.model, corpus.validation, 16)
    assert again == pytest.approx(result.summary.val_loss, abs=1e-6)


def test_accumulated_batches_make_the_step_of_one_large_batch(
    text_file: Path, tmp_path: Path
) -> None:
    no_dropout = SMALL.replace(dropout=0.0)
    whole = QUICK.replace(batch_size=8)
    parts = QUICK.replace(batch_size=2, gradient_accumulation_steps=4)
    a = trainer_for(text_file, tmp_path / "a", whole, no_dropout)
    b = trainer_for(text_file, tmp_path / "b", parts, no_dropout)
    for _ in range(3):
        ra, rb = train_step(a), train_step(b)
        assert ra.loss == pytest.approx(rb.loss, abs=1e-5)
        assert ra.grad_norm == pytest.approx(rb.grad_norm, rel=1e-4)
        a.state.step += 1
        b.state.step += 1


def test_gradients_are_clipped_to_their_norm(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", QUICK.replace(grad_clip=0.01))
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    trainer.optimizer.register_step_pre_hook(look)
    assert train_step(trainer).grad_norm > 0.1
    assert norms == [pytest.approx(0.01, rel=1e-3)]


# --- determinism


def run_with(text_file: Path, out: Path, config: TrainConfig, **options: Any) -> Path:
    return train(
        str(text_file), model_config=SMALL, train_config=config, out=out, quiet=True, **options
    ).run


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    text_file: Path, tmp_path: Path
) -> None:
    a = run_with(text_file, tmp_path / "a", DETERMINED)
    torch.manual_seed(99)  # the caller's random numbers do not matter
    b = run_with(text_file, tmp_path / "b", DETERMINED)
    c = run_with(text_file, tmp_path / "c", DETERMINED.replace(seed=1))
    assert_equal(weights(a), weights(b))
    assert not torch.equal(weights(a)["final_norm.weight"], weights(c)["final_norm.weight"])


def test_evaluation_and_samples_leave_no_trace_in_training(text_file: Path, tmp_path: Path) -> None:
    """nanoGPT evaluates on the training stream of random numbers: eval_interval changes the run."""
    often = run_with(text_file, tmp_path / "a", DETERMINED.replace(eval_interval=1))
    never = run_with(
        text_file, tmp_path / "b", DETERMINED.replace(eval_interval=100, sample_length=0)
    )
    assert_equal(weights(often), weights(never))


@pytest.fixture(scope="module")
def whole(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return run_with(text_file, tmp_path_factory.mktemp("whole") / "run", DETERMINED)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_resumed_run_is_the_uninterrupted_run(
    whole: Path, text_file: Path, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop with Ctrl-C after step `cut`, go on: every weight, moment and metric is the same."""
    interrupt_after(cut, monkeypatch)
    part = train(
        str(text_file),
        model_config=SMALL,
        train_config=DETERMINED,
        out=tmp_path / "part",
        quiet=True,
    )
    assert (part.summary.stop_reason, part.summary.steps) == ("interrupted", cut)
    monkeypatch.undo()
    resumed = run_with(text_file, tmp_path / "part", DETERMINED, resume=True)
    assert_equal(weights(whole), weights(resumed))
    assert_equal(weights(whole, "best"), weights(resumed, "best"))
    optimizer = "last/optimizer.safetensors"
    assert_equal(load_file(whole / optimizer), load_file(resumed / optimizer))
    clocks = {"train_seconds", "tokens_per_second"}

    def metrics(run: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(run)]

    assert metrics(whole) == metrics(resumed)


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch, sent: int = signal.SIGINT) -> None:
    """Send a signal to this process once `step` steps are made."""
    plain = Reporter.step

    def with_signal(self: Reporter, values: dict[str, Any], **options: Any) -> None:
        plain(self, values, **options)
        if values["step"] == step:
            signal.raise_signal(sent)

    monkeypatch.setattr(Reporter, "step", with_signal)


def test_a_resumed_run_of_muon_is_the_uninterrupted_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DETERMINED.replace(optimizer="muon", cooldown="linear", cooldown_fraction=0.5)
    whole = run_with(text_file, tmp_path / "whole", config)
    interrupt_after(7, monkeypatch)
    run_with(text_file, tmp_path / "part", config)
    monkeypatch.undo()
    resumed = run_with(text_file, tmp_path / "part", config, resume=True)
    assert_equal(weights(whole), weights(resumed))
    optimizer = "last/optimizer.safetensors"
    assert_equal(load_file(whole / optimizer), load_file(resumed / optimizer))


def test_one_schedule_moves_both_rates_and_adamws_is_logged(
    text_file: Path, tmp_path: Path
) -> None:
    config = QUICK.replace(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.04)
    trainer = trainer_for(text_file, tmp_path / "run", config)
    trainer.state.step = 8
    share = schedule(8 / 12, config)
    assert 0.1 < share < 1
    assert train_step(trainer).learning_rate == pytest.approx(0.01 * share)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.04 * share, 0.01 * share])


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_no_step_has_rate_zero(text_file: Path, tmp_path: Path, steps: int) -> None:
    """With a floor of 0 the last step learned nothing, and a run of one step not at all."""
    config = QUICK.replace(steps=steps, learning_rate_floor=0.0, warmup_fraction=0.02)
    trainer = trainer_for(text_file, tmp_path / "run", config)
    rates = []
    for trainer.state.step in range(steps):
        rates.append(train_step(trainer).learning_rate)
    assert min(rates) > 0
    assert rates[0] == config.learning_rate  # warm-up is shorter than a step
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_muon_orthogonalizes_in_the_precision_of_the_products(
    text_file: Path, tmp_path: Path, precision: Any, dtype: torch.dtype
) -> None:
    config = QUICK.replace(optimizer="muon", precision=precision)
    assert (
        trainer_for(text_file, tmp_path / "run", config).optimizer.param_groups[0]["dtype"] == dtype
    )


def test_training_leaves_torchs_random_state_and_the_configuration_alone(
    text_file: Path, tmp_path: Path
) -> None:
    before, config = torch.get_rng_state(), asdict(DETERMINED)
    run_with(text_file, tmp_path / "run", DETERMINED)
    assert torch.equal(torch.get_rng_state(), before)
    assert asdict(DETERMINED) == config


# --- when it ends


@pytest.mark.parametrize(
    ("sent", "reason"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_ends_the_run_after_its_step_and_keeps_it(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int, reason: str
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupt_after(3, monkeypatch, sent)
    run = run_with(text_file, tmp_path / "run", QUICK)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["stop_reason"], summary["steps"], summary["val_loss"]) == (reason, 3, None)
    assert "stopped at step 3, before the first evaluation" in summary["verdict"]
    assert chargpt.load(run).model.config.vocab_size > 1
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("amid", ["evaluate", "a sample"])
def test_a_signal_amid_an_evaluation_ends_it_there_and_it_is_made_up_for(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amid: str
) -> None:
    whole = run_with(text_file, tmp_path / "whole", QUICK)
    module, name = (
        (training, "evaluate") if amid == "evaluate" else (chargpt.train, "generate_text")
    )
    plain, calls = getattr(module, name), 0

    def cut(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, cut)
    part = run_with(text_file, tmp_path / "part", QUICK)
    summary = json.loads((part / "summary.json").read_text())
    assert (summary["stop_reason"], summary["steps"]) == ("terminated", 10)
    assert summary["best_step"] == (5 if amid == "evaluate" else 10)
    monkeypatch.undo()
    resumed = run_with(text_file, tmp_path / "part", QUICK, resume=True)
    assert_equal(weights(whole), weights(resumed))
    losses = [[row.get("val_loss") for row in read_metrics(run)] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_patience_ends_a_run_that_gets_no_better_and_the_best_is_kept(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.2, 1.0])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: next(losses))
    config = QUICK.replace(steps=100, eval_interval=2, patience=3)
    result = train(
        str(text_file), model_config=SMALL, train_config=config, out=tmp_path / "r", quiet=True
    )
    summary = result.summary
    assert (summary.stop_reason, summary.steps) == ("patience", 10)
    assert (summary.val_loss, summary.best_step, summary.final_val_loss) == (2.0, 4, 2.2)
    assert "overfitting since step 4" in summary.verdict
    best = weights(result.run, "best")
    assert torch.equal(result.model.final_norm.weight, best["final_norm.weight"])
    assert not torch.equal(weights(result.run)["final_norm.weight"], best["final_norm.weight"])


def test_epochs_count_windows(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", QUICK.replace(epochs=2.0))
    # 2,700 characters to train on, one window of 16 given up: 167 windows, 4 a step
    assert trainer.total_steps == round(2 * 167 / 4)


def test_minutes_end_the_run_and_its_schedule(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a step moves by two seconds, a minute is thirty steps."""
    seconds = iter(range(10_000))
    clock = SimpleNamespace(perf_counter=lambda: 2.0 * next(seconds))
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    config = QUICK.replace(minutes=1.0, eval_interval=10, warmup_fraction=0.1)
    run = run_with(text_file, tmp_path / "run", config)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["train_seconds"], summary["stop_reason"]) == (
        30,
        60,
        "budget",
    )
    assert summary["eval_seconds"] == 6  # of which the budget takes no notice
    rates = [row["learning_rate"] for row in read_metrics(run) if row["split"] == "train"]
    assert max(rates) == pytest.approx(config.learning_rate, rel=0.01)
    assert rates[-1] == pytest.approx(0.1 * config.learning_rate, rel=0.05)


@pytest.mark.parametrize(
    ("validation", "epoch_windows", "expected"),
    [(100, 4, 25), (100, 400, 100), (100, 40_000, 250), (64_000, 40_000, 3333)],
)
def test_evaluations_come_once_an_epoch_within_reason(
    text_file: Path, tmp_path: Path, validation: int, epoch_windows: int, expected: int
) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", QUICK.replace(eval_interval=0))
    trainer.validation = trainer.validation[:1].repeat(validation)
    trainer.windows.per_epoch = epoch_windows
    assert trainer.eval_interval == expected


# --- when it goes wrong


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
    """The original dropped such steps in silence."""
    trainer = trainer_for(text_file, tmp_path / "run")
    train_step(trainer)
    before = {k: v.clone() for k, v in model_tensors(trainer.model).items()}
    poison(trainer, float("nan"), {0})
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        train_step(trainer)
    assert_equal(before, model_tensors(trainer.model))
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_run_that_diverges_keeps_its_last_good_state(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run")
    poison(trainer, float("inf"), {7})
    with pytest.raises(TrainingError, match=r"step 8 stopped before its update .*--learning-rate"):
        fit_quietly(trainer)
    state = read_state(trainer.out / "last")
    assert state["step"] == 7
    assert all(torch.isfinite(t).all() for t in weights(trainer.out).values())


def with_scaler(trainer: Trainer) -> Trainer:
    """Scale the loss as fp16 on a GPU does; the arithmetic stays fp32."""
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return trainer


def test_steps_that_overflow_fp16_are_skipped_and_counted(text_file: Path, tmp_path: Path) -> None:
    trainer = with_scaler(trainer_for(text_file, tmp_path / "run"))
    poison(trainer, float("inf"), {2, 3, 6})
    fit_quietly(trainer)
    assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (3, 0)
    assert trainer.state.scaler["scale"] == 2.0**13
    rows = {row["step"]: row for row in read_metrics(trainer.out) if row["split"] == "train"}
    assert [step for step, row in rows.items() if row["loss"] is None] == [3, 4, 7]
    assert all(torch.isfinite(t).all() for t in weights(trainer.out).values())


def test_an_infinite_loss_with_a_finite_gradient_is_not_a_skipped_step(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler looks at the gradient alone: it makes this update, and the step must count."""
    trainer = with_scaler(trainer_for(text_file, tmp_path / "run"))
    loss = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda *arguments: loss(*arguments) + torch.inf)
    before = trainer.model.token_embedding.weight.detach().clone()
    result = train_step(trainer)
    assert not torch.equal(trainer.model.token_embedding.weight, before)
    assert (result.loss, result.skipped) == (torch.inf, False)


def test_scaled_steps_are_the_unscaled_ones(text_file: Path, tmp_path: Path) -> None:
    plain = trainer_for(text_file, tmp_path / "a")
    scaled = with_scaler(trainer_for(text_file, tmp_path / "b"))
    a, b = train_step(plain), train_step(scaled)
    assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)


def test_a_run_that_only_overflows_stops(text_file: Path, tmp_path: Path) -> None:
    config = QUICK.replace(steps=1000, eval_interval=1000)
    trainer = with_scaler(trainer_for(text_file, tmp_path / "run", config))
    poison(trainer, float("inf"), set(range(1000)))
    with pytest.raises(
        TrainingError, match="50 steps in a row overflowed fp16 .* --precision bf16"
    ):
        fit_quietly(trainer)
