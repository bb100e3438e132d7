"""The files in the directory of a run: the schemas of those that are read again, and which of them are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from slimming.checkpoints import checkpoint
from slimming.core.inputs import INPUTS_FILE
from slimming.core.inputs import RECORD as INPUTS
from slimming.core.plain_text import without_places
from slimming.core.pruning_plan import PLAN
from slimming.core.records import FileKind
from slimming.core.yaml_text import read_yaml
from slimming.errors import CheckpointError, SlimmingError
from slimming.report.model import RESULTS, Finite, Row, Share
from slimming.report.pages import REPORT, TABLE
from slimming.report.pages import RESULTS as RESULTS_FILE
from slimming.report.stamps import is_whole
from slimming.runs.config import CONFIG_FILE, SEARCH_PLACE, TOGETHER, RunConfig, is_own_config
from slimming.runs.time_budget import TimeAllocation
from slimming.searching.mask_search import MASKS, RECORD, SCORES_FILE, WEIGHTS, verify_search
from slimming.training.log import LOG_FILE

MEND = "Remove it to repeat this stage."
Seconds = Annotated[float, Meta(ge=0, le=1e12)]


class Metrics(msgspec.Struct, frozen=True):
    """The metrics of the dense model: top-1, or the value of another metric."""

    top1: Share | None = None
    metric: Finite | None = None


class StageSeconds(msgspec.Struct, frozen=True):
    """The time that a stage took, and the checksum of its log."""

    seconds: Seconds
    log_sha256: str


class Served(msgspec.Struct, frozen=True):
    """The budgets that one training for all of them served, the time that it took, and the checksum of its log."""

    budgets: Annotated[tuple[str, ...], Meta(min_length=1)]
    seconds: Seconds
    log_sha256: str


METRICS = FileKind(name="the metrics of a model", schema=Metrics, mend=MEND)
SECONDS = FileKind(name="the time of a search", schema=StageSeconds, mend=MEND)
SERVED = FileKind(name="the record of a training for all budgets", schema=Served, mend=MEND)
ONE_SHOT = FileKind(
    name="the accuracies of one-shot cuts",
    schema=dict[str, dict[Literal["top1_one_shot", "metric_one_shot"], Finite]],
    mend=MEND,
)
ROW = FileKind(name="the results of a budget", schema=Row, mend=MEND)
TIME_ALLOCATION = FileKind(name="the time allocation of a run", schema=TimeAllocation, mend=MEND)
SETTINGS = FileKind(
    name="the settings of a run", schema=dict[str, Any], mend="Choose another directory to start a new run."
)

SETTINGS_FILE, DENSE_FILE, SHOTS_FILE, HOURS_FILE = (
    "settings.json", "dense/metrics.json", "one_shot.json", "time_allocation.json",
)  # fmt: skip
SECONDS_FILE, SERVED_FILE = "seconds.json", "served.json"
PLAN_FILE, CUT_PLACE, SLIM_PLACE, ROW_FILE = "plan.json", "cut", "slim", "row.json"


def is_started(directory: Path) -> bool:
    """Return whether a run, or a command, has written its settings to ``directory``."""
    return (directory / SETTINGS_FILE).exists() or is_own_config(directory / CONFIG_FILE)


def missing_files(directory: Path, config: RunConfig) -> list[str]:
    """Return the files of a finished run with these settings that do not exist, relative to its directory.

    Raises:
        CheckpointError: a file is damaged; the message says what to do.
    """
    kinds: dict[str, FileKind[Any]] = {SETTINGS_FILE: SETTINGS, DENSE_FILE: METRICS, RESULTS_FILE: RESULTS}
    kinds[INPUTS_FILE] = INPUTS
    kinds |= {HOURS_FILE: TIME_ALLOCATION} if config.hours is not None else {}
    kinds |= {SHOTS_FILE: ONE_SHOT} if config.one_shot else {}
    missing = [name for name, kind in kinds.items() if not _is_there(directory / name, kind)]
    missing += [f"{SEARCH_PLACE}/{name}" for name in missing_in_search(directory / SEARCH_PLACE)]
    if config.retraining == TOGETHER:
        missing += [f"{TOGETHER}/{name}" for name in missing_in_shared_training(directory / TOGETHER)]
    for budget in config.budgets:
        missing += [f"{budget.name}/{name}" for name in missing_in_budget(directory, budget.name)]
    return missing + [name for name in (REPORT, TABLE) if not is_whole(directory / name)]


def missing_in_search(directory: Path) -> list[str]:
    """Return the missing files of a finished search; see `missing_files`."""
    return _missing_in_training(directory, SECONDS_FILE, SECONDS)


def missing_in_shared_training(directory: Path) -> list[str]:
    """Return the missing files of a finished training for all budgets; see `missing_files`."""
    return _missing_in_training(directory, SERVED_FILE, SERVED)


def _missing_in_training(directory: Path, name: str, kind: FileKind[StageSeconds] | FileKind[Served]) -> list[str]:
    missing = missing_result(directory)
    if not _is_there(directory / name, kind):
        return [*missing, name]
    _verify_log(directory / LOG_FILE, kind.read(directory / name).log_sha256)
    return missing


def missing_in_budget(root: Path, name: str) -> list[str]:
    """Return the missing files of a finished budget; see `missing_files`."""
    directory = root / name
    missing = [] if _is_there(directory / PLAN_FILE, PLAN) else [PLAN_FILE]
    for place in (CUT_PLACE, SLIM_PLACE):
        missing += [f"{place}/{file}" for file in missing_in_checkpoint(directory / place)]
    if not _is_there(directory / ROW_FILE, ROW):
        return [*missing, ROW_FILE]
    row = ROW.read_values(directory / ROW_FILE)
    if (log := root / row["log"]).parent == directory:
        _verify_log(log, row["log_sha256"])
        missing += [] if log.exists() else [LOG_FILE]
    return missing


def missing_in_checkpoint(directory: Path) -> list[str]:
    """Return the missing files of a checkpoint in a run; see `missing_files`."""
    with _repeatable(directory):
        return checkpoint.missing_files(directory)


def _is_there(path: Path, kind: FileKind[Any]) -> bool:
    """Whether a file exists; it is then verified."""
    if not path.exists():
        return False
    kind.read(path)
    return True


def missing_result(directory: Path) -> list[str]:
    """Return the missing files of `SearchResult.save` and of the log; see `missing_files`."""
    missing = [name for name in (WEIGHTS, MASKS, SCORES_FILE, RECORD, LOG_FILE) if not (directory / name).exists()]
    if not missing:
        with _repeatable(directory / RECORD):
            verify_search(directory)
    return missing


def _verify_log(path: Path, sha256: str) -> None:
    if path.exists() and checkpoint.sha256(path) != sha256:
        raise CheckpointError(f"{path} was changed after it was written: its checksum differs. {MEND}")


@contextmanager
def _repeatable(path: Path) -> Iterator[None]:
    """Add to the message of a damaged file that the stage can be repeated."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error} Or remove {path} to repeat this stage.") from error


def stored_data(path: Path) -> Mapping[str, Any]:
    """Return the settings of the data on which a checkpoint was trained; empty if it does not record them.

    The provenance has only the last component of an absolute path. In the directory of its run or training, the whole
    path is taken from the settings there.

    Raises:
        CheckpointError: the provenance is damaged.
    """
    if not (path / checkpoint.PROVENANCE).exists():
        return {}
    stored = checkpoint.read_provenance(path).get("data")
    if not isinstance(stored, Mapping):
        return {}
    readers = {path.parent.parent / SETTINGS_FILE: SETTINGS.read, path.parent / "config.yaml": read_yaml}
    for file, read in readers.items():
        with suppress(SlimmingError):  # a file of another program with this name
            data = read(file).get("data") if file.is_file() else None
            if isinstance(data, Mapping) and without_places(data) == stored:
                return data
    return stored
