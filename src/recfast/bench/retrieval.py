"""Recall against queries per second, of every index there is, on the user's own items.

`run` measures all of `CONTENDERS`; `register` adds one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recfast import doctor
from recfast.errors import InputError
from recfast.files import atomic_path, disk_errors, write_json
from recfast.index import CodeIndex, DenseIndex
from recfast.nn import ProductQuantizer, ResidualKMeans, Tokenizer

FORMAT = 1
# Numbers held at once, of scores [queries, items] and of vectors looked up: 256 MiB of float32.
_CELLS = 1 << 26


# -- what is searched ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Items, queries and how many are wanted; the score is the inner product.

    Attributes
    ----------
    items : Tensor [N, D], float32
    queries : Tensor [Q, D], float32
    k : int
    seed : int
        Of whatever is drawn at random in building.
    name : str
        Where they come from, in words.
    also : tuple of Contender
        Who takes part beside `CONTENDERS`.
    """

    items: Tensor
    queries: Tensor
    k: int = 100
    seed: int = 0
    name: str = ""
    also: tuple[Contender, ...] = ()
    _kept: dict[Any, tuple[Any, float]] = field(default_factory=dict, repr=False, compare=False)
    _spared: list[float] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        for what, vectors in (("items", self.items), ("queries", self.queries)):
            if vectors.dim() != 2 or 0 in vectors.shape:
                raise InputError(f"bench retrieval: {what} must have shape [N, D], got {list(vectors.shape)}")
            wrong = ~torch.isfinite(vectors).all(1)
            if bool(wrong.any()):
                raise InputError(f"bench retrieval: {what}[{int(wrong.nonzero()[0])}] must be finite")
        if self.items.shape[1] != self.queries.shape[1]:
            raise InputError(
                f"bench retrieval: queries must be as wide as items, {self.items.shape[1]}, got {self.queries.shape[1]}"
            )
        if not 1 <= self.k <= len(self.items):
            raise InputError(f"bench retrieval: k must be in [1, {len(self.items)}], got {self.k}")

    @property
    def dim(self) -> int:
        """D."""
        return self.items.shape[1]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, made once for all contenders; the time counts for each of them."""
        if key not in self._kept:
            start = time.perf_counter()
            made = make()
            self._kept[key] = made, time.perf_counter() - start
        else:
            self._spared.append(self._kept[key][1])
        return self._kept[key][0]

    def spared(self) -> float:
        """Seconds that `once` has spared since this was last asked."""
        seconds = sum(self._spared)
        self._spared.clear()
        return seconds


def from_run(folder: str | os.PathLike[str], n_queries: int, k: int, seed: int) -> Problem:
    """The item vectors of a finished run's retriever, and users drawn at random from those who liked anything.

    The run's own index takes part too.
    """
    from recfast.pipeline import Pipeline

    pipeline = Pipeline.load(Path(folder) / "pipeline")
    warm = (pipeline.catalogue.history.lengths() > 0).nonzero()[:, 0]
    if len(warm) == 0:
        raise InputError(f"bench retrieval: no user in {folder} has a history, expected one at least")
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(warm))[:n_queries])
    queries = pipeline.user_vectors(warm[drawn].sort().values)
    name = f"{type(pipeline.retriever).__name__} in {folder}"

    def search(run: _Run, queries: Tensor, k: int, _: Any) -> Tensor:
        table = run.quantizer.score_table(_widened(queries, run.quantizer.dim))
        # Item 1 of a run is in place 0; -1 stays.
        return (run.index.search(table, k)[1] - 1).clamp(min=-1)

    own = Contender("CodeIndex of the run", lambda _: _Run(pipeline), search)
    return Problem(pipeline.item_vectors, queries, k, seed, name, (own,))


class _Run:
    """The index that a run serves, and how it codes queries."""

    def __init__(self, pipeline: Any):
        self.quantizer, self.index = pipeline.quantizer, pipeline.index

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + sum(value.nbytes for value in self.quantizer.state_dict().values())


def from_files(items: str | os.PathLike[str], queries: str | os.PathLike[str], k: int, seed: int) -> Problem:
    """Two .npy files of floating-point numbers, [N, D] and [Q, D]."""
    return Problem(_read(items), _read(queries), k, seed, f"{items}, {queries}")


def _read(path: str | os.PathLike[str]) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "it is not a .npy file of numbers"
        raise InputError(f"bench retrieval: {path} cannot be read: {reason}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise InputError(f"bench retrieval: {path} must hold one array of floating-point numbers")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def generated(n_items: int, dim: int, n_queries: int, k: int, seed: int) -> Problem:
    """Items in clusters of very different sizes, with a decaying spectrum and norms that vary; queries likewise.

    4096 Gaussian clusters at most, of sizes proportional to rank^-0.8, whose coordinate i has the standard deviation
    i^-0.5; within a cluster 0.7 of that. Items have the length 1 times a lognormal factor (0.1), as popularity makes
    it; queries 0.9 within a cluster, and the length 1.
    """
    if min(n_items, dim, n_queries) < 1:
        raise InputError(
            "bench retrieval: numbers of items, dimensions and queries must be at least 1,"
            f" got {n_items}, {dim} and {n_queries}"
        )
    random = np.random.default_rng(seed)
    clusters = min(4096, max(1, n_items // 20))
    spectrum = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    centres = random.standard_normal((clusters, dim), dtype=np.float32) * spectrum
    share = np.arange(1, clusters + 1) ** -0.8

    def draw(count: int, spread: float) -> np.ndarray:
        which = random.choice(clusters, count, p=share / share.sum())
        points = centres[which] + spread * spectrum * random.standard_normal((count, dim), dtype=np.float32)
        return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)

    items = draw(n_items, 0.7) * np.exp(0.1 * random.standard_normal((n_items, 1), dtype=np.float32))
    queries = draw(n_queries, 0.9)
    return Problem(torch.from_numpy(items), torch.from_numpy(queries), k, seed, "generated")


# -- who takes part --------------------------------------------------------------------------------------------------


class Unfit(Exception):
    """Raised by `Contender.build` where an index cannot be had for these items; says why."""


@dataclass(frozen=True)
class Contender:
    """A way to search, with the settings between which it trades recall for speed.

    Attributes
    ----------
    name : str
        One curve of the picture.
    build : callable
        `build(problem)` -> whatever `search` needs, with an attribute `nbytes`. Raises `Unfit` where it cannot.
    search : callable
        `search(built, queries [Q, D], k, setting)` -> ids [Q, k], places of the items, -1 where there are none.
    settings : callable
        `settings(problem)` -> what `search` is given, one after the other.
    label : str
        What a setting is called; formatted with it.
    """

    name: str
    build: Callable[[Problem], Any]
    search: Callable[[Any, Tensor, int, Any], Tensor]
    settings: Callable[[Problem], Iterable[Any]] = field(default=lambda problem: (None,))
    label: str = ""


CONTENDERS: list[Contender] = []


def register(contender: Contender) -> Contender:
    """Let a contender take part in every run from now on."""
    if any(one.name == contender.name for one in CONTENDERS):
        raise ValueError(f"register: there is a contender {contender.name!r} already")
    CONTENDERS.append(contender)
    return contender


def _dense(kind: str, **options: Any) -> Callable[[Problem], DenseIndex]:
    return lambda problem: DenseIndex(problem.items, kind, **options)


def _search_dense(index: DenseIndex, queries: Tensor, k: int, setting: Any) -> Tensor:
    return index.search(queries, k)[1]


def _search_lists(index: DenseIndex, queries: Tensor, k: int, n_probe: int) -> Tensor:
    index.n_probe = n_probe
    return index.search(queries, k)[1]


def _search_graph(index: DenseIndex, queries: Tensor, k: int, ef: int) -> Tensor:
    index.ef_search = ef
    return index.search(queries, k)[1]


def _probes(problem: Problem) -> list[int]:
    lists = max(1, min(round(4 * len(problem.items) ** 0.5), len(problem.items) // 39))
    return [probe for probe in (1, 2, 4, 8, 16, 32, 64, 128, 256) if probe <= lists]


def _books(problem: Problem) -> list[int]:
    """Numbers of codebooks: one code for eight, four and two dimensions."""
    return sorted({max(1, -(-problem.dim // part)) for part in (8, 4, 2)})


def _padded(vectors: Tensor, books: int) -> Tensor:
    """With zeros behind them, so that their width can be cut into equal parts."""
    return F.pad(vectors, (0, -vectors.shape[1] % books))


class _PerSetting:
    """One index for each setting, made when it is first asked for; only the one in use is kept."""

    def __init__(self, make: Callable[[Any], Any]):
        self._make, self._setting, self.built = make, None, None

    def use(self, setting: Any) -> Any:
        """Build the index of a setting, unless it is there."""
        if self.built is None or setting != self._setting:
            self.built = None
            self.built, self._setting = self._make(setting), setting
        return self.built

    @property
    def nbytes(self) -> int:
        """Of the index in use."""
        return self.built.nbytes


def _faiss_codes(refine: int) -> Callable[[Problem], _PerSetting]:
    def build(problem: Problem) -> _PerSetting:
        if len(problem.items) < 256:
            raise Unfit("FAISS needs at least 256 items to learn codes of 8 bits")
        return _PerSetting(
            lambda books: DenseIndex(_padded(problem.items, books), "pq", n_codebooks=books, refine=refine)
        )

    return build


def _search_faiss_codes(indexes: _PerSetting, queries: Tensor, k: int, books: int) -> Tensor:
    return indexes.use(books).search(_padded(queries, books), k)[1]


class Coded:
    """A tokeniser, a `CodeIndex` of its codes, and perhaps the vectors to score the best candidates again.

    Parameters
    ----------
    tokenizer : Tokenizer
        Fitted. Its width may be larger than that of the items, which zeros then fill.
    items : Tensor [N, D]
    order : str
        Of `CodeIndex`: "none" for a plain scan, "lex" for items in the order of their codes.
    rescore : int
        So many times k candidates are scored again by the vectors; 0 for none.
    """

    def __init__(self, tokenizer: Tokenizer, items: Tensor, order: str, rescore: int = 0):
        self.tokenizer = tokenizer
        codes = tokenizer.encode(_widened(items, tokenizer.dim))
        self.index = CodeIndex(codes, tokenizer.n_codes, order=order)
        self.items, self.rescore = (items if rescore else None), rescore

    @property
    def nbytes(self) -> int:
        """Of the index, the centroids, and the vectors where they are kept."""
        tables = sum(value.nbytes for value in self.tokenizer.state_dict().values())
        return self.index.nbytes + tables + (0 if self.items is None else self.items.nbytes)

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> Tensor:
        """The ids [Q, k] of the best, from vectors to answer: the table of scores is part of the work."""
        table = self.tokenizer.score_table(_widened(queries, self.tokenizer.dim))
        if self.items is None:
            return self.index.search(table, k)[1]
        ids = self.index.search(table, min(self.rescore * k, len(self.items)))[1]
        # A few queries at a time, whose candidates stay in the cache.
        return torch.cat([self._best(q, found, k) for q, found in zip(queries.split(8), ids.split(8), strict=True)])

    def _best(self, queries: Tensor, ids: Tensor, k: int) -> Tensor:
        # Indexing with a matrix of ids takes several times as long as index_select, and bmm three times the product.
        rows = self.items.index_select(0, ids.clamp(min=0).flatten()).view(*ids.shape, -1)
        scores = rows.mul_(queries[:, None]).sum(2)
        return ids.gather(1, scores.masked_fill_(ids < 0, -torch.inf).topk(k, dim=1).indices)


def _widened(vectors: Tensor, width: int) -> Tensor:
    return F.pad(vectors, (0, width - vectors.shape[1]))


def _product(order: str, rescore: int = 0) -> Callable[[Problem], _PerSetting]:
    def build(problem: Problem) -> _PerSetting:
        def make(books: int) -> Coded:
            padded = _padded(problem.items, books)
            tokenizer = problem.once(
                ("product", books), lambda: ProductQuantizer(padded.shape[1], books, 256).fit(padded, problem.seed)
            )
            return Coded(tokenizer, problem.items, order, rescore)

        return _PerSetting(make)

    return build


def _residual(order: str, rescore: int = 0) -> Callable[[Problem], _PerSetting]:
    def build(problem: Problem) -> _PerSetting:
        def make(levels: int) -> Coded:
            # Not normalised: the scores shall be near, which ids of items need not be.
            tokenizer = problem.once(
                ("residual", levels),
                lambda: ResidualKMeans(problem.dim, levels, 256, normalize=False).fit(problem.items, problem.seed),
            )
            return Coded(tokenizer, problem.items, order, rescore)

        return _PerSetting(make)

    return build


def _search_coded(indexes: _PerSetting, queries: Tensor, k: int, setting: int) -> Tensor:
    return indexes.use(setting).search(queries, k)


for _contender in (
    Contender("FAISS flat", _dense("flat"), _search_dense),
    Contender("FAISS IVF", _dense("ivf"), _search_lists, _probes, "n_probe={}"),
    Contender("CodeIndex PQ, plain", _product("none"), _search_coded, _books, "M={}"),
    Contender("CodeIndex PQ, block-max", _product("lex"), _search_coded, _books, "M={}"),
    Contender("CodeIndex PQ, 10 x k re-scored", _product("lex", 10), _search_coded, _books, "M={}"),
    Contender("CodeIndex residual, plain", _residual("none"), _search_coded, lambda problem: (4, 8), "M={}"),
    Contender("CodeIndex residual, block-max", _residual("lex"), _search_coded, lambda problem: (4, 8), "M={}"),
    Contender(
        "CodeIndex residual, 10 x k re-scored", _residual("lex", 10), _search_coded, lambda problem: (4, 8), "M={}"
    ),
    Contender("FAISS PQ", _faiss_codes(0), _search_faiss_codes, _books, "M={}"),
    Contender("FAISS PQ, 10 x k re-scored", _faiss_codes(10), _search_faiss_codes, _books, "M={}"),
    # Last, since it takes longest to build.
    Contender(
        "FAISS HNSW",
        _dense("hnsw"),
        _search_graph,
        # A search keeps k candidates at least.
        lambda problem: [problem.k << step for step in range(5)],
        "ef={}",
    ),
):
    register(_contender)


# -- how they are measured -------------------------------------------------------------------------------------------


def exact_bounds(problem: Problem) -> np.ndarray:
    """The k-th best score of each query, [Q] float64, less what float32 cannot tell: an item at or above it counts."""
    rows = max(1, _CELLS // max(len(problem.items), problem.k * problem.dim))
    bounds = []
    for queries in problem.queries.split(rows):
        best = (queries @ problem.items.T).topk(problem.k, dim=1).indices
        scores = torch.einsum("qd,qkd->qk", queries.double(), problem.items[best].double())
        bounds.append(scores.min(1).values)
    length = problem.queries.double().norm(dim=1) * float(problem.items.norm(dim=1).max())
    return (torch.cat(bounds) - 1e-6 * length).numpy()


def recall(problem: Problem, ids: Tensor, bounds: np.ndarray) -> float:
    """The share of the k best that were found, where an item as good as the k-th is as good an answer.

    An item that is named twice for a query counts once.
    """
    rows = max(1, _CELLS // (ids.shape[1] * problem.dim))
    found = 0
    for queries, named, least in zip(
        problem.queries.split(rows), ids.split(rows), torch.from_numpy(bounds).split(rows), strict=True
    ):
        named = named.sort(dim=1).values
        new = F.pad(named[:, 1:] != named[:, :-1], (1, 0), value=True)
        scores = torch.einsum("qd,qkd->qk", queries.double(), problem.items[named.clamp(min=0)].double())
        found += int(((named >= 0) & new & (scores >= least[:, None])).sum())
    return found / ids.numel()


def queries_per_second(search: Callable[[Tensor], Any], queries: Tensor, batch: int, seconds: float) -> float:
    """Batches of queries, one after the other, for so long, and three of them at least unless they take longer."""
    batches = [part for part in queries.split(batch) if len(part) == min(batch, len(queries))]
    search(batches[0])
    done, calls, start = 0, 0, time.perf_counter()
    while True:
        part = batches[calls % len(batches)]
        search(part)
        done, calls = done + len(part), calls + 1
        spent = time.perf_counter() - start
        if spent >= seconds and (calls >= 3 or spent >= 3 * seconds):
            return done / spent


def run(
    problem: Problem,
    *,
    threads: int | None = None,
    batch: int = 256,
    limit: float = 600.0,
    seconds: float = 0.3,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure every contender: `CONTENDERS` and those of the problem.

    Parameters
    ----------
    problem : Problem
    threads : int, optional
        What "all" means; torch's number where left out. One thread is measured always.
    batch : int
        Queries a call, beside one.
    limit : float
        Seconds; contenders and settings that are not begun by then are left out and named. What is being built or
        measured is not broken off.
    seconds : float
        For each figure of queries per second.
    only : names or parts of names
        Who takes part; everybody where empty.
    say : callable
        Told what goes on.

    Returns
    -------
    dict
        JSON-able: data, machine, k, threads, batch; results: one dict a contender with name and points, each with
        setting, recall, build_seconds, bytes_per_item, and qps: one dict (threads, batch, qps) for each number of
        threads and batch size; left_out: name and why.

    Raises
    ------
    InputError
        A name in `only` that fits nobody; batch, threads, limit or seconds out of range.
    """
    if batch < 1 or (threads is not None and threads < 1) or not limit > 0 or not seconds > 0:
        raise InputError("bench retrieval: batch, threads, limit and seconds must be positive")
    everybody = [*CONTENDERS, *problem.also]
    for name in only:
        if not any(name.lower() in one.name.lower() for one in everybody):
            known = ", ".join(one.name for one in everybody)
            raise InputError(f"bench retrieval: nothing is called {name!r}, expected part of one of: {known}")
    chosen = [one for one in everybody if not only or any(name.lower() in one.name.lower() for name in only)]
    before = torch.get_num_threads()
    every = before if threads is None else threads
    machine = doctor.config()
    result: dict[str, Any] = {
        "format": FORMAT,
        "data": {
            "name": problem.name,
            "items": len(problem.items),
            "dim": problem.dim,
            "queries": len(problem.queries),
            "seed": problem.seed,
        },
        "machine": {key: machine[key] for key in ("recfast", "python", "system", "packages", "cpu")},
        "k": problem.k,
        "threads": every,
        "batch": batch,
        "results": [],
        "left_out": [],
    }
    cells = [(n, b) for n in sorted({1, every}) for b in sorted({1, min(batch, len(problem.queries))})]
    end = time.perf_counter() + limit
    try:
        torch.set_num_threads(every)
        say("exact search")
        bounds = exact_bounds(problem)
        for contender in chosen:
            if time.perf_counter() > end:
                result["left_out"].append(
                    {"name": contender.name, "why": f"the limit of {limit:g} seconds was reached"}
                )
                continue
            say(contender.name)
            try:
                measured = _measure(contender, problem, bounds, cells, every, seconds, end)
            except Unfit as reason:
                result["left_out"].append({"name": contender.name, "why": str(reason)})
                continue
            result["results"].append(measured)
            if measured.pop("cut"):
                why = f"the limit of {limit:g} seconds was reached before its other settings"
                result["left_out"].append({"name": contender.name, "why": why})
    finally:
        torch.set_num_threads(before)
    return result


def _measure(
    contender: Contender,
    problem: Problem,
    bounds: np.ndarray,
    cells: list[tuple[int, int]],
    threads: int,
    seconds: float,
    end: float,
) -> dict[str, Any]:
    problem.spared()
    start = time.perf_counter()
    built = contender.build(problem)
    building = time.perf_counter() - start + problem.spared()
    points: list[dict[str, Any]] = []
    cut = False
    for setting in contender.settings(problem):
        if points and time.perf_counter() > end:
            cut = True
            break
        torch.set_num_threads(threads)
        if isinstance(built, _PerSetting):
            start = time.perf_counter()
            built.use(setting)
            building = time.perf_counter() - start + problem.spared()

        def search(queries: Tensor, setting: Any = setting) -> Tensor:
            return contender.search(built, queries, problem.k, setting)

        found = torch.cat([search(part) for part in problem.queries.split(max(size for _, size in cells))])
        speeds = []
        for count, size in cells:
            torch.set_num_threads(count)
            speeds.append(
                {"threads": count, "batch": size, "qps": queries_per_second(search, problem.queries, size, seconds)}
            )
        points.append(
            {
                "setting": contender.label.format(setting),
                "recall": recall(problem, found, bounds),
                "qps": speeds,
                "build_seconds": building,
                "bytes_per_item": built.nbytes / len(problem.items),
            }
        )
    torch.set_num_threads(threads)
    return {"name": contender.name, "points": points, "cut": cut}


# -- what is shown ---------------------------------------------------------------------------------------------------


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    data = result["data"]
    cells = _cells(result)
    lines = [
        f"{data['name']}: {data['items']:,} items of {data['dim']} dimensions, {data['queries']:,} queries,"
        f" recall of the {result['k']} best",
        f"{result['machine']['cpu']['processor']}, {result['machine']['cpu']['isa']}",
        "",
    ]
    heads = [f"{count} x {size:,}" for count, size in cells]
    lines.append(
        f"{'queries per second, threads x queries a call':<48}{'recall':>8}"
        + "".join(f"{head:>12}" for head in heads)
        + f"{'build s':>10}{'B/item':>9}"
    )
    for one in result["results"]:
        for point in one["points"]:
            speeds = {(speed["threads"], speed["batch"]): speed["qps"] for speed in point["qps"]}
            lines.append(
                f"{one['name'] + ('  ' + point['setting'] if point['setting'] else ''):<48}{point['recall']:>8.4f}"
                + "".join(f"{speeds[cell]:>12,.0f}" for cell in cells)
                + f"{point['build_seconds']:>10.1f}{point['bytes_per_item']:>9.1f}"
            )
    for left in result["left_out"]:
        lines.append(f"{left['name']}: left out, {left['why']}")
    return "\n".join(lines)


def _cells(result: dict[str, Any]) -> list[tuple[int, int]]:
    found = {(s["threads"], s["batch"]) for one in result["results"] for p in one["points"] for s in p["qps"]}
    return sorted(found)


def _batch(size: int) -> str:
    return "one at a time" if size == 1 else f"{size} at a time"


def write(folder: str | os.PathLike[str], result: dict[str, Any]) -> Path:
    """Write `retrieval.json` and `retrieval.png` to a folder, each whole or not at all; returns the folder."""
    folder = Path(folder)
    with disk_errors("bench retrieval", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "retrieval.json", result)
        draw(folder / "retrieval.png", result)
    return folder


# Okabe and Ito's colours, which the colour-blind can tell apart: one for a way of storing items, and one for codes
# whose best are scored again; dashes and open marks for the plain form.
_STYLES = {
    "FAISS flat": ("#000000", "*", "none"),
    "FAISS IVF": ("#e69f00", "s", "-"),
    "FAISS HNSW": ("#009e73", "^", "-"),
    "FAISS PQ": ("#cc79a7", "D", "--"),
    "FAISS PQ, 10 x k re-scored": ("#cc79a7", "D", "-"),
    "CodeIndex PQ, plain": ("#0072b2", "o", "--"),
    "CodeIndex PQ, block-max": ("#0072b2", "o", "-"),
    "CodeIndex PQ, 10 x k re-scored": ("#d55e00", "o", "-"),
    "CodeIndex residual, plain": ("#56b4e9", "v", "--"),
    "CodeIndex residual, block-max": ("#56b4e9", "v", "-"),
    "CodeIndex residual, 10 x k re-scored": ("#d55e00", "v", "-"),
    "CodeIndex of the run": ("#000000", "P", "none"),
}


def draw(path: Path, result: dict[str, Any]) -> None:
    """Recall against queries per second of one thread, one query and a batch at a time, as a PNG."""
    from matplotlib import pyplot, ticker

    from recfast.report import GREY, new_figure

    sizes = sorted({size for count, size in _cells(result) if count == 1})
    figure, axes = new_figure(width=5.6, height=4.4, columns=max(len(sizes), 1))
    axes = np.atleast_1d(axes)
    # One scale: what a batch gains is to be seen.
    for axis in axes[1:]:
        axis.sharey(axes[0])
    for axis, size in zip(axes, sizes, strict=False):
        for one in result["results"]:
            colour, marker, line = _STYLES.get(one["name"], (GREY, "P", "-"))
            points = sorted((p["recall"], _speed(p, size), p["setting"]) for p in one["points"])
            axis.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                color=colour,
                marker=marker,
                markersize=11 if marker == "*" else 5.5,
                markerfacecolor="white" if line == "--" else colour,
                linestyle=line,
                linewidth=1.6,
                label=one["name"],
            )
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.set_title(_batch(size).capitalize())
        axis.set_xlabel(f"recall of the {result['k']} best")
    axes[0].set_ylabel("queries per second, one thread")
    data = result["data"]
    figure.suptitle(
        f"{data['items']:,} items of {data['dim']} dimensions", x=0.01, ha="left", fontsize=11, fontweight="bold"
    )
    cpu = result["machine"]["cpu"]
    figure.text(0.995, 0.99, f"{cpu['processor']}, {cpu['isa']}", ha="right", va="top", fontsize=8.5, color=GREY)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 2 * len(axes)))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def _speed(point: dict[str, Any], size: int) -> float:
    return next(speed["qps"] for speed in point["qps"] if (speed["threads"], speed["batch"]) == (1, size))
