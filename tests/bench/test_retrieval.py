"""`recfast bench retrieval`: what it measures, its files, and its errors."""

import json

import numpy as np
import pytest
import torch

from recfast import InputError
from recfast.bench import retrieval
from recfast.index import DenseIndex

TINY = ("--n-items", 600, "--dim", 16, "--n-queries", 40, "--k", 10)
QUICK = ("--seconds", 0.002, "--batch", 16)


@pytest.fixture(scope="module")
def problem():
    return retrieval.generated(600, 16, 40, 10, 0)


@pytest.fixture(scope="module")
def measured(problem):
    return retrieval.run(problem, seconds=0.002, batch=16, threads=2)


def curve(result, name):
    return next(one["points"] for one in result["results"] if one["name"] == name)


def test_everybody_is_measured(measured):
    assert [one["name"] for one in measured["results"]] == [one.name for one in retrieval.CONTENDERS]
    assert measured["left_out"] == []
    assert measured["data"] == {"name": "generated", "items": 600, "dim": 16, "queries": 40, "seed": 0}
    json.dumps(measured, allow_nan=False)
    for one in measured["results"]:
        assert one["points"], one["name"]
        for point in one["points"]:
            assert 0 < point["recall"] <= 1
            assert point["build_seconds"] > 0
            assert point["bytes_per_item"] > 0
            assert [(speed["threads"], speed["batch"]) for speed in point["qps"]] == [(1, 1), (1, 16), (2, 1), (2, 16)]
            assert all(speed["qps"] > 0 for speed in point["qps"])


def test_what_must_hold_of_recall(measured):
    """Exact is 1; more lists, more codebooks, more candidates never lose more than noise."""
    assert curve(measured, "FAISS flat")[0]["recall"] == 1
    for name in ("FAISS IVF", "FAISS HNSW", "FAISS PQ", "CodeIndex PQ, plain", "CodeIndex residual, plain"):
        recalls = [point["recall"] for point in curve(measured, name)]
        assert recalls == sorted(recalls), name
    assert curve(measured, "FAISS IVF")[-1]["setting"] == "n_probe=8"
    # The order of items changes no answer; scoring again loses none.
    for kind in ("PQ", "residual"):
        plain, ordered = (curve(measured, f"CodeIndex {kind}, {how}") for how in ("plain", "block-max"))
        assert [point["recall"] for point in plain] == [point["recall"] for point in ordered]
    for codes, whose in (
        ("FAISS PQ", "FAISS PQ"),
        *((f"CodeIndex {c}, plain", f"CodeIndex {c}") for c in ("PQ", "residual")),
    ):
        coded, again = curve(measured, codes), curve(measured, f"{whose}, 10 x k re-scored")
        assert all(b["recall"] > a["recall"] for a, b in zip(coded, again, strict=True) if a["recall"] < 1)


def test_recall_counts_equals():
    """An item as good as the k-th is as good an answer, whatever its id; a missing one is none."""
    items = torch.tensor([[1.0], [1.0], [1.0], [0.5]])
    problem = retrieval.Problem(items, torch.ones(1, 1), k=2)
    bounds = retrieval.exact_bounds(problem)
    for ids, wanted in (([0, 1], 1.0), ([2, 1], 1.0), ([0, 3], 0.5), ([0, -1], 0.5), ([-1, -1], 0.0)):
        assert retrieval.recall(problem, torch.tensor([ids]), bounds) == wanted


def test_exact_bounds_are_the_kth_scores(problem):
    scores = np.sort(problem.queries.double().numpy() @ problem.items.double().numpy().T, axis=1)
    np.testing.assert_allclose(retrieval.exact_bounds(problem), scores[:, -10], atol=3e-6)


def test_speed_is_counted_in_queries():
    calls = []
    speed = retrieval.queries_per_second(lambda part: calls.append(len(part)), torch.zeros(10, 2), 4, 0.005)
    # Whole batches only, once to warm up; so many queries as were asked in 5 ms or a little more.
    assert set(calls) == {4}
    assert speed <= 4 * (len(calls) - 1) / 0.005
    assert len(calls) >= 4


def test_a_contender_of_ones_own(problem, monkeypatch):
    monkeypatch.setattr(retrieval, "CONTENDERS", list(retrieval.CONTENDERS))
    mine = retrieval.Contender(
        "mine",
        build=lambda problem: DenseIndex(problem.items),
        search=lambda index, queries, k, setting: (
            index.search(queries, k)[1] if setting else torch.full((len(queries), k), -1)
        ),
        settings=lambda problem: (0, 1),
        label="effort {}",
    )
    retrieval.register(mine)
    with pytest.raises(ValueError, match="there is a contender 'mine' already"):
        retrieval.register(mine)
    points = curve(retrieval.run(problem, only=["Mine"], seconds=0.001), "mine")
    assert [(point["setting"], point["recall"]) for point in points] == [("effort 0", 0.0), ("effort 1", 1.0)]


def test_the_limit_names_what_it_leaves_out(problem):
    before = torch.get_num_threads()
    result = retrieval.run(problem, only=["FAISS"], limit=1e-9, seconds=0.001, threads=3)
    assert result["results"] == []
    assert [left["name"] for left in result["left_out"]] == [
        one.name for one in retrieval.CONTENDERS if "FAISS" in one.name
    ]
    assert all("the limit of 1e-09 seconds was reached" in left["why"] for left in result["left_out"])
    assert torch.get_num_threads() == before


def test_few_items_leave_faiss_codes_out():
    result = retrieval.run(retrieval.generated(50, 6, 5, 3, 0), seconds=0.001)
    assert [left["name"] for left in result["left_out"]] == ["FAISS PQ", "FAISS PQ, 10 x k re-scored"]
    # No more items than codes: the codes lose nothing.
    assert all(point["recall"] == 1 for point in curve(result, "CodeIndex PQ, plain"))


def test_generated_data_is_the_same_for_the_same_seed():
    first, again, other = (retrieval.generated(500, 8, 10, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first.items, again.items)
    assert torch.equal(first.queries, again.queries)
    assert not torch.equal(first.items, other.items)
    torch.testing.assert_close(first.queries.norm(dim=1), torch.ones(10))


# -- the command -----------------------------------------------------------------------------------------------------


def test_prints_and_draws(command, tmp_path):
    code, out, err = command("bench", "retrieval", *TINY, *QUICK, "--only", "flat,residual", "--out", tmp_path / "b")
    assert code == 0, err
    assert "generated: 600 items of 16 dimensions, 40 queries, recall of the 10 best" in out
    assert [line.split("  ")[0] for line in out.splitlines()[4:]] == [
        "FAISS flat",
        *["CodeIndex residual, plain"] * 2,
        *["CodeIndex residual, block-max"] * 2,
        *["CodeIndex residual, 10 x k re-scored"] * 2,
    ]
    result = json.loads((tmp_path / "b" / "retrieval.json").read_text())
    assert result["format"] == retrieval.FORMAT
    picture = (tmp_path / "b" / "retrieval.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000
    assert err.splitlines()[-1].endswith("retrieval.png")


def test_prints_json(command, tmp_path):
    code, out, _ = command("bench", "retrieval", *TINY, *QUICK, "--only", "flat", "--json", "--out", tmp_path)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "retrieval.json").read_text())


def test_own_vectors(command, tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "items.npy", random.standard_normal((300, 6)))
    np.save(tmp_path / "queries.npy", random.standard_normal((20, 6)).astype(np.float16))
    paths = ("--items", tmp_path / "items.npy", "--queries", tmp_path / "queries.npy")
    code, out, err = command(
        "bench", "retrieval", *paths, "--k", 5, *QUICK, "--only", "flat", "--json", "--out", tmp_path
    )
    assert code == 0, err
    result = json.loads(out)
    assert (result["data"]["items"], result["data"]["dim"], result["data"]["queries"]) == (300, 6, 20)
    assert result["results"][0]["points"][0]["recall"] == 1


def test_a_finished_run(command, tiny_run, tmp_path):
    code, out, err = command(
        "bench", "retrieval", tiny_run, "--k", 10, *QUICK, "--only", "flat,of the run", "--json", "--out", tmp_path
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["data"]["items"] > 100
    assert str(tiny_run) in result["data"]["name"]
    assert curve(result, "FAISS flat")[0]["recall"] == 1
    # What the run serves: its codes lose a little, and nothing is off by one.
    assert curve(result, "CodeIndex of the run")[0]["recall"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere",), "nowhere/pipeline is not a folder"),
        (("--items", "x.npy"), "--items was given without --queries"),
        (("--queries", "x.npy"), "--queries was given without --items"),
        (("run", "--items", "x.npy", "--queries", "x.npy"), "RUN and --items were both given"),
        (("--items", "x.npy", "--queries", "x.npy"), "x.npy cannot be read: No such file or directory"),
        ((*TINY, "--only", "magic"), "nothing is called 'magic', expected part of one of: FAISS flat"),
        ((*TINY, "--k", 601), "k must be in [1, 600], got 601"),
        ((*TINY, "--batch", 0), "batch, threads, limit and seconds must be positive"),
        (("--n-items", 0), "numbers of items, dimensions and queries must be at least 1"),
    ],
)
def test_refuses(refused, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused("bench", "retrieval", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (np.zeros((0, 3), dtype=np.float32), r"items must have shape \[N, D\], got \[0, 3\]"),
        (np.zeros(3, dtype=np.float32), r"items must have shape \[N, D\], got \[3\]"),
        (np.zeros((3, 2), dtype=np.int64), "must hold one array of floating-point numbers"),
        (np.full((3, 2), np.nan, dtype=np.float32), r"items\[0\] must be finite"),
        (np.zeros((3, 4), dtype=np.float32), "queries must be as wide as items, 4, got 2"),
        (np.array([{"a": 1}], dtype=object), "it is not a .npy file of numbers"),
    ],
)
def test_refuses_vectors(tmp_path, content, sentence):
    np.save(tmp_path / "items.npy", content, allow_pickle=True)
    np.save(tmp_path / "queries.npy", np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(InputError, match=sentence):
        retrieval.from_files(tmp_path / "items.npy", tmp_path / "queries.npy", 1, 0)


def test_an_item_named_twice_counts_once():
    items = torch.eye(4)
    problem = retrieval.Problem(items, torch.tensor([[4.0, 3.0, 2.0, 1.0]]), k=2)
    bounds = retrieval.exact_bounds(problem)
    assert retrieval.recall(problem, torch.tensor([[0, 1]]), bounds) == 1.0
    assert retrieval.recall(problem, torch.tensor([[0, 0]]), bounds) == 0.5
    assert retrieval.recall(problem, torch.tensor([[-1, -1]]), bounds) == 0.0


def test_figures_are_the_same_piece_by_piece(problem, monkeypatch):
    found = torch.randint(
        len(problem.items), (len(problem.queries), problem.k), generator=torch.Generator().manual_seed(0)
    )
    bounds = retrieval.exact_bounds(problem)
    share = retrieval.recall(problem, found, bounds)
    monkeypatch.setattr(retrieval, "_CELLS", 3 * problem.k * problem.dim)
    assert retrieval.recall(problem, found, bounds) == share
    assert np.allclose(retrieval.exact_bounds(problem), bounds, rtol=1e-6)
