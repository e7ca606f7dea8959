"""`report.html`: one page, no outside files, with what a person wants to see of a run."""

from __future__ import annotations

import io
import math
import os
from typing import Any

import jinja2
from markupsafe import Markup

from recfast.files import disk_errors, write_text

# One colour for one thing on the whole page; distinguishable for the colour-blind (Okabe and Ito).
OURS, SECOND, THIRD, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8f98"


# Of the kinds of re-rankers; the one that was chosen is in OURS.
_KIND_COLOURS = {
    "DPP": "#0072b2",
    "KDPP": "#cc79a7",
    "MMR": SECOND,
    "MSD": "#b58900",
    "SSD": THIRD,
    "XQuAD": "#56b4e9",
}
_KIND_MARKERS = {"DPP": "o", "KDPP": "v", "MMR": "^", "MSD": "D", "SSD": "s", "XQuAD": "P"}


def write(path: str | os.PathLike[str], metrics: dict[str, Any]) -> None:
    """Draw the page for what `cascade.run` measured (`metrics.json`) and write it, whole or not at all."""
    page = render(metrics)
    with disk_errors("report", path):
        write_text(path, page)


def render(metrics: dict[str, Any]) -> str:
    """The page as a string."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("recfast", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=_number, percent=_percent, signed=_signed, seconds=_seconds, bytes=_bytes)
    plots = {name: Markup(draw(metrics)) for name, draw in _PLOTS.items()}
    return environment.get_template("report.html").render(m=metrics, plots=plots)


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _signed(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:+.{digits}f} %".replace("-", "−")


def _seconds(value: float) -> str:
    if value >= 60:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    if value >= 1:
        return f"{value:.1f} s"
    return f"{1e3 * value:.0f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} µs"


def _bytes(value: float) -> str:
    scale = 0
    while value >= 1000 and scale < 3:
        value, scale = value / 1000, scale + 1
    return f"{value:.3g} {('B', 'kB', 'MB', 'GB')[scale]}"


def new_figure(width: float = 5.2, height: float = 3.1, columns: int = 1):
    """Matplotlib's figure and axes in the page's style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
            "font.family": "sans-serif",
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#b9bec7",
            "axes.labelcolor": "#3d4450",
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e8eaee",
            "xtick.color": "#5b6270",
            "ytick.color": "#5b6270",
            "legend.frameon": False,
        }
    )
    return pyplot.subplots(1, columns, figsize=(width * columns, height), layout="constrained")


def _svg(figure) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _data(metrics: dict[str, Any]) -> str:
    data = metrics["data"]
    figure, (left, right) = new_figure(columns=2)
    counts = data["item_counts"]
    left.loglog(range(1, len(counts) + 1), counts, color=OURS, linewidth=2)
    left.set(title="Items by popularity", xlabel="item, most liked first", ylabel="likes in the training rows")
    edges, heights = data["history_histogram"]["edges"], data["history_histogram"]["counts"]
    right.stairs(heights, edges, fill=True, color=THIRD, alpha=0.85)
    right.set(title="Likes per user", xlabel="likes before the test rows", ylabel="users")
    right.set_xlim(edges[0], edges[-1])
    return _svg(figure)


def _learning(metrics: dict[str, Any]) -> str:
    stages = [("retriever", metrics["retriever"]), ("ranker", metrics["ranker"])]
    if metrics.get("second_ranker"):
        stages.append(("second ranker", metrics["second_ranker"]))
    figure, axes = new_figure(width=3.6, columns=len(stages))
    for axis, (stage, result) in zip(axes, stages, strict=True):
        history = result["history"]
        epochs = [entry["epoch"] + 1 for entry in history]
        axis.plot(epochs, [entry.get("loss", math.nan) for entry in history], color=GREY, marker="o", markersize=3)
        axis.set(title=f"{result['model']} ({stage})", xlabel="epoch")
        axis.set_ylabel("training loss", color=GREY)
        other = axis.twinx()
        monitor = result["monitor"]
        other.plot(epochs, [entry[monitor] for entry in history], color=OURS, marker="o", markersize=3)
        other.axvline(result["best_epoch"] + 1, color=OURS, linewidth=0.8, linestyle=":")
        other.set_ylabel(f"validation {monitor}", color=OURS)
        other.grid(visible=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)


def _recall(metrics: dict[str, Any]) -> str:
    curve = metrics["retriever"]["recall_curve"]
    figure, axis = new_figure(width=6.4, height=3.6)
    name = metrics["retriever"]["model"]
    axis.plot(curve["k"], curve["exact"], color=OURS, linewidth=2, label=f"{name}, exact search")
    axis.plot(curve["k"], curve["codes"], color=SECOND, linewidth=2, linestyle="--", label=f"{name}, codes (CodeIndex)")
    axis.plot(curve["k"], curve["item_knn"], color=THIRD, label="item-kNN")
    axis.plot(curve["k"], curve["popularity"], color=GREY, label="popularity")
    axis.set(title="Recall against the length of the list", xlabel="items retrieved", ylabel="recall of held-out likes")
    axis.set_ylim(bottom=0)
    axis.legend()
    return _svg(figure)


def _tradeoff(metrics: dict[str, Any]) -> str:
    rerank = metrics["rerank"]
    figure, (axis, other) = new_figure(width=5.2, height=3.8, columns=2)
    k = rerank["k"]
    for key, label, colour, marker in (
        ("global", "the same for every user", GREY, "s"),
        ("personal", f"personal ({rerank['kind']})", OURS, "o"),
    ):
        points = rerank["curve"][key]
        axis.plot(
            [point["ild"] for point in points],
            [point["ndcg"] for point in points],
            color=colour,
            marker=marker,
            markersize=4,
            label=label,
        )
    for kind, points in rerank["kinds"].items():
        ours = kind == rerank["kind"]
        other.plot(
            [point["ild"] for point in points],
            [point["ndcg"] for point in points],
            color=OURS if ours else _KIND_COLOURS[kind],
            linewidth=2.2 if ours else 1.2,
            marker="o" if ours else _KIND_MARKERS[kind],
            markersize=4,
            label=kind,
            zorder=3 if ours else 2,
        )
    for panel in (axis, other):
        panel.plot(rerank["before"]["ild"], rerank["before"]["ndcg"], "k*", markersize=11, label="ranker's order")
        panel.axhline(0.97 * rerank["before"]["ndcg"], color="#c0c4cc", linewidth=0.9, linestyle="--")
        panel.annotate(
            "3 % less NDCG",
            (1, 0.97 * rerank["before"]["ndcg"]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
        )
        panel.set(xlabel=f"intra-list diversity@{k} of genres", ylabel=f"NDCG@{k}")
        panel.legend(loc="lower left")
    axis.plot(
        rerank["after"]["ild"], rerank["after"]["ndcg"], "o", color=SECOND, markersize=9, label="chosen on validation"
    )
    axis.legend(loc="lower left")
    axis.set(title="Relevance against diversity")
    other.set(title="Every kind of re-ranker")
    return _svg(figure)


def _time(metrics: dict[str, Any]) -> str:
    stages = list(metrics["time"].items())
    figure, axis = new_figure(width=6.4, height=0.6 + 0.28 * len(stages))
    names, values = [name for name, _ in stages][::-1], [value for _, value in stages][::-1]
    bars = axis.barh(names, values, color=OURS, height=0.62)
    axis.bar_label(bars, [_seconds(value) for value in values], padding=4, color="#3d4450")
    axis.set_xlim(0, max(values) * 1.18)
    axis.set(title="Time per stage", xlabel="seconds")
    axis.grid(visible=False, axis="y")
    return _svg(figure)


_PLOTS = {"data": _data, "learning": _learning, "recall": _recall, "tradeoff": _tradeoff, "time": _time}
