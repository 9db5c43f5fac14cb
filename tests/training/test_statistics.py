"""Statistics of g and ‖v‖, their history and its picture."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wn_surgery as wn
from wn_surgery.training.statistics import History


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 3, 5), nn.Linear(3, 2))
    wn.apply(net, [{"types": "Linear"}, {"types": "Conv1d", "dim": None}])
    return net.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["parametrized", "legacy"])
def test_values(dtype: torch.dtype, layout: str) -> None:
    net = model()
    with torch.no_grad():
        for site in wn.sites(net):
            assert site.held is not None and site.held.v is not None
            site.held.v.mul_(3)
    if layout == "legacy":
        wn.migrate(net, to="legacy")
    net = net.to(dtype)
    optimizer = torch.optim.SGD(
        [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.5}], lr=0.1
    )
    found = wn.statistics(net, [optimizer])
    assert [site.name for site in found.sites] == ["0.weight", "1.weight", "2.weight"]
    for said, site, lr in zip(found.sites, wn.sites(net), (0.1, 0.5, None), strict=True):
        assert site.held is not None and site.held.g is not None and site.held.v is not None
        g = site.held.g.detach().double().flatten()
        v = site.held.v.detach().double()
        norms = v.flatten(1).norm(dim=1) if site.dim == 0 else v.norm().flatten()
        for three, values in ((said.g, g), (said.v_norm, norms)):
            expected = [float(values.min()), float(values.mean()), float(values.max())]
            assert three == pytest.approx(expected, rel=1e-5)
        if lr is None:
            assert said.effective_lr is None
        else:
            assert said.effective_lr == pytest.approx(float((lr / norms**2).mean()), rel=1e-5)
    assert found.summary()["g_max"] == pytest.approx(max(site.g[2] for site in found.sites))
    metrics = found.metrics("wn/")
    assert metrics["wn/1.weight/v_norm"] == found.sites[1].v_norm[1]
    assert "wn/2.weight/effective_lr" not in metrics and "wn/effective_lr_mean" in metrics
    assert "1.weight" in str(found)


def test_models_without_weight_norm_have_none() -> None:
    found = wn.statistics(nn.Linear(2, 2))
    assert found.sites == () and found.summary() == {} and found.metrics() == {}


def test_no_gradient_is_recorded_and_nothing_changes() -> None:
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = wn.statistics(net)
    assert not found.sites[0].g_values.requires_grad
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    with pytest.raises(TypeError, match="optimizers holds a str"):
        wn.statistics(net, ["sgd"])


def recorded(steps: int = 4) -> History:
    net, history = model(), History()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.1)
        history.add(10 * step, wn.statistics(net, [optimizer]))
    return history


def test_the_old_path_of_history_and_a_short_repr() -> None:
    old: Any = importlib.import_module("wn_surgery.history")
    assert old.History is History
    assert repr(wn.statistics(nn.Linear(2, 2))) == "<Statistics of 0 sites>"


def test_history_keeps_numbers_alone() -> None:
    history = recorded()
    assert history.steps == [10, 20, 30, 40]
    first, last = history.records[0]["0.weight"], history.records[-1]["0.weight"]
    assert last["g"] == pytest.approx(first["g"] * 1.1**3)
    assert last["effective_lr"] == pytest.approx(first["effective_lr"] * 1.1**-6)
    assert all(type(value) is float for value in last.values())


def test_one_figure_for_the_whole_model(tmp_path: Path) -> None:
    figure = recorded().plot()
    assert [axes.get_title() for axes in figure.axes] == ["g", "‖v‖", "lr/‖v‖²"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.get_lines()] == [
            "0.weight",
            "1.weight",
            "2.weight",
        ]
        assert list(axes.get_lines()[0].get_xdata()) == [10, 20, 30, 40]
    figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000


def test_plotting_without_matplotlib_or_records(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing has been recorded"):
        History().plot()
    history: Any = recorded(1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wn-surgery\[plot\]'"):
        history.plot()
