"""YAML is read as people mean it, and what is wrong is shown with file, line, column and the line itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.config import strict_yaml
from stillhouse.errors import ConfigError


def test_scalars_are_what_people_mean() -> None:
    text = """
    a: 1e-5
    b: 1.
    c: 65_536
    d: yes
    e: 2024-01-01
    f: 1:30
    g: 010
    h: true
    i: ~
    j:
    k: "3"
    l: -2.5E+3
    m: .5
    n: 1.2.3
    """
    values, _ = strict_yaml.parse(text, "x.yaml")
    assert values == {
        "a": 1e-5, "b": 1.0, "c": 65536, "d": "yes", "e": "2024-01-01", "f": "1:30", "g": 10, "h": True,
        "i": None, "j": None, "k": "3", "l": -2500.0, "m": 0.5, "n": "1.2.3",
    }  # fmt: skip
    assert [type(values[key]) for key in "abc"] == [float, float, int]


def test_every_value_knows_its_line() -> None:
    _, origins = strict_yaml.parse("a:\n  b:\n  - 1\n  - {c: 2}\nd: 3\n", "run.yaml")
    assert origins[("a", "b")] == "run.yaml:2"
    assert origins[("a", "b", 1, "c")] == "run.yaml:4"
    assert origins[("d",)] == "run.yaml:5"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: 2\na: 3\n", ["x.yaml:3:1", "'a' is given twice", "first at x.yaml:1", "    a: 3"]),
        ("a:\n  b: 1\n  b: 2\n", ["x.yaml:3:3", "given twice"]),
        ("a: [1, 2\nb: 3\n", ["x.yaml:2:", "is not YAML"]),
        ("a:\n\tb: 1\n", ["x.yaml:2:1", "is not YAML", "^"]),
        ("", ["x.yaml: is empty"]),
        ("# nothing\n", ["x.yaml: is empty"]),
        ("- 1\n", ["x.yaml:1:1", "should be a mapping"]),
        ("just words\n", ["should be a mapping"]),
        ("1: a\n", ["x.yaml:1:1", "write it in quotes"]),
        ("? [a]\n: 1\n", ["a name should be text"]),
        ("a: !!python/object:os.system x\n", ["x.yaml:1:4", "tag", "not allowed"]),
        ("a: !!binary aGk=\n", ["tag", "not allowed"]),
        ("a: !!int x\n", ["x.yaml:1:4", "cannot be read"]),
        ("a: &x [*x]\n", ["contains itself"]),
        ("a: 1\n---\nb: 2\n", ["x.yaml:2", "is not YAML"]),
        ("a: \x01\n", ["x.yaml:1", "character"]),
        ("a: *nowhere\n", ["x.yaml:1:4", "undefined alias"]),
        ("[" * 5000, ["is not YAML"]),
    ],
)
def test_what_is_wrong_is_shown(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        strict_yaml.parse(text, "x.yaml")
    for part in parts:
        assert part in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"rum\.yaml: no such file \(did you mean 'run\.yaml'\?\)"):
        strict_yaml.read(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match=r"is a folder.*run\.yaml"):
        strict_yaml.read(tmp_path)
    with pytest.raises(ConfigError, match="nor its folder"):
        strict_yaml.read(tmp_path / "no" / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        strict_yaml.read(tmp_path / "run.yaml" / "deeper.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: n\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: is not UTF-8"):
        strict_yaml.read(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert strict_yaml.read(tmp_path / "bom.yaml")[0] == {"a": 1}
