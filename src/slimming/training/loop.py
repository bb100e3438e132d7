"""The loop: dense training, search and retraining are this one, with different tasks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from slimming.core.modules import check_trainable
from slimming.errors import ConfigError, DataError, Interrupted, NonFiniteLossError, OutputError
from slimming.training.batches import Batch, BatchShard, steps_per_epoch, train_batches
from slimming.training.config import TrainConfig
from slimming.training.distributed import cpu_only
from slimming.training.evaluation import autocast
from slimming.training.guards import defer_interrupt, explain_out_of_memory
from slimming.training.images import derive_seed, fork_rng, seed_cpu_generators
from slimming.training.log import RunLog, check_trackers
from slimming.training.optimisation import averaged_model, make_mixup, make_optimizer, make_schedule, parameter_groups
from slimming.training.resume import STATE_FILE, TrainingState
from slimming.training.samples import Data, UnreadableCounter
from slimming.training.tasks import Task

ADVICE = (
    "at batch_size {}: make it smaller, or set accumulate to 2 or more, which splits each training batch without "
    "changing its gradient"
)


@dataclass(frozen=True)
class History:
    """What training leaves beside the trained model.

    Attributes:
        steps: optimizer steps done, those before a resume included.
        seconds: wall time of this call.
        log: the lines of the log, those before a resume included.
        metrics: the last evaluation, empty where there was none.
        averaged: the averaged model, where the config asks for one; what was evaluated then.
    """

    steps: int
    seconds: float
    log: tuple[dict[str, Any], ...]
    metrics: dict[str, float]
    averaged: nn.Module | None


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
) -> History:
    """Train ``model`` in place, in one process or many (``accelerate launch``, ``torchrun``).

    A run is a function of its settings, the data and the model it starts from: stopped anywhere and resumed,
    it ends with the same weights, bit for bit on a CPU. The model ends in evaluation mode, on the device it
    was trained on.

    Args:
        model: what is trained; every parameter that requires a gradient.
        task: gives the loss.
        data: training images and class names.
        config: the settings.
        directory: where ``state.pt`` and ``log.jsonl`` go; None keeps nothing.
        resume: go on from the state in ``directory`` if there is one.
        evaluate: called with the model, or the averaged one, on every process; its numbers go to the log.
        no_decay: names further parameters without weight decay.
        lr_scale: factor of the learning rate by the parameter's name.
        title: name of the progress bar; None shows nothing.

    Raises:
        ConfigError: settings that do not fit the data, the model or the earlier run; out of memory.
        DataError: too many unreadable images, or a loader that gives something else than images and labels.
        NonFiniteLossError: the loss or its gradient is NaN or infinite; the last state stays.
        Interrupted: Ctrl-C was pressed; the state was saved first.
        OutputError: ``directory`` holds a run and ``resume`` is off, or it cannot be written.
        CheckpointError: the state is damaged or another model's.
    """
    check_trackers(config.trackers, directory)
    check_trainable(model)
    if directory is not None and not resume and (directory / STATE_FILE).exists():
        raise OutputError(f"{directory} holds a run already; resume it, or give another directory.")
    accelerator = Accelerator(
        cpu=cpu_only(), mixed_precision="no", log_with=list(config.trackers) or None, project_dir=directory
    )
    with fork_rng(), defer_interrupt() as stop, explain_out_of_memory(ADVICE.format(config.batch_size)):
        run = TrainingRun(accelerator, model, task, data, config, (no_decay, lr_scale))
        if resume and directory is not None and (directory / STATE_FILE).exists():
            run.state.load(directory, config, run.total)
        if config.trackers:
            accelerator.init_trackers("slimming", {k: str(v) for k, v in dataclasses.asdict(config).items()})
        began, metrics = time.monotonic(), {}
        try:
            task.start(model, accelerator.device)
            with RunLog(accelerator, directory, title, run.state.step, run.total) as log:
                for line in run.train_steps(log, lambda: stop.requested):
                    step, ends = line["step"], run.state.step == run.total
                    if evaluate is not None and (ends or step % run.evaluate_steps == 0):
                        metrics = evaluate(model if run.state.averaged is None else run.state.averaged.module)
                        log.write(
                            {
                                "step": step,
                                "epoch": line["epoch"],
                                **{f"val_{k}": v for k, v in metrics.items()},
                            }
                        )
                        log.print({**line, **log.lines[-1]})
                    run.save(directory, always=ends or line["stop"])
                    if line["stop"] and not ends:
                        saved = (
                            f"its state is saved in {directory}: resume to go on" if directory else "nothing is saved"
                        )
                        raise Interrupted(f"Stopped after step {step} of {run.total}; {saved}.")
                if evaluate is not None and not run.total:
                    metrics = evaluate(model.eval())
                    log.write({"step": 0, "epoch": 0.0, **{f"val_{k}": v for k, v in metrics.items()}})
        finally:
            task.stop()
            for tracker in accelerator.trackers:  # end_training would also end the process group, for later calls too
                tracker.finish()
    return History(
        run.total,
        time.monotonic() - began,
        tuple(log.lines),
        metrics or last_metrics(log.lines),
        run.result(),
    )


class TrainingRun:
    """One run under way: what the loop needs from step to step."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        task: Task,
        data: Data,
        config: TrainConfig,
        naming: tuple[Callable[[str], bool], Callable[[str], float]],
    ) -> None:
        self.accelerator, self.data, self.config = accelerator, data, config
        self.shard = BatchShard(
            config.batch_size, config.accumulate, accelerator.process_index, accelerator.num_processes
        )
        per_epoch = steps_per_epoch(data.train, config.batch_size)
        if per_epoch is None and config.steps is None:
            raise ConfigError("This data does not know how many images it has; set steps in place of epochs.")
        self.total = max(1, round(config.epochs * (per_epoch or 0))) if config.steps is None else config.steps
        self.per_epoch = per_epoch or self.total
        self.evaluate_steps = max(1, round(config.eval_every * self.per_epoch)) if config.eval_every else self.total
        optimizer = make_optimizer(parameter_groups(model.to(accelerator.device), config.weight_decay, *naming), config)
        part = self.shard.micro_batch(0)
        warmup = round(config.warmup_epochs * self.per_epoch)
        if self.total and warmup >= self.total:
            raise ConfigError(f"warmup_epochs {config.warmup_epochs:g} is all of the {self.total} steps; shorten it.")
        self.mixup = make_mixup(config, len(data.classes), part.stop - part.start)
        self.schedule = make_schedule(optimizer, config, self.total, warmup)
        prepared: Any = accelerator.prepare_model(model.train())
        self.prepared: nn.Module = prepared
        runner: Any = torch.compile(prepared) if config.compile else prepared
        self.runner: nn.Module = runner
        averaged = None if config.ema is None else averaged_model(model, config.ema)
        scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
        self.state = TrainingState(model, optimizer, task, averaged, scaler)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.unreadable = UnreadableCounter.of(data.train)
        self.saved_at = time.monotonic()
        self.images = 0  # of all processes, since the last line of the log

    def train_steps(self, log: RunLog, stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Make the remaining steps; after each yield its log line, and ``"stop"``: Ctrl-C was pressed."""
        state, last = self.state, time.monotonic()
        batches = train_batches(self.data, self.shard, self.config.seed, state.step, self.config.workers)
        while state.step < self.total:
            self.schedule.step_update(state.step)
            losses, asked = self.train_step(batches, stop)
            state.step += 1
            log.step(state.step)
            line = {"step": state.step, "epoch": state.step / self.per_epoch, "lr": self._lr(), **losses}
            if state.step % self.config.log_every == 0 or state.step == self.total:
                now = time.monotonic()
                line["images_per_second"] = self.images / max(now - last, 1e-9)
                log.write(line)
                self.images, last = 0, now
            yield {**line, "stop": asked}
            self.prepared.train()

    def train_step(self, batches: Iterator[Batch], stop: Callable[[], bool]) -> tuple[dict[str, float], bool]:
        """Make one optimizer step; return the batch's mean losses and whether to stop after it."""
        config, state, accelerator = self.config, self.state, self.accelerator
        seed_cpu_generators(derive_seed(config.seed, 1, state.step, accelerator.process_index))
        state.optimizer.zero_grad(set_to_none=True)
        sums, names, keys = torch.zeros(()), [], []
        for micro in range(config.accumulate):
            batch = next(batches)
            self.unreadable.add(batch.unreadable)
            names += batch.names
            if not len(batch.images):
                raise DataError(
                    f"No image of a part of batch {state.step} could be read: {', '.join(batch.unreadable)}."
                )
            self.images += len(batch.images) * accelerator.num_processes
            images, labels = (x.to(accelerator.device, non_blocking=True) for x in batch[:2])
            if self.mixup is not None:
                if len(images) % 2:
                    raise DataError(
                        f"mixup and cutmix pair images, but a part of batch {state.step} has {len(images)}; make the "
                        "loader's batches even, and with drop_last=True."
                    )
                images, labels = self.mixup(images, labels)
            last = micro == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.prepared):
                with autocast(accelerator.device, config.precision):
                    losses = state.task.loss(self.runner, images, labels)
                state.scaler.scale(losses["loss"] / config.accumulate).backward()
            keys = list(losses)
            values = torch.stack([losses[key].detach().float().reshape(()).to(accelerator.device) for key in keys])
            sums = sums.to(values.device) + values / config.accumulate
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]).to(sums.device)
        # A gradient that overflows in fp16 is the scaler's: it leaves out the step and lowers its scale.
        gradient = torch.zeros_like(norm) if state.scaler.is_enabled() else norm
        keys, sums = [*keys, "gradient"], torch.cat([sums, gradient.reshape(1)])
        # One small exchange per step: a loss that is not finite, and a Ctrl-C, concern every process alike.
        shared: Any = accelerator.reduce(torch.cat([sums, sums.new_tensor([float(stop())])]), "mean")
        *means, asked = shared.tolist()
        if not all(map(math.isfinite, means)):
            self._raise_non_finite(
                names, not all(map(math.isfinite, sums.tolist())), dict(zip(keys, means, strict=True))
            )
        state.task.before_step()
        if config.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, config.clip_grad, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        return dict(zip(keys[:-1], means[:-1], strict=True)), asked > 0

    def _raise_non_finite(self, names: list[str], here: bool, losses: dict[str, float]) -> None:
        files = sorted(gather_object(names if here else []))
        shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        bad = ", ".join(f"{key} {value}" for key, value in losses.items() if not math.isfinite(value))
        raise NonFiniteLossError(
            f"{bad} at step {self.state.step + 1}, epoch {self.state.step / self.per_epoch:.2f}, lr "
            f"{self._lr():.3g}. "
            "Try a lower lr, a longer warm-up, clip_grad 1 or precision no; look at the batch's images: "
            f"{shown}. "
            "The last saved state is kept."
        )

    def _lr(self) -> float:
        group = self.state.optimizer.param_groups[0]
        return group["lr"] / group["lr_scale"]

    def save(self, directory: Path | None, always: bool) -> None:
        """Save the state, when it is time."""
        due = always or time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        if due and directory is not None and self.accelerator.is_main_process:
            self.state.save(directory, self.config, self.total)
            self.saved_at = time.monotonic()

    def result(self) -> nn.Module | None:
        """Put the model into evaluation mode and return the averaged one, which can be trained like the model."""
        self.state.model.eval()
        if self.state.averaged is None:
            return None
        averaged = self.state.averaged.module
        for mine, theirs in zip(averaged.parameters(), self.state.model.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        return averaged


def last_metrics(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last evaluation in a log.

    >>> last_metrics([{"step": 1, "epoch": 1.0, "val_top1": 0.5}, {"step": 2, "loss": 1.0}])
    {'top1': 0.5}
    """
    for line in reversed(lines):
        found = {key.removeprefix("val_"): value for key, value in line.items() if key.startswith("val_")}
        if found:
            return found
    return {}
