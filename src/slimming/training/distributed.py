"""Processes of ``torchrun`` or ``accelerate launch``: their device and group, and how the failure of one ends all.

Every collective operation of the package starts with a vote: one number, whether this process has failed. A process
that fails inside `agreed` votes so, wherever the others are, which raise its error at their next collective. PyTorch's
own collectives, in the backward pass, cannot vote: they are inside `unvoted`, where a failure is left in the store of
the process group, and the connections that close when the process ends make the others read it.
"""

from __future__ import annotations

import os
from contextlib import ContextDecorator, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slimming import errors
from slimming.errors import ConfigError, Interrupted, ProcessError, SlimmingError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)
"""Time after which a process gives up waiting for one that neither answers nor closes its connections."""
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Parallelism other than data parallelism (parallelism_config)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
"""Environment variables of Accelerate's launcher, and what they ask for."""
SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""Accelerate's kinds of distributed runs that are tested."""
_INSTEAD = (
    "Use data parallelism (torchrun, or accelerate launch --multi_gpu) or, if the model does not fit on a device, "
    "FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)."
)
_KEY = "slimming/failure"
"""Key in the store of the process group of the failure that ends the processes."""
_TOLD = "_slimming_told"
"""Attribute of an exception that the other processes know of."""


def cpu_only() -> bool:
    """Return whether there is no accelerator; Accelerate needs ``cpu=True`` to connect processes on CPUs."""
    return not torch.accelerator.is_available()


def distributed_state() -> PartialState:
    """Return the state of the processes of ``accelerate launch`` or ``torchrun``, or of this single process.

    The first call in a launched process initialises the process group.

    Raises:
        ConfigError: the launcher asks for a kind of parallelism other than data parallelism and FSDP2.
    """
    from accelerate import PartialState

    _check_launcher()
    if asks_for_fsdp():
        # Otherwise transformers would load the weights on the first process only.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state = PartialState(cpu=cpu_only(), timeout=TIMEOUT)
    if (kind := state.distributed_type.value) not in SUPPORTED:
        raise ConfigError(f"Accelerate runs in mode {kind}, which slimming does not support. {_INSTEAD}")
    return state


def asks_for_fsdp() -> bool:
    """Return whether the launcher asks for sharded weights (FSDP)."""
    return _is_set("ACCELERATE_USE_FSDP")


def _check_launcher() -> None:
    for variable, name in REFUSED.items():
        if _is_set(variable):
            raise ConfigError(f"{name} is not supported ({variable} is set). {_INSTEAD}")
    if asks_for_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP1 is not supported. Use FSDP2: accelerate launch --use_fsdp --fsdp_version 2.")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank and the number of processes; (0, 1) as long as no process group is initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class agreed(ContextDecorator):
    """A block, or a function, that ends on every process as soon as it fails on one.

    The process that failed raises its own error; the others raise one with the same message, at their next collective
    or at the end of the block. With a single process, the block is not changed.

    Raises:
        ProcessError: another process failed with an error that is not of slimming; or it ended, for example because
            the system killed it.
    """

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Vote; raise the error of another process if this one has none."""
        if rank_and_world_size()[1] == 1 or _is_told(error):
            return
        if error is None:
            check_others()
        elif isinstance(error, Exception) and not isinstance(error, Interrupted) and not _is_lost(error):
            _vote(error)
        else:  # a signal must not wait for others
            _leave(error)
            _raise_lost(error)


class unvoted(ContextDecorator):
    """A block with collective operations of PyTorch, such as a backward pass: all processes enter it together.

    Raises:
        ProcessError: another process failed or ended in the block.
    """

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Leave an error for the other processes, or raise the error that another one left."""
        if error is not None and rank_and_world_size()[1] > 1 and not _is_told(error):
            _leave(error)
            _raise_lost(error)


def check_others() -> None:
    """Raise the error of another process if one has failed; every process must call it.

    Raises:
        SlimmingError: the error of the first process that has failed.
    """
    if rank_and_world_size()[1] > 1:
        _vote(None)


def add_up(*sums: Tensor) -> None:
    """Replace ``sums`` by their sums over all processes, in place.

    Raises:
        SlimmingError: another process has failed.
    """
    check_others()
    if rank_and_world_size()[1] > 1:
        with unvoted():
            for tensor in sums:
                dist.all_reduce(tensor)


def of_main_process(value: T) -> T:
    """Return the ``value`` of the first process, which must be picklable.

    Raises:
        SlimmingError: another process has failed.
    """
    check_others()
    if rank_and_world_size()[1] == 1:
        return value
    shared = [value]
    with unvoted():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def gather(value: T) -> list[T]:
    """Return the ``value`` of every process, by rank; it must be picklable.

    Raises:
        SlimmingError: another process has failed.
    """
    check_others()
    world = rank_and_world_size()[1]
    if world == 1:
        return [value]
    with unvoted():
        return _gathered(value, world)


def _vote(error: Exception | None) -> None:
    """Tell the others whether this process has failed; raise the error of another one if this one has none."""
    world = rank_and_world_size()[1]
    failed = torch.tensor([float(error is not None)], device=_device())
    told: list[tuple[str, str] | None] = []
    try:
        with unvoted():
            dist.all_reduce(failed)
            if failed.item():
                told = _gathered(None if error is None else _sentence(error), world)
    except ProcessError:  # another process is lost, but the error of this one says more
        if error is None:
            raise
    if error is not None:
        setattr(error, _TOLD, True)
        return
    for rank, entry in enumerate(told):
        if entry is not None:
            raise _as_told(rank, *entry)


def _gathered(value: T, world: int) -> list[T]:
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _device() -> torch.device:
    """The device on which the process group exchanges tensors."""
    backend = dist.get_backend()
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None or "gloo" in backend or "mpi" in backend else accelerator


def _sentence(error: BaseException) -> tuple[str, str]:
    """The class and the message of an error."""
    return type(error).__name__, str(error)


def _as_told(rank: int, kind: str, message: str) -> SlimmingError:
    """The error of another process, of the same class if the class is slimming's."""
    cls = getattr(errors, kind, None)
    if isinstance(cls, type) and issubclass(cls, SlimmingError):
        error = cls(message)
    else:
        error = ProcessError(f"Process {rank} failed: {kind}: {message}".rstrip(": ") + ". Its own output says where.")
    setattr(error, _TOLD, True)
    return error


def _is_told(error: BaseException | None) -> bool:
    """Whether the other processes know of this error, or of one that it replaces."""
    while error is not None:
        if getattr(error, _TOLD, False):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process ended or does not answer."""
    # PyTorch raises those of gloo as plain RuntimeErrors, which begin with the file of gloo.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _leave(error: BaseException) -> None:
    """Leave an error in the store, where other processes find it when their connections to this one close."""
    setattr(error, _TOLD, True)
    if not _is_lost(error):
        rank = dist.get_rank()
        kind, message = _sentence(error)
        with suppress(RuntimeError):  # if the process that keeps the store has ended, this tells the others
            _store().set(_KEY, f"{rank}\n{kind}\n{message}")


def _raise_lost(error: BaseException) -> None:
    """If ``error`` says that another process was lost, raise what that process left, or that it ended."""
    if not _is_lost(error):
        return
    try:
        left = _store().get(_KEY).decode() if _store().check([_KEY]) else ""
    except RuntimeError:
        left = ""
    if left:
        rank, kind, message = left.split("\n", 2)
        raise _as_told(int(rank), kind, message) from error
    lost = ProcessError(
        "Another process of this run ended or no longer answers; its own output or the system's log says why (often it "
        "was killed because memory ran out). Saved states are kept: start the same command again to go on."
    )
    setattr(lost, _TOLD, True)
    raise lost from error


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
