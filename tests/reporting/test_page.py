"""What is on the page of ``wn.report``, and that names cannot put anything else there."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn
from tests.makers import legacy, llama, parametrized
from tests.reporting.pages import HOSTILE, Page, named
from wn_surgery.reporting.page import page
from wn_surgery.training.statistics import History

RULES = [{"types": "Linear"}, {"action": "skip", "names": "1"}]


def show(model: Any, **given: Any) -> Page:
    return Page(page(model, **given))


def mixed() -> nn.Sequential:
    """A layer in each layout."""
    return nn.Sequential(
        parametrized(nn.Linear(3, 4)),
        legacy(nn.Linear(4, 5)),
        nn.Linear(5, 6),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 7)),
        nn.LayerNorm(7),
    )


def test_a_page_shows_each_weight_once_and_its_layout(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert wn.report(mixed(), target) == target
    made = Page(target.read_text(encoding="utf-8"))
    assert [given["data-layout"] for tag, given in made.elements if tag == "tr" and given] == [
        "parametrized",
        "legacy",
        "plain",
        "other",
    ]
    assert "of 4 weights have weight norm" in made.text()
    assert "head" not in made.classes() and made.count("section", id="tree") == 1
    assert made.count("svg", class_="cell") == 4  # g and ‖v‖ of two
    assert "computed by torch.nn.utils.parametrizations._SpectralNorm" in made.text()
    # Every link within the page leads to a row.
    links = [given["href"] for tag, given in made.elements if tag == "a"]
    assert len(links) == 4 and all(link and made.count("tr", id=link[1:]) == 1 for link in links)


def test_the_numbers_are_those_of_the_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 0], [0, 4, 0], [0, 0, 5], [6, 0, 0]]))
    wn.apply(model, "linears")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.72)
    made = show(model, optimizers=optimizer)
    rate = wn.statistics(model, optimizer).sites[0].effective_lr
    assert "3 … 6" in made.text()
    cells = {given["class"]: given for tag, given in made.elements if tag == "td"}
    assert float(cells["g"]["data-v"] or 0) == float(cells["v"]["data-v"] or 0) == 4.5
    assert float(cells["rate"]["data-v"] or 0) == rate
    assert float(cells["shape"]["data-v"] or 0) == 12
    # Four values in four of the bins, all of one height.
    path = next(given["d"] for tag, given in made.elements if tag == "path")
    assert path and path.count("V1h4") == 4 and path.count("V22h4") == 20


def test_rules_show_what_decided_and_what_would_change() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Conv1d(1, 1, 1))
    made = show(model, rules=RULES)
    assert "decides 1 weight" in made.text() and "apply types=Linear" in made.within("code")
    assert "would change by these rules" in made.text()
    assert {"rule 1", "rule 2", "–"} <= set(made.within("td"))
    assert any("skip" in text for text in made.within("small"))
    assert not any(site.normed for site in wn.sites(model))  # it was only read
    wn.apply(model, RULES)
    assert "already there" in show(model, rules=RULES).text()


def test_what_is_wrong_with_rules_is_on_the_page() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    nn.init.zeros_(model[0].weight)
    made = show(model, rules=[{"types": "Linear"}, {"types": "Conv7d"}])
    assert made.classes()["error"] == 1 and "norm" in made.text()
    assert "rule 2 decides nothing: " in made.text()
    with pytest.raises(wn.RuleError):
        show(model, rules={"typos": "Linear"})


def test_rows_without_a_direction_and_broken_ones_are_errors() -> None:
    model = nn.Sequential(*(nn.Linear(3, 4) for _ in range(5)))
    wn.apply(model, [{"types": "Linear"}, {"names": "3", "eps": 1e-6}])
    with torch.no_grad():
        model[0].parametrizations.weight.original1[1:3] = 0
        model[1].parametrizations.weight.original0[0] = float("nan")
        model[2].parametrizations.weight.original0[0] = 0
        model[3].parametrizations.weight.original1[0] = 0
    made = show(model)
    assert made.count("tr", class_="bad") == 2
    assert made.classes()["error"] == 2
    assert made.classes()["warning"] == 1 and made.classes()["note"] == 1
    cells = [given for tag, given in made.elements if tag == "td"]
    zero = [given["data-v"] for given in cells if "zero" in (given["class"] or "")]
    assert zero == ["2", "0", "0", "1", "0"]
    with torch.no_grad():
        model[4].parametrizations.weight.original0.fill_(float("inf"))
    assert "not finite" in show(model).within("td")


def test_a_training_is_drawn_and_the_last_rate_is_in_the_table() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    wn.apply(model, "linears")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = History()
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        history.add(step, wn.statistics(model, optimizer))
    made = show(model, history=history)
    assert made.count("figure") == 3
    assert {"0.weight", "1.weight"} <= set(made.within("title"))
    assert "step 299" in made.within("text")
    curves = [given["d"] or "" for _, given in made.elements if "stroke" in given]
    assert [curve.count("L") for curve in curves] == [100] * 6  # thinned out
    cells = [given for tag, given in made.elements if tag == "td" and given["class"] == "rate"]
    assert float(cells[0]["data-v"] or 0) == history.records[-1]["0.weight"]["effective_lr"]
    assert made.count("path", class_="line") == 2


@pytest.mark.parametrize("value", [0.0, -1.0, 1e308, float("inf"), float("nan"), 5e-324])
def test_a_history_of_any_numbers_is_drawn(value: float) -> None:
    history = History()
    history.steps = [0, 1, 2]
    history.records = [{"weight": {"g": g}} for g in (1.0, value, value)]
    made = show(nn.Linear(2, 2), history=history)
    for _, given in made.elements:
        assert not re.search("nan|inf", given.get("d") or "")


def test_many_curves_are_thinned_and_the_page_says_so() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    wn.apply(model, "linears")
    history = History()
    for step in range(2):
        history.add(step, wn.statistics(model))
    made = show(model, history=history)
    assert "34 of 100 weights" in made.text()
    assert sum("stroke" in given for _, given in made.elements) == 2 * 34


def test_equal_blocks_are_shown_once() -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(300))
    wn.apply(model, {"types": "Linear"})
    made = show(model)
    assert "0 … 299" in made.within("code") and "300 equal" in made.within("b")
    assert made.classes()["tree"] == 1
    tree = made.elements[[given.get("class") for _, given in made.elements].index("tree") :]
    assert sum(tag == "li" for tag, _ in tree) == 4
    # One that differs is shown by itself.
    with torch.no_grad():
        model[7][0].parametrizations.weight.original1.zero_()
    names = show(model).within("code")
    assert "0 … 6" in names and "7" in names and "8 … 299" in names


def test_a_page_grows_by_a_kilobyte_for_a_weight() -> None:
    sizes = []
    for count in (10, 210):
        layers = (nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(count))
        model = nn.ModuleList(layers)
        wn.apply(model, "linears")
        sizes.append(len(page(model, rules="linears")))
    assert 600 < (sizes[1] - sizes[0]) / 200 < 1200


def test_shared_modules_show_all_their_names_and_wrappers_none() -> None:
    layer = nn.Linear(3, 3)
    model = nn.DataParallel(nn.Sequential(layer, nn.ReLU(), layer))
    made = show(model)
    assert made.count("tr", data_layout="plain") == 1
    assert "= 2.weight" in made.within("span")
    assert made.within("h1") == ["Sequential"]


def test_models_without_values_are_shown_without_them() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    wn.apply(model, names="0")
    made = show(model)
    assert "is on the meta device" in made.text() and made.count("svg", class_="cell") == 0
    assert "None has, or could have, weight norm." in show(nn.ReLU()).text()
    with warnings.catch_warnings(action="ignore"):  # torch deprecates it
        scripted = torch.jit.script(nn.Linear(2, 2))
    assert "TorchScript" in show(scripted).text()


def test_half_precision_complex_numbers_and_one_norm_for_all() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4, dtype=torch.bfloat16), nn.Linear(3, 4, dtype=torch.cfloat)
    )
    wn.apply(model, [{"types": "Linear"}, {"names": "1", "dim": None}])
    made = show(model)
    assert made.count("svg", class_="cell") == 4
    assert "dim=None" in made.within("small")


def test_a_model_of_transformers() -> None:
    model = llama()
    wn.apply(model, "linears", on_unmatched="ignore")
    made = show(model, rules="linears")
    sites = wn.sites(model)
    assert made.count("tr", data_layout="parametrized") == sum(site.normed for site in sites)
    assert made.within("h1") == [type(model).__name__]


# Files ------------------------------------------------------------------------------------------


def test_a_checkpoint(tmp_path: Path) -> None:
    model = mixed()
    with torch.no_grad():
        model[0].parametrizations.weight.original1[0] = 0
    state = {"epoch": 3, "state_dict": model.state_dict(), "ema": {"a.b": torch.zeros(2, 3)}}
    torch.save(state, tmp_path / "a.ckpt")
    found = wn.checkpoints.inspect(tmp_path / "a.ckpt")
    assert found.plain == len(found.others) and "state_dict/4.bias" in found.others
    made = show(found, title="a.ckpt")
    assert made.within("h1") == ["a.ckpt"]
    rows = [given.get("data-layout") for tag, given in made.elements if tag == "tr" and given]
    assert rows == ["parametrized", "legacy", "spectral"]
    assert made.count("svg", class_="cell") == 4
    assert made.count("tr", class_="bad") == 1 and made.classes()["error"] == 1
    assert {"state_dict/", "ema/", "a"} <= set(made.within("code"))


def test_a_key_of_many_parts_does_not_nest_without_end(tmp_path: Path) -> None:
    torch.save({".".join("a" * 5000): torch.zeros(1), "": torch.zeros(1)}, tmp_path / "a.pt")
    made = show(wn.checkpoints.inspect(tmp_path / "a.pt"))
    assert made.count("details") < 50


# Names ------------------------------------------------------------------------------------------


def plain_names(count: int) -> list[str]:
    return [f"name{chr(97 + number)}" for number in range(count)]


def history_of(model: nn.Module) -> History:
    history = History()
    for step in range(2):
        history.add(step, wn.statistics(model))
    return history


def test_hostile_names_of_modules_and_classes_are_text() -> None:
    harmless, hostile = (named(names) for names in (plain_names(len(HOSTILE)), HOSTILE))
    pages = []
    for model in (harmless, hostile):
        rules = [{"types": nn.Linear}, {"names": next(iter(model._modules)), "action": "skip"}]
        wn.apply(model, types=nn.Linear)
        pages.append(show(model, rules=rules, history=history_of(model), title="a"))
    assert pages[0].skeleton == pages[1].skeleton
    shown = pages[1].text()
    assert "<script>pwned=1</script>" in shown and "&lt;b&gt;" in shown
    assert "a\\nb\\r\\x00" in shown and "a\\u202egnp\\u2066\\u200f" in shown and "\\udc80" in shown
    assert "x" * 1001 not in shown and "(5,000 characters)" in shown
    assert not set("\0\r\u202e\u2066\u200f\udc80") & set(shown)


def test_hostile_names_of_tensors_are_text(tmp_path: Path) -> None:
    pages = []
    for names in (plain_names(len(HOSTILE)), HOSTILE):
        state = {}
        for number, name in enumerate(names, 2):
            part = name.replace("/", "\\")
            g, v = torch.ones(number, 1), torch.ones(number, 2)
            g[0] = float("nan")  # so that the page has a message about it
            state |= {f"{part}.weight_g": g, f"{part}.weight_v": v, f"{part}.bias": g[0]}
        torch.save(state, tmp_path / "a.pt")
        pages.append(show(wn.checkpoints.inspect(tmp_path / "a.pt"), title=names[0]))
    assert pages[0].skeleton == pages[1].skeleton
    assert pages[1].within("h1") == [HOSTILE[0]]


def test_hostile_rules_are_text() -> None:
    made = show(nn.Linear(2, 2), rules=[{"names": "<script>pwned=1</script>"}])
    assert made.count("script") == 1


def test_the_page_allows_its_own_script_and_style_and_nothing_else() -> None:
    text = page(mixed())
    made = Page(text)
    policy = next(given["content"] for _, given in made.elements if "http-equiv" in given)
    for kind in ("script", "style"):
        [source] = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert policy and f"{kind}-src 'sha256-{digest}'" in policy
    assert policy and policy.startswith("default-src 'none';")
    for _, given in made.elements:
        assert not {"style", "src", "onclick", "onload"} & given.keys()
        assert (given.get("href") or "#").startswith("#")
    assert "http" not in text.replace("http-equiv", "")


# Writing ----------------------------------------------------------------------------------------


def test_the_same_model_gives_the_same_page() -> None:
    model = mixed()
    assert page(model) == page(model)


def test_a_page_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    target.chmod(0o640)
    wn.report(nn.Linear(2, 2), target)
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert target.stat().st_mode & 0o777 == 0o640
    other = wn.report(nn.Linear(2, 2), tmp_path / "b.htm")
    mask = os.umask(0)
    os.umask(mask)
    assert other.stat().st_mode & 0o777 == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.htm", "report.html"]
    (tmp_path / "model.pt").write_text("weights")
    with pytest.raises(wn.CheckpointError, match=r"another ending than .html"):
        wn.report(nn.Linear(2, 2), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_text() == "weights"
    with pytest.raises(wn.CheckpointFileError, match="No such file"):
        wn.report(nn.Linear(2, 2), tmp_path / "missing" / "a.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(wn.CheckpointFileError, match="directory"):
        wn.report(nn.Linear(2, 2), tmp_path / "folder.html")


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"wn.checkpoints.inspect\(file\); got a str"):
        wn.report("model.pt", tmp_path / "a.html")  # type: ignore[arg-type]
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    found = wn.checkpoints.inspect(tmp_path / "a.pt")
    with pytest.raises(TypeError, match="are for a model"):
        wn.report(found, tmp_path / "a.html", rules="linears")
    assert not (tmp_path / "a.html").exists()
