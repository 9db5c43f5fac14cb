"""Rules from everywhere: presets, dicts, lists, YAML and JSON files, and their page."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from wn_surgery.errors import RuleError, RuleFileError, WeightNormError
from wn_surgery.rules.presets import preset
from wn_surgery.rules.sources import Rule, as_rules, dump_rules, load_rules


def written(folder: Path, text: str, name: str = "r.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def predicate(name: str, module: nn.Module) -> bool:
    return True


def test_as_rules_takes_all_that_stands_for_rules(tmp_path: Path) -> None:
    a, b = Rule(names="a"), Rule(action="skip", names="b")
    file = tmp_path / "rules.yml"
    dump_rules([a, b], file)
    assert as_rules(a) == (a,)
    assert as_rules([]) == ()
    assert as_rules((a, b)) == (a, b)
    assert as_rules(rule for rule in (a, b)) == (a, b)
    assert as_rules({"names": "a"}) == (a,)
    assert as_rules({"rules": [{"names": "a"}, b, "tcn"]}) == (a, b, *preset("tcn"))
    assert as_rules({"preset": "tcn"}) == preset("tcn")
    assert as_rules("tcn") == preset("tcn")
    assert as_rules(file) == (a, b)
    assert as_rules(str(file)) == (a, b)
    mixed = ["tcn", {"preset": "linears"}, preset("hifigan"), [a], {"rules": [b]}, file]
    assert as_rules(mixed) == (*preset("tcn"), *preset("linears"), *preset("hifigan"), a, b, a, b)


@pytest.mark.parametrize(
    ("rules", "kind", "said"),
    [
        ("hifigen", RuleError, "'hifigen' is neither a preset nor a rule file; did you mean 'hifi"),
        ("zzz", RuleError, "the presets are convolutions"),
        ("nope.yaml", RuleFileError, "nope.yaml: file not found"),
        (Path("nope.json"), RuleFileError, "nope.json: file not found"),
        (Path("nope"), RuleFileError, "nope: the name of a rule file ends in .yaml"),
        (None, RuleError, "got NoneType"),
        (3, RuleError, "got int"),
        (b"tcn", RuleError, "got bytes"),
        (nn.Linear(1, 1), RuleError, "got Linear"),
        ([3], RuleError, "rule 1: expected a Rule, a dict or a preset's name, got int"),
        (["tcn", {"dims": 1}], RuleError, "rule 2: unknown field 'dims'; did you mean 'dim'?"),
        ([{}, {"dim": -1}], RuleError, "rule 2: dim: expected None or an axis"),
        (["tcm"], RuleError, "rule 1: 'tcm' is neither"),
        (["no.yaml"], RuleFileError, "no.yaml: file not found"),
        ({"preset": "tcm"}, RuleError, "no preset is called 'tcm'; did you mean 'tcn'?"),
        ({"preset": 3}, RuleError, "preset: expected a name, got 3"),
        ({"preset": "tcn", "dim": 1}, RuleError, "'preset' stands alone, got 'dim' beside it"),
        ({"rules": 3}, RuleError, "expected a list of rules under the key 'rules', got int"),
        ({"rules": [{}, {"dims": 1}]}, RuleError, "rule 2: unknown field 'dims'"),
        ({"rules": [], "dim": 1}, RuleError, "unknown field 'rules'"),
    ],
)
def test_as_rules_errors(rules: Any, kind: type[RuleError], said: str) -> None:
    with pytest.raises(WeightNormError) as caught:
        as_rules(rules)
    assert type(caught.value) is kind
    assert said in str(caught.value)


def test_the_page_of_the_rule_language_holds_what_the_code_does() -> None:
    page = Path(__file__).parents[2] / "docs" / "rules.md"
    spec = importlib.util.spec_from_file_location("_tables", page.with_name("make_rules_table.py"))
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = page.read_text(encoding="utf-8")
    assert tables.updated(text) == text, "run python docs/make_rules_table.py"
    assert all(f"`{name}`" in text for name in inspect.signature(Rule).parameters)


def test_the_example_of_the_design(tmp_path: Path) -> None:
    text = """
rules:
  - {action: apply, types: [Conv1d, ConvTranspose1d]}
  - {action: apply, names: "decoder.layers.{0..11}.**", types: Linear, dim: 0, eps: 1.0e-12}
  - {action: skip,  names: "**.conv_post"}
"""
    assert load_rules(written(tmp_path, text)) == (
        Rule(types=["Conv1d", "ConvTranspose1d"]),
        Rule(names="decoder.layers.{0..11}.**", types="Linear", eps=1e-12),
        Rule(action="skip", names="**.conv_post"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", ()),
        ("rules: []", ()),
        ("- {}", (Rule(),)),
        ("- hifigan", preset("hifigan")),
        ("- {preset: hifigan}\n- {names: a}", (*preset("hifigan"), Rule(names="a"))),
        # YAML 1.1 reads 1e-12 as text, and no as false.
        ("- {eps: 1e-12, g_init: 1e0}", (Rule(eps=1e-12, g_init=1.0),)),
        ("- {train_g: no, dim: null}", (Rule(train_g=False, dim=None),)),
        ("- {dim: [1, 0]}", (Rule(dim=(0, 1)),)),
        ("- {dim: out}", (Rule(dim="out"),)),
        ("- &a {names: x, dim: 1}\n- {<<: *a, dim: 2}", None),
    ],
)
def test_yaml(text: str, expected: Any, tmp_path: Path) -> None:
    if expected is None:  # a merged key may be overridden: that is no duplicate
        expected = (Rule(names="x", dim=1), Rule(names="x", dim=2))
    assert load_rules(written(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.yaml", "- {}\n- {dims: 1}", ", rule 2: unknown field 'dims'; did you mean 'dim'?"),
        ("r.yaml", "- {dim: -1}", ", rule 1: dim: expected None or an axis"),
        ("r.yaml", "- 3", ", rule 1: expected a mapping of fields, got 3 (int)"),
        ("r.yaml", "- [tcn]", ", rule 1: expected a mapping of fields"),
        ("r.yaml", "- tcm", ", rule 1: no preset is called 'tcm'; did you mean 'tcn'?"),
        ("r.yaml", "- other.yaml", ", rule 1: no preset is called 'other.yaml'"),
        ("r.yaml", "- {preset: tcn, dim: 1}", ", rule 1: 'preset' stands alone"),
        ("r.yaml", "- {where: f}", ", rule 1: where: expected a Python function"),
        ("r.yaml", "- {names: on}", ", rule 1: names: expected a string or a list, got True"),
        ("r.yaml", "- {1: 2}", ", rule 1: unknown field 1"),
        ("r.yaml", "", ": expected a list of rules under the key 'rules', got nothing"),
        ("r.yaml", "{}", ": expected a list of rules under the key 'rules', got nothing"),
        ("r.yaml", "text", ": expected a list of rules under the key 'rules', got str"),
        ("r.yaml", "rule: []", "got the key 'rule'; did you mean 'rules'?"),
        ("r.yaml", "rules: []\nmore: 1", "got the key 'more'"),
        ("r.yaml", "rules: {a: 1}", "got dict"),
        ("r.yaml", "rules:\n- {dim: 0, dim: 1}", ": line 2: the key 'dim' stands twice"),
        ("r.yaml", "rules: []\nrules: []", "the key 'rules' stands twice"),
        ("r.yaml", "- {names: **.a}", ": not YAML (a pattern with '*', '{' or '[' needs quotes"),
        ("r.yaml", "- {names: a.{0..1}}", ": not YAML (a pattern with '*', '{' or '[' needs quot"),
        ("r.yaml", "- !!python/object/apply:os.getcwd []", ": not YAML"),
        ("r.yaml", "? [a]\n: b", ": not YAML"),
        ("r.yml", "- {dims: 1}", ", rule 1: unknown field"),
        ("r.JSON", '[{"dims": 1}]', ", rule 1: unknown field"),
        ("r.json", "", ": not JSON"),
        ("r.json", "[", ": not JSON"),
        ("r.json", "[" * 100_000, ": not JSON"),
        ("r.json", '[{"dim": 0, "dim": 1}]', "the key 'dim' stands twice"),
        ("r.json", '[{"eps": NaN}]', ", rule 1: eps: expected a finite number"),
        ("r.json", '"tcn"', "got str"),
        ("r.toml", "", ": the name of a rule file ends in .yaml, .yml, .json; got '.toml'"),
    ],
)
def test_file_errors_name_the_file_and_the_rule(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RuleFileError) as caught:
        load_rules(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"- {names: caf\xe9}")
    (tmp_path / "control.yaml").write_bytes(b"- {names: a\x00}")
    for name in ("folder.yaml", "latin.yaml", "control.yaml"):
        with pytest.raises(RuleFileError, match=name):
            load_rules(tmp_path / name)


@pytest.mark.parametrize("name", ["rules.yaml", "rules.yml", "rules.json", "RULES.YAML"])
def test_files_round_trip(tmp_path: Path, name: str) -> None:
    rules = [Rule(names="**.é{a,b}*", eps=1e-12, dim=None), Rule(action="skip", types="Linear")]
    file = tmp_path / name
    dump_rules(rules, file)
    loaded = load_rules(str(file))
    assert loaded == tuple(rules)
    assert [rule.label for rule in loaded] == [f"{file}, rule 1", f"{file}, rule 2"]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    dump_rules("tcn", file)
    assert load_rules(file) == preset("tcn")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    for name, text in (("a.yaml", "- tcn"), ("a.json", '["tcn"]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_rules(tmp_path / name) == preset("tcn")


def test_labels_of_a_file_and_of_a_preset_are_kept_apart(tmp_path: Path) -> None:
    file = written(tmp_path, "[tcn, {names: a}, {names: b, label: mine}]")
    assert [rule.label for rule in load_rules(file)] == ["preset tcn", f"{file}, rule 2", "mine"]


def test_a_failed_write_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rules.json"
    dump_rules("tcn", file)
    with pytest.raises(RuleError, match="predicate"):
        dump_rules([Rule(), Rule(where=predicate)], file)
    with pytest.raises(RuleFileError, match="cannot be written"):
        dump_rules(Rule(), tmp_path / "no" / "folder.json")
    with pytest.raises(RuleFileError, match="ends in"):
        dump_rules(Rule(), tmp_path / "rules.txt")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(RuleFileError, match="cannot be written: no"):
        dump_rules(Rule(), file)
    assert load_rules(file) == preset("tcn")
    assert [entry.name for entry in tmp_path.iterdir()] == ["rules.json"]


def test_a_link_goes_on_pointing_at_its_target(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    target, link = tmp_path / "shared" / "rules.json", tmp_path / "rules.json"
    dump_rules("tcn", target)
    link.symlink_to(target)
    dump_rules("linears", link)
    assert link.is_symlink()
    assert load_rules(target) == preset("linears")


def test_without_pyyaml_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    file = tmp_path / "rules.yaml"
    file.write_text("- tcn")
    with pytest.raises(RuleFileError, match=r"pip install 'wn-surgery\[yaml\]'.*or use JSON"):
        load_rules(file)
    with pytest.raises(RuleFileError, match="or use JSON"):
        dump_rules("tcn", file)
    assert load_rules(written(tmp_path, '["tcn"]', "r.json")) == preset("tcn")
