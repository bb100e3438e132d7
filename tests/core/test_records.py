"""Files that are read are bounded, whole and of the form that their kind has; the message says what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from slimming.core.files import FORMAT, atomic_json, seal
from slimming.core.records import FileKind, decode_json, shown
from slimming.errors import CheckpointError, ConfigError, SlimmingError


class Inner(msgspec.Struct):
    size: Annotated[int, msgspec.Meta(ge=1)]
    names: tuple[str, ...] = ()


KIND = FileKind(name="a table of sizes", schema=dict[str, Inner], mend="Measure again.")
FOREIGN = FileKind(name="the settings of a host", schema=dict[str, Any], sealed=False, numbered=False)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    KIND.write(tmp_path / "sizes.json", {"a": {"size": 3, "names": ["x", "ü"]}})
    assert KIND.read(tmp_path / "sizes.json") == {"a": Inner(size=3, names=("x", "ü"))}
    assert KIND.read_values(tmp_path / "sizes.json") == {"a": {"size": 3, "names": ["x", "ü"]}}
    stored = json.loads((tmp_path / "sizes.json").read_text())
    assert stored["format"] == FORMAT
    assert len(stored["sha256"]) == 64


def test_a_checksum_is_of_the_content_whatever_its_order(tmp_path: Path) -> None:
    sealed = seal({"format": 1, "a": {"size": 1}, "b": {"size": 2}})
    atomic_json(tmp_path / "sizes.json", dict(reversed(sealed.items())))
    assert KIND.read(tmp_path / "sizes.json")["b"].size == 2
    for changed in ({**sealed, "a": {"size": 2}}, {**sealed, "sha256": 3}, {**sealed, "c": {"size": 1}}):
        atomic_json(tmp_path / "sizes.json", changed)
        with pytest.raises(CheckpointError, match=r"sizes\.json was changed .*checksum differs\. Measure again\."):
            KIND.read(tmp_path / "sizes.json")
    atomic_json(tmp_path / "sizes.json", {"format": 1, "a": {"size": 1}})
    with pytest.raises(CheckpointError, match=r"has no checksum, so it is not a table of sizes as slimming writes it"):
        KIND.read(tmp_path / "sizes.json")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"b": {"size": "3"}}, r"x is damaged: b\.size: expected `int`, got `str`"),
        ({"b": {"size": True}}, r"expected `int`, got `bool`"),
        ({"b": {"size": 0}}, r"b\.size: expected `int` >= 1, found 0"),
        ({"b": {}}, r"missing required field `size`"),
        ({"b": [1]}, r"expected `object`, got `array`"),
    ],
    ids=["text", "bool", "range", "missing", "list"],
)
def test_a_wrong_entry_is_named_with_what_is_needed(value: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"{says}.*Measure again"):
        KIND.check(seal({"format": 1, "a": {"size": 1}, "b": {"size": 2}, **value, "c": {"size": 3}}), "x")


@pytest.mark.parametrize(
    "value", [[], {}, {"format": "1"}, {"format": True}, {"format": 0}], ids=["list", "nothing", "text", "bool", "zero"]
)
def test_a_file_without_a_format_is_none_of_ours(value: Any) -> None:
    with pytest.raises(CheckpointError, match="x is not a table of sizes of slimming: it has no format"):
        KIND.check(seal(value) if isinstance(value, dict) else value, "x")


def test_newer_formats_are_refused_and_this_one_is_read() -> None:
    KIND.check(seal({"format": FORMAT}), "x")
    with pytest.raises(CheckpointError, match=rf"x has format {FORMAT + 1}, this version of slimming reads up to"):
        KIND.check(seal({"format": FORMAT + 1}), "x")


def test_a_file_of_a_host_needs_neither_checksum_nor_format(tmp_path: Path) -> None:
    content = {"format": "mine", "sha256": "mine", "x": 1}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert FOREIGN.read(tmp_path / "config.json") == content


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a":', "truncated or not JSON"),
        ("", "truncated or not JSON"),
        ('{"a": NaN}', "truncated or not JSON"),
        ('{"a": 1e400}', "truncated or not JSON"),
        ('{"a": "\\ud800"}', "truncated or not JSON"),
        (b'{"a": "\xff"}', "truncated or not JSON"),
        ('{"a": 9007199254740993}', "holds the integer 9007199254740993, which is too large"),
        ('{"a": ' + "9" * 5000 + "}", "too large|not JSON"),
        ('{"a": ' + "[" * 65 + "]" * 65 + "}", "nested 66 levels deep, more than 64"),
        ("[" * 10_000_000, "nested 10,000,000 levels deep"),
        ('{"a": "' + '\\"[' * 100 + '"' + "[" * 100, "nested 101 levels deep"),
        ("[" + "0," * 2_000_001 + "0]", "holds 2,000,002 values"),
        ("\ud800", "not JSON"),
    ],
    ids=["half", "empty", "nan", "huge", "surrogate", "bytes", "integer", "digits", "deep", "deeper", "escapes",
         "values", "text"],
)  # fmt: skip
def test_text_that_is_not_bounded_json_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=f"x .*({says}).* Mend it"):
        decode_json(text, "x", mend="Mend it.", error=ConfigError)


def test_brackets_and_quotes_in_strings_do_not_count() -> None:
    value = {"a": "[" * 500 + '\\"' * 70 + "{" * 100 + "\\", "b": [{"c": '"'}]}
    assert decode_json(json.dumps(value), "x") == value


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.json").write_bytes(b" " * 1001)
    small = FileKind(name="a small file", schema=dict[str, Any], largest=1000)
    for path, says in {
        tmp_path / "none.json": "does not exist. Give the path of a small file",
        tmp_path: "is not a file",
        tmp_path / "pipe": "is not a file",
        tmp_path / "large.json": "is larger than",
        tmp_path / ("x" * 300): "cannot be read .File name too long",
        "a\0b": "cannot be read .*null",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            small.read(path)


def test_a_hostile_file_is_refused_in_little_memory_and_time(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_bytes(b"[" * (1 << 24))
    (tmp_path / "wide.json").write_bytes(b"[" + b"{}," * 5_000_000)
    program = (
        "import resource, sys\n"
        "from slimming.core.records import FileKind\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "for name in sys.argv[1:]:\n"
        "    try: FileKind(name='a file', schema=dict).read(name)\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    files = [str(tmp_path / "deep.json"), str(tmp_path / "wide.json")]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, timeout=20)
    assert done.stdout.split() == ["CheckpointError"] * 2, done.stderr


def test_values_are_shown_short() -> None:
    assert shown(10**5000) == "an integer of thousands of digits"
    assert len(shown("x" * 1000)) == 60


def test_errors_of_settings_in_a_file_name_the_file() -> None:
    from slimming.core.layout import Layout

    kind = FileKind(name="a layout", schema=Layout, mend="Give another.")
    assert issubclass(kind.error, SlimmingError)
    with pytest.raises(CheckpointError, match=r"x is damaged: layout\.multiple=0: .* Give another"):
        kind.check(seal({"format": 1, "multiple": 0}), "x")
