"""Make the demo's images: a class-balanced subset of EuroSAT RGB, JPEG bytes untouched.

    python recipes/make_demo_data.py DIRECTORY

DIRECTORY holds ``train.parquet`` and ``test.parquet`` in the Hugging Face layout: ``image`` {bytes, path},
``label``, class names in the schema metadata. Of each class the first rows are taken, in their order.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ASSETS = Path(__file__).resolve().parents[1] / "src" / "slimming" / "demo" / "assets" / "eurosat"
LIMIT_BYTES = 13_000_000


def class_names(schema: pa.Schema) -> list[str]:
    """Return the class names that the Hugging Face metadata of ``schema`` holds."""
    return json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]


def balanced(table: pa.Table, per_class: int) -> pa.Table:
    """Return the first ``per_class`` rows of each class, in the order of ``table``.

    Raises:
        SystemExit: a class has fewer rows than that.
    """
    seen: Counter[int] = Counter()
    rows = []
    for row, label in enumerate(table["label"].to_pylist()):
        if seen[label] < per_class:
            seen[label] += 1
            rows.append(row)
    names = class_names(table.schema)
    for label, name in enumerate(names):
        if seen[label] < per_class:
            raise SystemExit(f"class {name} has {seen[label]} images, {per_class} were asked for")
    return table.take(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory with train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--train-per-class", type=int, default=260)
    parser.add_argument("--val-per-class", type=int, default=100)
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    total_bytes = 0
    # The demo's validation images are of the test split alone, so no model can have been trained on them.
    for split, name, per_class in (
        ("train", "train", arguments.train_per_class),
        ("test", "val", arguments.val_per_class),
    ):
        table = balanced(pq.read_table(arguments.source / f"{split}.parquet"), per_class)
        path = arguments.output / f"{name}.parquet"
        # JPEG does not compress any further; the row groups let a reader take a part.
        pq.write_table(table, path, compression="zstd", use_dictionary=["label"], row_group_size=500)
        total_bytes += path.stat().st_size
        print(f"{path.name}: {table.num_rows} images, {per_class} of each class")
    print(f"{total_bytes:,} bytes together")
    if total_bytes > LIMIT_BYTES:
        raise SystemExit(f"more than the {LIMIT_BYTES:,} bytes that the repository can bear: take fewer images")


if __name__ == "__main__":
    main()
