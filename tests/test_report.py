"""The page stands alone: whole HTML, no outside file, every figure that was measured in it."""

from __future__ import annotations

import copy
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from recfast import report
from recfast.errors import InputError

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects text, ids and references, and finds tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.note(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.note(tag, attributes)

    def note(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def metrics(tiny_run):
    return json.loads((tiny_run / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(tiny_run):
    return (tiny_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_needs_no_other_file(page, text):
    assert page.references
    assert all(reference.startswith("#") for reference in page.references), set(page.references)
    assert not re.search(r"@import|<script|<iframe|<link", text)


def test_every_reference_leads_to_one_place(page):
    for reference in set(page.references):
        assert page.ids.count(reference[1:]) == 1, reference


def test_the_plots_are_whole_and_labelled(text):
    plots = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(plots) == 5
    words = []
    for plot in plots:
        root = ElementTree.fromstring(plot)
        words.append(" ".join("".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")))
    for plot, wanted in zip(
        words,
        ("Items by popularity", "training loss", "item-kNN", "intra-list diversity", "Time per stage"),
        strict=True,
    ):
        assert wanted in plot


def test_every_figure_is_on_the_page(page, metrics):
    text = page.text
    for row in metrics["retriever"]["table"]:
        for key in ("recall@10", "recall@20", "recall@50", "recall@100", "ndcg@10"):
            assert f"{row[key]:.4f}" in text
    for row in metrics["ranking_table"]:
        for key in ("auc", "gauc", "logloss"):
            assert f"{row[key]:.4f}" in text
        assert row["model"] in text
    for row in ("retriever_order", "before", "after"):
        for key in ("ndcg", "recall", "ild"):
            assert f"{metrics['rerank'][row][key]:.4f}" in text
    assert "DPP, trade-off" in text
    for row in metrics["rerank"]["kinds"]["DPP"]:
        for key in ("ndcg", "recall", "ild"):
            assert f"{row[key]:.4f}" in text
    for split in ("train", "valid", "test"):
        assert f"{metrics['data']['splits'][split]['rows']:,}" in text
    assert f"{metrics['data']['users']:,} users, {metrics['data']['items']:,} items" in text
    assert f"seed {metrics['seed']}" in text
    assert metrics["command"] in text
    assert metrics["machine"]["cpu"]["isa"] in text


def test_users_and_their_lists(page, metrics):
    assert 1 <= len(metrics["users"]) <= 10
    assert page.counts["ol"] == 2 * len(metrics["users"])
    shown = [item for user in metrics["users"] for order in ("before", "after") for item in user[order]]
    assert page.counts["li"] == len(shown)
    for user in metrics["users"]:
        assert f"User {user['user']}" in page.text
    for item in shown:
        assert " ".join(item["title"].split()) in page.text


def test_what_people_wrote_is_text_not_markup(metrics):
    changed = copy.deepcopy(metrics)
    changed["users"][0]["after"][0]["title"] = "<script>alert('x')</script>"
    changed["name"] = "a & b <i>"
    text = report.render(changed)
    assert "<script" not in text
    assert html.escape("a & b <i>") in text
    Page(text)


def test_figures_that_do_not_exist_are_a_dash(metrics):
    changed = copy.deepcopy(metrics)
    changed["rerank"]["change"] = dict.fromkeys(changed["rerank"]["change"])
    changed["second_ranker"] = None
    changed["tables"] = {
        "seeds": [0, 1],
        "int8": {"auc": [0.5, 0.6125], "mean": 0.55625, "table_bytes": 10},
        "float32": {"auc": [0.5, 0.6], "mean": 0.55, "table_bytes": 40_000},
    }
    page = Page(report.render(changed))
    assert "diversity after re-ranking" in page.text
    assert "0.6125" in page.text
    assert "40 kB" in page.text


def test_write_is_whole_or_not_at_all(metrics, tmp_path, monkeypatch):
    report.write(tmp_path / "r.html", metrics)
    before = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert before.endswith("</html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"report: .*r\.html cannot be written, not a directory|file exists"):
        report.write(tmp_path / "file" / "r.html", metrics)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0004, "400 µs"), (0.25, "250 ms"), (1.5, "1.5 s"), (59.96, "60.0 s"), (125.0, "2 min 5 s")],
)
def test_seconds(value, expected):
    assert report._seconds(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(5, "5 B"), (1234, "1.23 kB"), (5e6, "5 MB"), (2.5e12, "2.5e+03 GB")])
def test_bytes(value, expected):
    assert report._bytes(value) == expected


def test_signed():
    assert report._signed(0.123) == "+12.3 %"
    assert report._signed(-0.05, 0) == "−5 %"
    assert report._signed(None) == "–"
