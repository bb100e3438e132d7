"""How often do attacks on runs, files, models and settings break what docs/reliability.md promises?

    python -m benchmarks.reliability
    python -m benchmarks.reliability --only interruptions hostile    some test files, added to the result

Runs the whole of tests/campaign, of which ``make test`` tries a part and ``make test-slow`` a larger one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, parser, versions

CAMPAIGN = Path(__file__).resolve().parents[1] / "tests" / "campaign"


def main() -> None:
    """Run the campaign and write its counts."""
    arguments = _parser().parse_args()
    names = arguments.only or [path.stem.removeprefix("test_") for path in sorted(CAMPAIGN.glob("test_*.py"))]
    output = arguments.output / "reliability.json"
    record: dict[str, Any] = json.loads(output.read_text("utf-8")) if output.exists() else {"files": {}}
    for name in names:
        began = time.monotonic()
        counts = _counts(CAMPAIGN / f"test_{name}.py", arguments.threads)
        record["files"][name] = {"seconds": round(time.monotonic() - began), "attacks": counts}
    record = {"machine": machine(arguments.threads), "versions": versions(), "files": record["files"]}
    output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    text = table([attack for name in sorted(record["files"]) for attack in record["files"][name]["attacks"]])
    output.with_suffix(".md").write_text(text, "utf-8")
    print(text)


def _parser() -> argparse.ArgumentParser:
    found = parser(__doc__)
    found.add_argument("--only", nargs="*", help="names of test files of tests/campaign, without test_")
    return found


def _counts(path: Path, threads: int) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile() as counts:
        environment = {**os.environ, "CAMPAIGN_COUNTS": counts.name, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow", str(path)]
        done = subprocess.run(command, env=environment, check=False)
        lines = Path(counts.name).read_text("utf-8").splitlines()
    if done.returncode not in (0, 1) or not lines:
        raise SystemExit(f"{path.name} did not run")
    return sorted((json.loads(line) for line in lines), key=lambda attack: attack["attack"])


def table(attacks: list[dict[str, Any]]) -> str:
    """Return the Markdown table of attacks, with a row of sums."""
    lines = ["| attack | what must hold | tried | clean | bad |", "|---|---|---:|---:|---:|"]
    rows = [(one["attack"], one["promise"], one["tried"], len(one["bad"])) for one in attacks]
    rows.append(("all", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    lines += [f"| {what} | {promise} | {tried:,} | {tried - bad:,} | {bad:,} |" for what, promise, tried, bad in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
