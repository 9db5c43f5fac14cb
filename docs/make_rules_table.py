"""Write the tables of docs/rules.md from the code: what patterns match, and the presets.

Run ``python docs/make_rules_table.py`` after a change to either. With ``--check`` it writes
nothing, and its exit status is 1 if the page is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from wn_surgery.rules.patterns import compile_pattern
from wn_surgery.rules.presets import PRESETS

PAGE = Path(__file__).with_name("rules.md")
MARKERS = "<!-- {name}: begin -->\n", "<!-- {name}: end -->\n"

ROWS: list[tuple[str, list[str]]] = [
    ("", ["", "head"]),
    ("**", ["", "head", "encoder.layers.0.fc"]),
    ("*", ["head", "0", "", "encoder.fc"]),
    ("head", ["head", "Head", "head.fc", "model.head", "my_head"]),
    ("layers.1", ["layers.1", "layers.10", "layers.1.fc"]),
    ("**.q_proj", ["q_proj", "layers.0.q_proj", "layers.0.my_q_proj", "q_proj.lora_A"]),
    ("encoder.**", ["encoder", "encoder.fc", "encoder.layers.0.fc", "encoder2.fc", "my.encoder"]),
    ("encoder.*", ["encoder.fc", "encoder", "encoder.layers.0"]),
    ("a.**.z", ["a.z", "a.b.z", "a.b.c.z", "a.z.b"]),
    ("*.fc", ["0.fc", "fc", "layers.0.fc"]),
    ("**.conv*", ["conv", "conv1", "net.conv_pre", "net.my_conv", "conv1.norm"]),
    ("**.*_proj", ["q_proj", "layers.0.q_proj", "_proj", "proj"]),
    ("block?.fc", ["block1.fc", "block12.fc", "block.fc"]),
    ("block[0-3].fc", ["block0.fc", "block3.fc", "block4.fc", "block10.fc"]),
    ("block[!0-3].fc", ["block4.fc", "blockx.fc", "block0.fc"]),
    ("**.{q,k}_proj", ["q_proj", "layers.0.k_proj", "layers.0.v_proj"]),
    ("layers.{0..11}.**", ["layers.0", "layers.11.fc", "layers.12", "layers.011"]),
    ("layers.{00..11..2}", ["layers.00", "layers.10", "layers.11", "layers.0"]),
    ("{encoder,decoder.pre}.**", ["encoder.fc", "decoder.pre", "decoder.pre.fc", "decoder.fc"]),
    ("conv{,_post}", ["conv", "conv_post", "conv_pre"]),
    (r"re:layers\.\d+\.fc", ["layers.0.fc", "layers.123.fc", "net.layers.0.fc"]),
    (r"re:(.*\.)?fc[12]", ["fc1", "layers.0.fc2", "layers.0.fc3"]),
]


def pattern_table() -> str:
    """List each pattern, which of its examples it matches, and which it does not."""
    lines = ["| pattern | matches | does not match |", "|---|---|---|"]
    for source, paths in ROWS:
        pattern = compile_pattern(source)
        matched = [path for path in paths if pattern.matches(path)]
        others = [path for path in paths if not pattern.matches(path)]
        name = _code(source) if source else "(empty)"
        lines.append(f"| {name} | {_listed(matched)} | {_listed(others)} |")
    return "\n".join(lines) + "\n"


def preset_table() -> str:
    """List each preset, what it is for, and where it comes from."""
    lines = ["| name | rule | what it matches | after |", "|---|---|---|---|"]
    for name, preset in PRESETS.items():
        rules = ", ".join(_code(rule.describe()) for rule in preset.rules)
        lines.append(f"| {_code(name)} | {rules} | {preset.summary} | {preset.source} |")
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """Put each table between its markers in the page."""
    for name, table in (("patterns", pattern_table()), ("presets", preset_table())):
        begin, end = (marker.format(name=name) for marker in MARKERS)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


def main(arguments: list[str]) -> int:
    """Write the page, or check it; the exit status is 1 if it was out of date under --check."""
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page)
    if "--check" in arguments:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def _listed(paths: list[str]) -> str:
    return ", ".join(_code(path) if path else "the root" for path in paths)


def _code(text: str) -> str:
    # A bar ends a cell of the table, even inside code.
    return f"`{text}`".replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
