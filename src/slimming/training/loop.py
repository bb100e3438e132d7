"""Training loop, shared by dense training, search, and retraining, which differ only in the task."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimming.core.files import exclusive
from slimming.core.inputs import Inputs, check_inputs
from slimming.core.interrupts import InterruptRequest, defer_interrupt
from slimming.core.modules import check_trainable
from slimming.errors import DataError, Interrupted, NonFiniteLossError, OutputError
from slimming.training.batches import Batch, BatchShard, train_batches
from slimming.training.config import TrainConfig
from slimming.training.distributed import (
    agreed,
    check_others,
    cpu_only,
    distributed_state,
    gather,
    of_main_process,
    unvoted,
)
from slimming.training.evaluation import autocast
from slimming.training.guards import explain_out_of_memory
from slimming.training.images import derive_seed, fork_rng, seed_cpu_generators
from slimming.training.log import RunLog, check_trackers
from slimming.training.optimisation import averaged_model, make_mixup, make_optimizer, make_schedule, parameter_groups
from slimming.training.resume import STATE_FILE, TrainingState
from slimming.training.samples import Data, UnreadableCounter
from slimming.training.sharding import clip_, shard, total_norm, whole_state
from slimming.training.step_counts import count_steps
from slimming.training.tasks import Task

ADVICE = (
    "at batch_size {}: make it smaller, or set accumulate to 2 or more, which splits each training batch without "
    "changing its gradient"
)


@dataclass(frozen=True)
class History:
    """Result of a training run, in addition to the trained model.

    Attributes:
        steps: optimizer steps, including those before the run was resumed.
        seconds: wall time of this call.
        log: lines of the log, including those before the run was resumed.
        metrics: result of the last evaluation; empty if there was none.
        averaged: the averaged model if the config asks for one; evaluations then use it instead of the model.
    """

    steps: int
    seconds: float
    log: tuple[dict[str, Any], ...]
    metrics: dict[str, float]
    averaged: nn.Module | None


@agreed()
def fit(
    model: nn.Module,
    task: Task,
    data: Data,
    config: TrainConfig,
    *,
    directory: Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    no_decay: Callable[[str], bool] = lambda name: False,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    title: str | None = "training",
    inputs: Inputs | None = None,
) -> History:
    """Train ``model`` in place, in one or several processes (``accelerate launch``, ``torchrun``).

    The result depends only on the settings, the data and the initial model. A run that is interrupted and resumed
    ends with the same weights as an uninterrupted one, bit for bit on a CPU. Afterwards the model is in evaluation
    mode, on the device where it was trained.

    Args:
        model: the model to train; all parameters with ``requires_grad`` are updated.
        task: computes the loss.
        data: training images and class names.
        config: training settings.
        directory: directory for ``state.pt`` and ``log.jsonl``; None writes no files.
        resume: continue from the state in ``directory`` if there is one.
        evaluate: function from a model to metrics, called on every process with the averaged model if there is one,
            else with the model. The metrics are written to the log.
        no_decay: whether the parameter of this name is excluded from weight decay, in addition to all parameters with
            fewer than two dimensions.
        lr_scale: factor of the learning rate for the parameter of this name.
        title: title of the progress bar; None shows no progress.
        inputs: what the training starts with, which a resumed training must share, see `slimming.core.inputs`.

    Raises:
        ConfigError: a setting does not fit the data, the model or the resumed run; the inputs differ from those of the
            resumed run; or memory is exhausted.
        DataError: too many images are unreadable, or a loader yields something other than images and labels.
        NonFiniteLossError: the loss or its gradient is NaN or infinite; the last saved state is kept.
        Interrupted: Ctrl-C was pressed, or SIGTERM received; the state was saved first if there is a ``directory``.
        OutputError: ``directory`` holds a run and ``resume`` is False, is in use by another process, or is not
            writable; or it holds a log.jsonl that is not of a training.
        CheckpointError: the saved state is damaged or belongs to another model.
    """
    check_trainable(model)
    check_training(config, data, directory)
    distributed_state()
    accelerator = Accelerator(
        cpu=cpu_only(), mixed_precision="no", log_with=list(config.trackers) or None, project_dir=directory
    )
    locked = exclusive(directory) if directory is not None and accelerator.is_main_process else nullcontext()
    with (
        fork_rng(), locked, defer_interrupt() as interrupt, explain_out_of_memory(ADVICE.format(config.batch_size)),
    ):  # fmt: skip
        # What the first process sees: another machine may not see a new file yet.
        resumed = of_main_process(directory is not None and (directory / STATE_FILE).exists())
        if resumed and not resume:
            raise OutputError(f"{directory} holds a run already; resume it, or choose another directory.")
        run = TrainingRun(accelerator, model, task, data, config, no_decay, lr_scale)
        if resumed and directory is not None:
            run.load(directory)
            if inputs is not None:
                check_inputs(directory, inputs)
        if config.trackers:
            accelerator.init_trackers("slimming", {k: str(v) for k, v in dataclasses.asdict(config).items()})
        began, metrics = time.monotonic(), {}
        try:
            task.start(run.trained_model, accelerator.device)
            with RunLog(accelerator, directory, title, run.state.log, run.state.step, run.total) as log:
                if inputs is not None and directory is not None and not resumed:
                    check_inputs(directory, inputs, fresh=True)
                metrics = run.train(log, directory, evaluate, interrupt)
        finally:
            task.stop()
            for tracker in accelerator.trackers:  # Accelerator.end_training would also destroy the process group
                tracker.finish()
    if interrupt.requested:  # after the last step
        raise run.interrupted(directory, interrupt)
    return History(
        run.total,
        time.monotonic() - began,
        tuple(log.lines),
        metrics or last_metrics(log.lines),
        run.result(),
    )


def check_training(config: TrainConfig, data: Data, directory: Path | None) -> None:
    """Check the settings that depend on the data and on the installed libraries, before any training.

    Raises:
        ConfigError: an unknown optimizer or tracker, a batch larger than the data, epochs of unknown length, or a
            warm-up that fills the whole run.
        MissingExtraError: a tracker is not installed.
    """
    check_trackers(config.trackers, directory)
    make_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], config)
    count_steps(config, data.train)


class TrainingRun:
    """State of a run and the methods of the training loop."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        task: Task,
        data: Data,
        config: TrainConfig,
        no_decay: Callable[[str], bool],
        lr_scale: Callable[[str], float],
    ) -> None:
        self.accelerator, self.data, self.config = accelerator, data, config
        self.shard = BatchShard(
            config.batch_size, config.accumulate, accelerator.process_index, accelerator.num_processes
        )
        counts = count_steps(config, data.train)
        self.total, self.per_epoch = counts.total, counts.per_epoch
        self.evaluate_steps = max(1, round(config.eval_every * self.per_epoch)) if config.eval_every else self.total
        model.to(accelerator.device)
        check_others()
        with unvoted():
            self.sharded = shard(model, accelerator, config)
        self.trained_model = model if self.sharded is None else self.sharded.copy
        groups = parameter_groups(self.trained_model, config.weight_decay, no_decay, lr_scale)
        optimizer = make_optimizer(groups, config)
        self.mixup = make_mixup(config, len(data.classes), self.shard.micro_batch_size)
        self.schedule = make_schedule(optimizer, config, self.total, counts.warmup)
        check_others()
        with unvoted():
            plain = self.sharded is None
            prepared: Any = accelerator.prepare_model(model.train()) if plain else self.trained_model.train()
        self.prepared: nn.Module = prepared
        runner: Any = torch.compile(prepared) if config.compile else prepared
        self.runner: nn.Module = runner
        averaged = None if config.ema is None else averaged_model(model, config.ema)
        scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
        self.state = TrainingState(model, optimizer, task, averaged, scaler)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.unreadable = UnreadableCounter.of(data.train)
        self.saved_at = time.monotonic()
        self.images = 0  # images of all processes since the last line of the log

    def train(
        self,
        log: RunLog,
        directory: Path | None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        interrupt: InterruptRequest,
    ) -> dict[str, float]:
        """Train to the last step, with evaluations and saved states; return the metrics of the last evaluation.

        Raises:
            Interrupted: a signal was received in any process.
        """
        state, metrics = self.state, {}
        if evaluate is not None and (state.evaluation_due or not self.total):
            metrics = self._evaluate(evaluate, log, directory, interrupt)
        for line in self.train_steps(log, lambda: interrupt.requested):
            finished, stop = state.step == self.total, line["stop"]
            state.evaluation_due = evaluate is not None and (finished or state.step % self.evaluate_steps == 0)
            if evaluate is not None and state.evaluation_due and not stop:
                metrics = self._evaluate(evaluate, log, directory, interrupt)
                log.print({**line, **log.lines[-1]})
                stop = any(gather(interrupt.requested))
            self.save(directory, always=finished or stop)
            if stop:
                raise self.interrupted(directory, interrupt)
        return metrics

    def _evaluate(
        self,
        evaluate: Callable[[nn.Module], dict[str, float]],
        log: RunLog,
        directory: Path | None,
        interrupt: InterruptRequest,
    ) -> dict[str, float]:
        state = self.state
        # A single process stops within the evaluation, several when all have finished it.
        several = self.accelerator.num_processes > 1
        try:
            with self._gathered(), nullcontext() if several else interrupt.at_once():
                metrics = evaluate(state.model.eval() if state.averaged is None else state.averaged.module)
        except KeyboardInterrupt as error:
            state.evaluation_due = True
            self.save(directory, always=True)
            raise self.interrupted(directory, interrupt) from error
        state.evaluation_due = False
        line = {"step": state.step, "epoch": state.step / self.per_epoch}
        log.write({**line, **{f"val_{key}": value for key, value in metrics.items()}})
        return metrics

    def interrupted(self, directory: Path | None, interrupt: InterruptRequest) -> Interrupted:
        """Return the error that says after which step the training was stopped."""
        saved = f"its state is saved in {directory}: resume to go on" if directory else "nothing is saved"
        return Interrupted(f"Stopped after step {self.state.step} of {self.total}; {saved}.", interrupt.signal)

    def train_steps(self, log: RunLog, stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Run the remaining steps; yield a log line after each, with ``"stop"``: whether to stop after this step."""
        state, last = self.state, time.monotonic()
        batches = train_batches(self.data, self.shard, self.config.seed, state.step, self.config.workers)
        while state.step < self.total:
            self.schedule.step_update(state.step)
            losses, stop_requested = self.train_step(batches, stop)
            state.step += 1
            log.step(state.step)
            line = {"step": state.step, "epoch": state.step / self.per_epoch, "lr": self._lr(), **losses}
            if state.step % self.config.log_every == 0 or state.step == self.total:
                now = time.monotonic()
                line["images_per_second"] = self.images / max(now - last, 1e-9)
                log.write(line)
                self.images, last = 0, now
            yield {**line, "stop": stop_requested}
            self.prepared.train()

    def train_step(self, batches: Iterator[Batch], stop: Callable[[], bool]) -> tuple[dict[str, float], bool]:
        """Run one optimizer step; return the mean losses of the batch and whether any process asks to stop."""
        config, state, accelerator = self.config, self.state, self.accelerator
        seed_cpu_generators(derive_seed(config.seed, 1, state.step, accelerator.process_index))
        state.optimizer.zero_grad(set_to_none=True)
        sums, names, keys = torch.zeros(()), [], []
        for micro in range(config.accumulate):
            images, labels = self._read_batch(batches, names)
            check_others()
            last = micro == config.accumulate - 1
            with unvoted(), nullcontext() if last else self._no_sync():
                with autocast(accelerator.device, config.precision):
                    losses = state.task.loss(self.runner, images, labels)
                state.scaler.scale(losses["loss"] / config.accumulate).backward()
            keys = list(losses)
            values = torch.stack([losses[key].detach().float().reshape(()).to(accelerator.device) for key in keys])
            sums = sums.to(values.device) + values / config.accumulate
        with unvoted():
            means, stop_requests = self._update([*keys, "gradient"], sums, names, stop)
        return dict(zip(keys, means, strict=True)), stop_requests > 0

    def _read_batch(self, batches: Iterator[Batch], names: list[str]) -> tuple[Tensor, Tensor]:
        """Images and labels of the next micro-batch, with mixup; the names of the images are added to ``names``."""
        batch = next(batches)
        self.unreadable.add(batch.unreadable)
        names += batch.names
        if not len(batch.images):
            raise DataError(
                f"No image of a part of batch {self.state.step} could be read: {', '.join(batch.unreadable)}. Repair "
                "or remove these images."
            )
        self.images += len(batch.images) * self.accelerator.num_processes
        images, labels = (x.to(self.accelerator.device, non_blocking=True) for x in batch[:2])
        if self.mixup is not None:
            if len(images) % 2:
                raise DataError(
                    f"mixup and cutmix pair images, but a part of batch {self.state.step} has {len(images)}; make the "
                    "loader's batches even, and with drop_last=True."
                )
            images, labels = self.mixup(images, labels)
        return images, labels

    def _update(
        self, keys: list[str], sums: Tensor, names: list[str], stop: Callable[[], bool]
    ) -> tuple[list[float], float]:
        """Update the weights; return the losses over all processes, without the gradient's norm, and who asks to stop.

        Args:
            keys: names of the losses, and last "gradient".
            sums: the losses of this process.
            names: names of its images.
            stop: whether this process asks to stop.
        """
        config, state = self.config, self.state
        state.scaler.unscale_(state.optimizer)
        if self.sharded is not None:
            self.sharded.average_whole()
        grads = [p.grad for p in self.trained if p.grad is not None]
        norm = total_norm(grads).to(sums.device)
        # In fp16, GradScaler handles overflowing gradients: it skips the step and lowers its scale.
        gradient = torch.zeros_like(norm) if state.scaler.is_enabled() else norm
        sums = torch.cat([sums, gradient.reshape(1)])
        # A single reduction per step, so that all processes agree on non-finite losses and on Ctrl-C.
        shared: Any = self.accelerator.reduce(torch.cat([sums, sums.new_tensor([float(stop())])]), "mean")
        *means, stop_requests = shared.tolist()
        if not all(map(math.isfinite, means)):
            self._raise_non_finite(
                names, not all(map(math.isfinite, sums.tolist())), dict(zip(keys, means, strict=True))
            )
        state.task.before_step()
        if config.clip_grad is not None:
            if self.sharded is None:
                torch.nn.utils.clip_grads_with_norm_(self.trained, config.clip_grad, norm)
            else:
                clip_(grads, config.clip_grad, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        return means[:-1], stop_requests

    def _raise_non_finite(self, names: list[str], here: bool, losses: dict[str, float]) -> None:
        files = sorted(name for part in gather(names if here else []) for name in part)
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        bad = ", ".join(f"{key} {value}" for key, value in losses.items() if not math.isfinite(value))
        raise NonFiniteLossError(
            f"{bad} at step {self.state.step + 1}, epoch {self.state.step / self.per_epoch:.2f}, lr "
            f"{self._lr():.3g}. "
            "Try a lower lr, a longer warm-up, clip_grad 1 or precision no; check the images of this batch: "
            f"{shown}. "
            "The last saved state is kept."
        )

    def _lr(self) -> float:
        group = self.state.optimizer.param_groups[0]
        return group["lr"] / group["lr_scale"]

    def save(self, directory: Path | None, always: bool) -> None:
        """Save the state if ``always`` or if ``checkpoint_seconds`` have passed since the last save."""
        due = always or time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        if directory is None or not (due if self.sharded is None else of_main_process(due)):
            return
        with self._gathered():
            optimizer = self.state.optimizer.state_dict()
            optimizer = optimizer if self.sharded is None else whole_state(optimizer)
            if self.accelerator.is_main_process:
                self.state.save(directory, self.config, self.total, optimizer)
        self.saved_at = time.monotonic()

    def load(self, directory: Path) -> None:
        """Load the state in ``directory``; see `TrainingState.load`."""
        trained = None if self.sharded is None else self.trained
        self.state.load(directory, self.config, self.total, trained)
        if self.sharded is not None:
            self.sharded.scatter()

    def _gathered(self) -> AbstractContextManager[None]:
        """A block in which the model has the trained weights, whole on every process."""
        return nullcontext() if self.sharded is None else self.sharded.gathered()

    def _no_sync(self) -> AbstractContextManager[Any]:
        """A block in which gradients are accumulated and not exchanged."""
        return self.accelerator.no_sync(self.prepared) if self.sharded is None else self.sharded.no_sync()

    def result(self) -> nn.Module | None:
        """Set the model to evaluation mode and return the averaged model, with the same trainable parameters."""
        if self.sharded is not None:
            self.sharded.gather()
        self.state.model.eval()
        if self.state.averaged is None:
            return None
        averaged = self.state.averaged.module
        for average, parameter in zip(averaged.parameters(), self.state.model.parameters(), strict=True):
            average.requires_grad_(parameter.requires_grad)
        return averaged


def last_metrics(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of the last evaluation in a log.

    >>> last_metrics([{"step": 1, "epoch": 1.0, "val_top1": 0.5}, {"step": 2, "loss": 1.0}])
    {'top1': 0.5}
    """
    for line in reversed(lines):
        metrics = {key.removeprefix("val_"): value for key, value in line.items() if key.startswith("val_")}
        if metrics:
            return metrics
    return {}
