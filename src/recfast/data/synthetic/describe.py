"""The figures by which a generated log is held beside a real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl


def zipf_slope(counts: np.ndarray, first: int = 10, last: int = 2000) -> float:
    """Slope of log count against log rank between two ranks, by least squares; nan below five ranks."""
    sorted_counts = np.sort(counts[counts > 0])[::-1][first - 1 : last]
    if len(sorted_counts) < 5:
        return float("nan")
    rank = np.arange(first, first + len(sorted_counts))
    return float(np.polyfit(np.log(rank), np.log(sorted_counts), 1)[0])


def describe(frame: pl.DataFrame, *, n_items: int | None = None) -> dict[str, Any]:
    """Figures of a log of impressions with the columns of `Generator.part`.

    Parameters
    ----------
    frame : polars.DataFrame
        user, item, time, session, position, click, and where there are any conversion, random, scenario.
    n_items : int, optional
        Size of the catalogue, for the share that is never shown.

    Returns
    -------
    dict
        Counts; `ctr`, over all and by position; slopes of Zipf's law of impressions and clicks (ranks 10 to 2
        000); `top_1_percent`, the share of impressions that the most shown hundredth of the items takes;
        quantiles of sessions per user; clicks per user, and the share of users below five of them.
    """
    shown = frame.group_by("item").agg(n=pl.len(), clicks=pl.col("click").sum())
    counts, clicks = shown["n"].to_numpy(), shown["clicks"].to_numpy()
    users = frame.group_by("user").agg(sessions=pl.col("session").n_unique(), clicks=pl.col("click").sum())
    sessions, positives = users["sessions"].to_numpy(), users["clicks"].to_numpy()
    positions = frame.group_by("position").agg(pl.col("click").mean()).sort("position")
    top = np.sort(counts)[::-1][: max(1, round(len(counts) / 100))].sum()
    out: dict[str, Any] = {
        "rows": frame.height,
        "sessions": frame["session"].n_unique(),
        "users": users.height,
        "items": shown.height,
        "days": round((frame["time"].max() - frame["time"].min()) / 86_400, 2),
        "ctr": round(float(frame["click"].mean()), 4),
        "ctr_by_position": dict(
            zip(positions["position"].to_list(), positions["click"].round(4).to_list(), strict=True)
        ),
        "zipf_impressions": round(zipf_slope(counts), 3),
        "zipf_clicks": round(zipf_slope(clicks), 3),
        "top_1_percent": round(float(top / counts.sum()), 4),
        "sessions_per_user": {
            "median": float(np.median(sessions)),
            "mean": round(float(sessions.mean()), 2),
            "p99": float(np.quantile(sessions, 0.99)),
        },
        "clicks_per_user": round(float(positives.mean()), 2),
        "users_below_5_clicks": round(float((positives < 5).mean()), 4),
    }
    if n_items is not None:
        out["never_shown"] = round(1 - shown.height / n_items, 4)
    if "conversion" in frame.columns:
        clicked = frame.filter(pl.col("click") == 1)
        out["cvr"] = round(float(clicked["conversion"].mean() or 0.0), 4)
    if "random" in frame.columns:
        out["random_share"] = round(float(frame["random"].mean()), 4)
    if "scenario" in frame.columns and frame["scenario"].n_unique() > 1:
        rates = frame.group_by("scenario").agg(pl.len(), pl.col("click").mean()).sort("len", descending=True)
        out["ctr_by_scenario"] = {name: round(rate, 4) for name, _, rate in rates.iter_rows()}
    return out
