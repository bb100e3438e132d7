"""Our readers of Parquet and tar files beside those of `datasets`: time, copies on disk, and damaged files.

    python benchmarks/data_readers.py

Writes 3,000 small JPEGs (one unreadable, one cut short) as Parquet and as a WebDataset tar, and reads all of them.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common import machine, parser, store, table, versions
from slimming.errors import DataError
from slimming.training.sources import ParquetSource, TarSource

IMAGES = 3000


def images(seed: int) -> list[bytes]:
    """JPEGs of random pixels, two of them damaged."""
    dice = np.random.default_rng(seed)
    found = []
    for _ in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(dice.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    found[7], found[8] = b"not an image", found[8][:200]
    return found


def write_tar(path: Path, files: list[bytes], without_label: int | None = None) -> None:
    """A WebDataset shard with one class number per image."""
    with tarfile.open(path, "w") as archive:
        for index, content in enumerate(files):
            parts = {"jpg": content} if index == without_label else {"jpg": content, "cls": str(index % 10).encode()}
            for extension, data in parts.items():
                entry = tarfile.TarInfo(f"{index:06d}.{extension}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def with_datasets(kind: str, column: str, file: Path, cache: Path) -> list[Any]:
    """Every image of a file as `datasets` reads it."""
    rows = datasets.load_dataset(kind, data_files={"train": str(file)}, cache_dir=str(cache))["train"]
    rows = rows.cast_column(column, datasets.Image(decode=False))
    return [rows[index][column] for index in range(len(rows))]


def outcome(work: Callable[[], Any]) -> str:
    """What reading a damaged file ends in."""
    try:
        return f"no error ({work()})"
    except (DataError, ValueError, RuntimeError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        return " ".join(str(error).split())


def main() -> None:
    """Measure, and write the table."""
    arguments = parser(__doc__)
    settings = arguments.parse_args()
    datasets.disable_progress_bars()
    files = images(settings.seed)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        cells = [{"bytes": content, "path": f"{index}.jpg"} for index, content in enumerate(files)]
        pq.write_table(pa.table({"image": cells, "label": [i % 10 for i in range(IMAGES)]}), place / "train.parquet")
        write_tar(place / "train.tar", files)
        write_tar(place / "unlabelled.tar", files[:20], without_label=12)
        whole = (place / "train.tar").read_bytes()
        (place / "short.tar").write_bytes(whole[: len(whole) // 2])

        def ours(source: Any) -> list[Any]:
            return [source.read(index) for index in range(IMAGES)]

        def damaged(name: str) -> list[str]:
            theirs = with_datasets
            return [
                outcome(lambda: TarSource([place / name])),
                outcome(lambda: f"{len(theirs('webdataset', 'jpg', place / name, place / f'cache-{name}'))} rows"),
            ]

        cache = place / "cache"
        rows: list[list[object]] = []
        for kind, column, file, source in (
            ("parquet", "image", "train.parquet", lambda: ParquetSource([place / "train.parquet"], "image", "label")),
            ("webdataset", "jpg", "train.tar", lambda: TarSource([place / "train.tar"])),
        ):
            own = seconds(lambda source=source: ours(source()))
            before = sum(one.stat().st_size for one in cache.rglob("*") if one.is_file())
            other = seconds(lambda k=kind, c=column, f=file: with_datasets(k, c, place / f, cache))
            grown = sum(one.stat().st_size for one in cache.rglob("*") if one.is_file()) - before
            size = (place / file).stat().st_size
            rows.append(
                [f"{file}: time, datasets / ours", f"{other / own:.1f}", f"copy of {grown / size:.0%} of the file"]
            )
        rows += [
            [name, *(text.replace(str(place), "DIR")[-160:] for text in damaged(name))]
            for name in ("unlabelled.tar", "short.tar")
        ]
    where, used = machine(settings.threads), versions()
    stack = ", ".join(f"{key} {value}" for key, value in used.items())
    filled = table(["", "ours, or ratio", "datasets"], rows)
    text = f"{filled}\n{where['cpu']}; {stack}; datasets {datasets.__version__}; seed {settings.seed}.\n"
    store("data_readers", settings, text, rows=rows)
    print(text)


if __name__ == "__main__":
    main()
