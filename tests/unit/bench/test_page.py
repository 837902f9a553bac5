"""The page and the chart say what their JSON says."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench.chart import chart
from bench.page import BEGIN, END, figures, read, replaced, to_json, write_docs
from bench.records import Record, beside, record

DOCS = Path(__file__).parents[3] / "docs"
ABOUT = {
    "cpu": "A CPU",
    "cores": 2,
    "memory_mib": 1024,
    "accelerator": "tcg",
    "kernel": "6.1",
    "guest": "6.1-vmruntime",
    "python": "3.11",
    "qemu": "QEMU 7",
    "containerd": "containerd 1.6",
    "runc": "runc 1.1",
    "skopeo": "skopeo 1.9",
    "date": "2030-01-02",
    "seconds": 780,
    "load_before": 0.1,
    "load_after": 2.0,
    "one_run": True,
}


def cold(ratio: float = 1.0) -> Record:
    more = [beside("containerd and runc, the same call", [2000.0 * ratio], [100.0])]
    words = "QEMU alone: the same"
    return record(
        "sandbox_start_cold", "ms", [2000.0 * ratio], peer=words, peer_values=[2000.0], extra={"beside": more}
    )


def test_the_page_and_the_chart_are_what_their_json_renders_to() -> None:
    text = (DOCS / "performance.json").read_text()
    about, records = read(text)
    assert to_json(about, records) == text
    page = (DOCS / "performance.md").read_text()
    assert replaced(page, figures(about, records)) == page, "run `make bench-docs`"
    assert chart(records) == (DOCS / "performance.svg").read_text(), "run `make bench-docs`"


def test_the_table_names_measures_peers_and_promises() -> None:
    lines = figures(ABOUT, [cold()]).splitlines()
    assert lines[0].startswith("Made on 2030-01-02 in one run of 13 minutes: A CPU, 2 cores")
    assert "TCG" in lines[0]
    assert lines[4] == (
        "| `sandbox_start_cold`: RunPodSandbox when the guest boots | 2000 ms | 2000 ms | 1 | QEMU alone: the same "
        "| 2000 ms | 1 | kept: at most 1.25 times the peer, p50 |"
    )
    assert lines[5] == "|  |  |  |  | containerd and runc, the same call | 100 ms | 20 |  |"


def test_a_table_of_several_runs_is_said_to_be_so() -> None:
    assert "in several runs" in figures({**ABOUT, "one_run": False}, [])


def test_a_promise_that_is_not_kept_is_said_to_be_so() -> None:
    assert "**not kept**: at most 1.25" in figures(ABOUT, [cold(1.3)])


def test_a_variant_of_a_measure_has_its_own_figure() -> None:
    more = [beside("veth", [10.0], [40.0], what="to the pod")]
    one = record("net_throughput", "MiB/s", [50.0], peer="veth", peer_values=[100.0], extra={"beside": more})
    assert "| … to the pod | 10 MiB/s |  |  | veth | 40 MiB/s | 0.25 |  |" in figures(ABOUT, [one])


def test_the_chart_is_valid_and_to_scale() -> None:
    text = chart([cold(), record("exec_sync", "ms", [1.0])])
    root = ET.fromstring(text)
    bars = [
        (bar.get("class"), float(bar.get("width", "")))
        for bar in root.iter("{http://www.w3.org/2000/svg}rect")
        if bar.get("height") == "16"
    ]
    assert [kind for kind, _ in bars] == ["ours", "qemu", "containerd"]
    assert bars[0][1] == bars[1][1] == pytest.approx(20 * bars[2][1])
    assert "exec_sync" not in text
    assert "prefers-color-scheme: dark" in text
    assert len(re.findall(r"\.(?:ours|qemu|containerd) \{", text)) == 6  # each has a colour in light and in dark


def test_a_chart_of_nothing_is_still_one() -> None:
    assert ET.fromstring(chart([])).tag.endswith("svg")


def test_a_run_is_put_into_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page = tmp_path / "latest.json", tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\noutdated\n{END}\nafter\n")
    assert "make bench" in str(write_docs(results, tmp_path))
    results.write_text(to_json(ABOUT, [record("exec_sync", "ms", [1.0]), cold()]))
    assert write_docs(results, tmp_path) is None
    names = [one.get("measure") for one in json.loads((tmp_path / "performance.json").read_text())[1:]]
    assert names == ["sandbox_start_cold", "exec_sync"]  # in the order of the page
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\nMade on")
    assert text.endswith(f"{END}\nafter\n")
    assert "outdated" not in text
    assert "not measured in this run: sandbox_start_template" in capsys.readouterr().err
