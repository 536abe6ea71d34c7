"""The arithmetic of benchmarks, and what it prints; nothing here measures anything."""

import json
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import bars, report
from tests.bench.measure import Column, Runs, Target, aligned, percentile, spread, table, verdicts


@pytest.fixture
def runs() -> Runs:
    """Two rounds of three systems; in the second everything is half as fast."""
    runs = Runs()
    runs.add("pump", ["one", "two"], 0, {"rate": 1000.0, "cpu": 0.5})
    runs.add("relay", ["one"], 0, {"rate": 600.0, "cpu": 1.0})
    runs.add("node", ["one"], 0, {"rate": 300.0})
    runs.add("go", ["one"], 0, {"rate": 400.0})
    runs.add("relay", ["one"], 1, {"rate": 300.0, "cpu": 2.2})
    runs.add("node", ["one"], 1, {"rate": 250.0})
    runs.add("go", ["one"], 1, {"rate": 200.0})
    runs.add("pump", ["one", "two"], 1, {"rate": 500.0, "cpu": 1.0})
    return runs


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (50, 50), (50.1, 51), (99, 99), (99.5, 100), (100, 100)]
)
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(
    percent: float, value: float
) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_a_percentile_of_nothing_is_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


def test_a_spread_has_the_median_and_both_ends() -> None:
    found = spread([3.0, 1.0, 8.0, 2.0])
    assert found is not None
    assert (found.median, found.low, found.high, found.count) == (2.5, 1.0, 8.0, 4)
    assert found.text(1) == "2.5 (1.0–8.0)"


def test_one_value_has_no_spread_to_show_and_none_is_none() -> None:
    alone = spread([1.25])
    assert alone is not None
    assert alone.text(2) == "1.25"
    assert spread([]) is None


def test_ratios_are_taken_within_a_round(runs: Runs) -> None:
    # The ratio of the medians would be 2.13.
    assert runs.ratios("one", "relay", "cpu", ["pump"]) == [2.0, 2.2]


def test_of_several_others_the_best_of_each_round_counts(runs: Runs) -> None:
    assert runs.ratios("one", "relay", "rate", ["node", "go"]) == [1.5, 1.2]
    assert runs.ratios("one", "relay", "rate", ["node", "go"], min) == [2.0, 1.5]


def test_a_run_that_serves_several_cases_is_in_each(runs: Runs) -> None:
    assert runs.cases() == ["one", "two"]
    assert runs.systems("two") == ["pump"]
    assert runs.values("two", "pump", "rate") == [1000.0, 500.0]


def test_rounds_without_the_other_side_are_left_out(runs: Runs) -> None:
    assert runs.ratios("one", "relay", "rate", ["nobody"]) == []
    assert runs.ratios("one", "relay", "rate", []) == []
    assert runs.ratios("one", "node", "cpu", ["pump"]) == []


def test_a_table_has_a_row_for_each_system_and_no_empty_column(runs: Runs) -> None:
    columns = [
        Column("MiB/s", "rate", 0),
        Column("/ pump", "cpu", 1, ["pump"]),
        Column("/ nobody", "cpu", bases=[]),
        Column("cores", "rate", 0, brief=True),
    ]
    assert table(runs, "one", columns) == [
        "one             MiB/s         / pump  cores",
        "pump   750 (500–1000)  1.0 (1.0–1.0)    750",
        "relay   450 (300–600)  2.1 (2.0–2.2)    450",
        "node    275 (250–300)                   275",
        "go      300 (200–400)                   300",
    ]


def test_cells_stand_below_each_other() -> None:
    assert aligned([["a", "wide headline", "unused"], ["longer", "1", ""]]) == [
        "a       wide headline",
        "longer              1",
    ]


@pytest.mark.parametrize(
    ("bound", "at_most", "met"), [(2.0, True, True), (1.9, True, False), (2.0, False, True)]
)
def test_a_target_is_met_by_the_median(bound: float, at_most: bool, met: bool) -> None:
    target = Target(what="x", measured=spread([1.0, 2.0, 9.0]), bound=bound, at_most=at_most)
    assert target.met is met


def test_a_target_that_was_not_measured_is_neither_met_nor_missed() -> None:
    target = Target(what="rate", measured=None, bound=1.3, at_most=False)
    assert target.met is None
    assert verdicts([target]) == [
        "target  wanted           met",
        "rate     ≥ 1.3  not measured",
    ]


def test_the_picture_is_xml_and_tells_each_median(runs: Runs) -> None:
    drawn = bars.draw(runs, Column("MiB/s", "rate", 0), "title & more", "what it ran on")
    texts = [node.text for node in ElementTree.fromstring(drawn).iter() if node.text]  # noqa: S314
    assert "450 (300–600)" in texts
    assert "title & more: MiB/s" in texts


def test_the_document_has_every_run(runs: Runs, tmp_path: Path) -> None:
    options = Namespace(json=tmp_path / "x.json", plot=tmp_path / "x.svg", rounds=2)
    column = Column("MiB/s", "rate", 0)
    done = report.Report("x", options, [column], {"relay": "1", "rabbitmq": "3"}, column, runs)
    missed = Target(what="rate", measured=spread([1.0]), bound=1.3, at_most=False)
    assert done.finish([]) == report.OK
    assert done.finish([missed]) == report.MISSED
    written = json.loads(options.json.read_text())
    assert len(written["runs"]) == 8
    assert written["runs"][0]["figures"] == {"rate": 1000.0, "cpu": 0.5}
    assert written["targets"][0]["met"] is False
    assert written["machine"]["cores"] > 0
    assert options.plot.read_text().startswith("<svg")


def test_lists_on_the_command_line_are_of_what_there_is() -> None:
    assert report.some_of(["none", "quorum"])("quorum,none") == ["quorum", "none"]
    with pytest.raises(ArgumentTypeError, match="must be some of"):
        report.some_of(["none"])("other")
    assert report.numbers("1,16") == [1, 16]
    with pytest.raises(ArgumentTypeError, match="positive"):
        report.numbers("0")
