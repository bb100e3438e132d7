"""Commands in two processes, of which one fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.launch import finish, start


@pytest.mark.slow
def test_a_directory_that_the_main_process_refuses_ends_both(site: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    words = ["-m", "slimming", "search", site / "config.yaml", "--output", tmp_path / "out"]
    codes = finish(start(words, tmp_path), 60)
    assert codes == [2, 2]
    first, second = ((tmp_path / f"{rank}.txt").read_text().splitlines()[-1] for rank in range(2))
    assert "is not empty" in first
    assert second == first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
