"""The cascade from raw ids to raw ids: every stage against plain torch, every edge, and the way to disk and back."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import shutil
import subprocess

import numpy as np
import polars as pl
import pytest
import torch

from recfast import Pipeline, files, nn, rerank
from recfast.errors import InputError, OutOfRange
from recfast.models import storage


@pytest.fixture(scope="session")
def loaded(tiny_run):
    return Pipeline.load(tiny_run / "pipeline")


@pytest.fixture
def pipeline(loaded):
    """A pipeline whose parts may be changed; the models and arrays are shared."""
    return copy.copy(loaded)


@pytest.fixture
def users(loaded):
    """Raw ids of users with a history."""
    catalogue = loaded.catalogue
    ids = (catalogue.history.lengths() > 0).nonzero()[:, 0]
    return catalogue.vocabulary["user"].decode(ids)


def ids_of(pipeline, raw):
    return torch.from_numpy(pipeline.catalogue.vocabulary["user"].encode(raw)).long()


def lists_of(frame, schema):
    return {user: part[schema.item].to_list() for (user,), part in frame.group_by(schema.user, maintain_order=True)}


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", ["seen", "liked", "nothing"])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_retrieval_is_brute_force_over_the_codes(pipeline, users, exclude, k):
    ids = ids_of(pipeline, users)
    scores, items = pipeline.retrieve(ids, k, exclude=exclude)
    assert items.shape == (len(ids), k)
    table, codes = pipeline.score_table(ids), pipeline.index.codes.long()
    total = torch.zeros(len(ids), len(codes))
    for m in range(codes.shape[1]):
        total += table[:, m, codes[:, m]]
    banned = {
        "seen": pipeline.catalogue.seen,
        "liked": pipeline.catalogue.history,
        "nothing": None,
    }[exclude]
    for row, user in enumerate(ids.tolist()):
        out = set() if banned is None else set(banned.row(user).tolist())
        order = sorted((i for i in range(1, len(codes) + 1) if i not in out), key=lambda i: (-total[row, i - 1], i))
        expected = order[:k] + [-1] * (k - len(order[:k]))
        assert items[row].tolist() == expected
        assert torch.equal(scores[row, : len(order)], total[row, torch.tensor(order[:k]) - 1])


def test_retrieval_does_not_depend_on_the_batch(pipeline, users, monkeypatch):
    ids = ids_of(pipeline, users)
    whole = pipeline.retrieve(ids)
    monkeypatch.setitem(Pipeline.retrieve.__globals__, "_MASK_CELLS", 3 * len(pipeline.index))
    for a, b in zip(whole, pipeline.retrieve(ids), strict=True):
        assert torch.equal(a, b)


def test_ranking_scores_each_candidate(pipeline, users, monkeypatch):
    ids = ids_of(pipeline, users[:5])
    items = pipeline.retrieve(ids, 7)[1]
    items[1, 4:] = -1
    items[3] = -1
    logits = pipeline.rank(ids, items)
    assert torch.equal(torch.isinf(logits), items < 0)
    for row in range(5):
        for place in range(7):
            if items[row, place] < 0:
                continue
            batch, _ = pipeline.catalogue.candidates(ids[row : row + 1], items[row : row + 1, place : place + 1])
            with torch.inference_mode():
                alone = pipeline.ranker(batch)[0]
            assert torch.allclose(logits[row, place], alone, atol=1e-5)
    monkeypatch.setitem(Pipeline.rank.__globals__, "_CANDIDATE_ROWS", 8)
    assert torch.allclose(pipeline.rank(ids, items), logits, atol=1e-5)


def test_no_diversity_is_the_order_of_relevance(pipeline, users):
    ids = ids_of(pipeline, users)
    scores, items = pipeline.retrieve(ids, 30)
    relevance = pipeline.relevance(scores, pipeline.rank(ids, items))
    plain = pipeline.rerank(ids, items, relevance, 10, reranker=rerank.DPP(diversity=0.0))
    assert torch.equal(plain, torch.argsort(relevance, dim=1, descending=True, stable=True)[:, :10])
    pipeline.reranker = None
    assert torch.equal(pipeline.rerank(ids, items, relevance, 10), plain)


def test_more_diversity_gives_more_diverse_lists(pipeline, users):
    from recfast import metrics

    ids = ids_of(pipeline, users)
    scores, items = pipeline.retrieve(ids, 50)
    relevance = pipeline.relevance(scores, pipeline.rank(ids, items))
    spread = []
    for diversity in (0.0, 0.5, 1.0):
        place = pipeline.rerank(ids, items, relevance, 10, reranker=rerank.DPP(diversity=diversity))
        spread.append(metrics.intra_list_diversity(items.gather(1, place), pipeline.catalogue.genres).mean())
    assert spread[0] < spread[1] < spread[2]


def test_personal_trade_off_follows_the_history(pipeline, users):
    ids = ids_of(pipeline, users)
    appetite = pipeline.appetite(ids)
    assert ((appetite >= 0) & (appetite <= 1)).all()
    genres = pipeline.catalogue.genres
    for user, value in zip(ids.tolist(), appetite, strict=True):
        share = genres[pipeline.catalogue.history.row(user).numpy()].sum(0)
        share = share[share > 0] / share.sum()
        assert value == pytest.approx(-(share * np.log(share)).sum() / np.log(genres.shape[1]), abs=1e-5)


@pytest.mark.parametrize("kind", rerank.KINDS)
def test_every_kind_of_reranker(pipeline, users, kind, tmp_path):
    pipeline.reranker = rerank.build(kind, diversity=0.6, personal=0.5)
    wanted = lists_of(pipeline.recommend(users, 8), pipeline.catalogue.schema)
    assert all(len(set(items)) == 8 for items in wanted.values())
    plain = copy.copy(pipeline)
    plain.reranker = None
    assert lists_of(plain.recommend(users, 8), pipeline.catalogue.schema) != wanted
    pipeline.save(tmp_path / "pipeline")
    again = Pipeline.load(tmp_path / "pipeline")
    assert type(again.reranker) is rerank.KINDS[kind]
    assert again.reranker.config() == pipeline.reranker.config()
    # A user's list does not depend on who else asks; of samples, the first draw is the first again.
    assert lists_of(again.recommend(users[3:5], 8), pipeline.catalogue.schema) == {u: wanted[u] for u in users[3:5]}


def test_samples_are_drawn_anew_each_time(pipeline, users):
    pipeline.reranker = rerank.KDPP(0.8)
    first, second = (pipeline.recommend(users, 8) for _ in range(2))
    assert not first.equals(second)


@pytest.mark.parametrize("known", [True, False])
def test_xquad_covers_the_genres_of_the_history(pipeline, users, known):
    """Against `rerank.XQuAD` on arrays; where no genres are known the first codebook's clusters are the topics."""
    catalogue = pipeline.catalogue
    if not known:
        pipeline.catalogue = catalogue = dataclasses.replace(catalogue, genre_names=[])
        topics = np.zeros((len(pipeline.item_vectors) + 1, pipeline.quantizer.n_codes))
        topics[np.arange(1, len(topics)), pipeline.index.codes[:, 0].numpy()] = 1
    else:
        topics = catalogue.genres
    ids = ids_of(pipeline, users[:20])
    shares = pipeline.preferences(ids)
    for row, user in enumerate(ids.tolist()):
        counts = topics[catalogue.history.row(user)].sum(0)
        np.testing.assert_allclose(shares[row], counts / counts.sum())
    assert (pipeline.preferences(torch.tensor([0])) == 1 / shares.shape[1]).all()
    relevance, items = pipeline.retrieve(ids, 30)
    relevance[2, 25:], items[2, 25:] = -torch.inf, -1
    place = pipeline.rerank(ids, items, relevance, 10, reranker=rerank.XQuAD(0.9))
    for row in range(len(ids)):
        valid = items[row] >= 0
        order = torch.argsort(relevance[row, valid], descending=True, stable=True)
        worth = 1 / np.log2(np.arange(len(order)) + 2)
        own = topics[items[row, valid][order]].astype(np.float64)
        answer = rerank.XQuAD(0.9).rank(own, worth.astype(np.float32), 10, preferences=shares[row])
        assert place[row].tolist() == order[answer].tolist()


@pytest.mark.parametrize("kind", ["DPP", "XQuAD"])
def test_recent_items_count_as_shown(pipeline, users, kind, tmp_path):
    ids = ids_of(pipeline, users)
    relevance, items = pipeline.retrieve(ids)
    plain = pipeline.rerank(ids, items, relevance, 10, reranker=rerank.build(kind, diversity=0.7))
    pipeline.recent = 3
    picks = pipeline.rerank(ids, items, relevance, 10, reranker=rerank.build(kind, diversity=0.7))
    assert not torch.equal(picks, plain)
    latest = pipeline._latest(ids)
    for row, user in enumerate(ids.tolist()):
        history = pipeline.catalogue.history.row(user).tolist()[-3:]
        assert latest[row].tolist() == [-1] * (3 - len(history)) + history

    def closeness(place):
        """How alike lists and latest items are, by what the method looks at."""
        table = pipeline.catalogue.genres if kind == "XQuAD" else pipeline._similarity
        listed = table[items.gather(1, place).numpy()]
        shown = table[latest.clamp(min=0).numpy()] * (latest >= 0).numpy()[..., None]
        return float((listed @ shown.transpose(0, 2, 1)).mean())

    assert closeness(picks) < closeness(plain)
    pipeline.save(tmp_path / "pipeline")
    assert Pipeline.load(tmp_path / "pipeline").recent == 3


def test_the_pool_never_makes_a_list_shorter(pipeline, users):
    pipeline.pool = 3
    frame = pipeline.recommend(users[:4], k=10)
    assert frame.height == 40


def test_blend_mixes_two_standardised_scores(pipeline):
    retrieved = torch.tensor([[3.0, 2.0, 1.0, -torch.inf]])
    logits = torch.tensor([[0.0, 10.0, 20.0, -torch.inf]])
    pipeline.blend = 0.0
    assert torch.equal(pipeline.relevance(retrieved, logits), logits)
    pipeline.blend = 2.0
    unit = 1.5**0.5
    assert torch.allclose(pipeline.relevance(retrieved, logits)[:, :3], torch.tensor([[unit, 0.0, -unit]]))
    assert pipeline.relevance(retrieved, logits)[0, 3] == -torch.inf


# -- recommend ---------------------------------------------------------------------------------------------------


def test_recommend_gives_a_frame(pipeline, users):
    schema = pipeline.catalogue.schema
    frame = pipeline.recommend(users[:3], k=5)
    assert frame.columns == [schema.user, "rank", schema.item, "score", "title"]
    assert frame[schema.user].to_list() == [u for u in users[:3] for _ in range(5)]
    assert frame["rank"].to_list() == [1, 2, 3, 4, 5] * 3
    assert frame["score"].is_finite().all()
    assert frame[schema.item].dtype == pipeline.catalogue.vocabulary["item"].values.dtype
    titles = dict(pipeline.catalogue.items.select(schema.item, "title").iter_rows())
    assert frame["title"].to_list() == [titles[item] for item in frame[schema.item]]
    assert frame.group_by(schema.user).agg(pl.col(schema.item).n_unique())[schema.item].to_list() == [5] * 3


def test_repeated_users_and_any_batch_get_the_same_lists(pipeline, users):
    item = pipeline.catalogue.schema.item
    mixed = [users[2], users[0], users[2], users[1]]
    found = pipeline.recommend(mixed, k=4)
    for place, user in enumerate(mixed):
        alone = pipeline.recommend([user], k=4)
        assert found[4 * place : 4 * place + 4][item].to_list() == alone[item].to_list()


@pytest.mark.parametrize("exclude", ["seen", "liked"])
def test_what_is_excluded_never_comes(pipeline, users, exclude):
    catalogue = pipeline.catalogue
    lists = {"seen": catalogue.seen, "liked": catalogue.history}[exclude]
    found = lists_of(pipeline.recommend(users, k=1000, exclude=exclude), catalogue.schema)
    everything = set(catalogue.vocabulary["item"].values.to_list())
    for user, id_ in zip(users, ids_of(pipeline, users).tolist(), strict=True):
        excluded = set(catalogue.vocabulary["item"].decode([i for i in lists.row(id_).tolist() if i > 0]))
        assert excluded
        got = found[user]
        # Asked for more than there are: everything allowed, once, and nothing else.
        assert set(got) == everything - excluded
        assert len(got) == len(set(got))


def test_nobody(pipeline):
    frame = pipeline.recommend([], k=5)
    assert frame.height == 0
    assert frame.columns[:4] == ["user", "rank", "item", "score"]


@pytest.mark.parametrize("alone", [False, True])
def test_without_ranker_and_reranker(pipeline, users, alone):
    bare = Pipeline(
        pipeline.retriever, None, None, pipeline.catalogue, quantizer=pipeline.quantizer, exclude=pipeline.exclude
    )
    frame = bare.recommend(users[:1] if alone else users, k=5)
    scores, items = pipeline.retrieve(ids_of(pipeline, users[:1] if alone else users), 5)
    assert frame["score"].to_list() == scores.flatten().tolist()
    assert frame["item"].to_list() == pipeline.catalogue.vocabulary["item"].decode(items)
    with pytest.raises(InputError, match="has no ranker"):
        bare.rank(ids_of(pipeline, users[:1]), items[:1])


@pytest.mark.parametrize("features", ["auto", "vectors", "both"])
def test_similarity_features_are_unit_vectors(pipeline, features):
    made = Pipeline(pipeline.retriever, None, None, pipeline.catalogue, quantizer=pipeline.quantizer, features=features)
    norms = np.linalg.norm(made._similarity[1:], axis=1)
    assert np.allclose(norms[norms > 0.99], 1, atol=1e-5)
    assert (norms > 0).all()
    assert not made._similarity[0].any()


def test_an_unknown_user_is_an_error_or_gets_what_is_popular(pipeline, users):
    with pytest.raises(InputError, match=r"recommend: user 'nobody' is not in the training data, .*cold='popular'"):
        pipeline.recommend([users[0], "nobody"], k=3)
    frame = pipeline.recommend(["nobody", users[0]], k=3, cold="popular")
    catalogue = pipeline.catalogue
    counts = torch.bincount(catalogue.history.values, minlength=len(pipeline.index) + 1)
    best = sorted(range(1, len(counts)), key=lambda i: (-int(counts[i]), i))[:3]
    assert frame["user"].to_list() == ["nobody"] * 3 + [str(users[0])] * 3
    assert frame["item"][:3].to_list() == catalogue.vocabulary["item"].decode(best)
    assert frame["item"][3:].to_list() == pipeline.recommend([users[0]], k=3)["item"].to_list()


def test_an_empty_history_is_an_error_or_gets_what_is_popular_and_not_seen(pipeline, users):
    user = users[0]
    pipeline.catalogue = copy.copy(pipeline.catalogue)
    history = pipeline.catalogue.history
    id_ = int(ids_of(pipeline, [user])[0])
    gone = type(history)(history.values, history.offsets.clone())
    gone.offsets[id_ + 1 :] -= int(history.lengths()[id_])
    keep = torch.ones(len(history.values), dtype=torch.bool)
    keep[int(history.offsets[id_]) : int(history.offsets[id_ + 1])] = False
    object.__setattr__(pipeline.catalogue, "history", type(history)(history.values[keep], gone.offsets))
    with pytest.raises(InputError, match=r"has liked nothing yet, so there is no history, expected"):
        pipeline.recommend([user])
    seen = set(pipeline.catalogue.seen.row(id_).tolist())
    assert seen
    frame = pipeline.recommend([user], k=1000, cold="popular", exclude="seen")
    got = pipeline.catalogue.vocabulary["item"].encode(frame["item"])
    assert set(got.tolist()) == set(range(1, len(pipeline.index) + 1)) - seen


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"users": ["a"], "k": 0}, "recommend: k must be at least 1, got 0"),
        ({"users": "ab", "k": 1}, "recommend: users must be a list of user ids, got the text 'ab'"),
        ({"users": ["a"], "cold": "warm"}, "recommend: cold must be error or popular, got 'warm'"),
        ({"users": ["a", 1, None], "cold": "error"}, "recommend: user 'a' is not in the training data"),
        ({"users": [None]}, "recommend: user None is not in the training data"),
    ],
)
def test_bad_arguments(pipeline, options, sentence):
    with pytest.raises(InputError) as found:
        pipeline.recommend(**options)
    assert str(found.value).startswith(sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"exclude": "all"}, "exclude must be seen, liked or nothing, got 'all'"),
        ({"candidates": 0}, "candidates and pool must be at least 1"),
        ({"pool": 0}, "candidates and pool must be at least 1"),
        ({"features": "colour"}, "features must be one of auto, genres, vectors, both, got 'colour'"),
        ({"recent": -1}, "recent must be at least 0, got -1"),
        ({"blend": float("nan")}, "blend must be a number from 0 on, got nan"),
    ],
)
def test_bad_options(pipeline, options, sentence):
    with pytest.raises(InputError, match=sentence):
        Pipeline(pipeline.retriever, None, None, pipeline.catalogue, quantizer=pipeline.quantizer, **options)


def test_ids_out_of_range_are_refused(pipeline):
    rows = pipeline.catalogue.schema.rows("user")
    with pytest.raises(OutOfRange, match=rf"Pipeline: users\[1\] = {rows} is outside \[0, {rows}\)"):
        pipeline.retrieve(torch.tensor([1, rows]))
    with pytest.raises(OutOfRange, match=r"candidates: items\[0, 0\] = 99999 is outside"):
        pipeline.rank(torch.tensor([1]), torch.tensor([[99999]]))


# -- tokenisers --------------------------------------------------------------------------------------------------


def tokenizers(width):
    """Fitted ones are made of these; the last is wider than the items."""
    return {
        "residual": nn.ResidualKMeans(width, 3, 16, normalize=False),
        "normalised": nn.ResidualKMeans(width, 2, 8),
        "rq": nn.ResidualQuantizer(width, 2, 8, latent_dim=4, hidden=(6,), decoder_hidden=()),
        "many": nn.ProductQuantizer(width, 1, 300),
        "wide": nn.ProductQuantizer(width + 5, width + 5, 4),
    }


@pytest.mark.parametrize("kind", ["residual", "normalised", "rq", "many", "wide"])
def test_any_tokeniser_retrieves_and_travels(pipeline, users, kind, tmp_path):
    width = pipeline.item_vectors.shape[1]
    quantizer = tokenizers(width)[kind]
    epochs = {"epochs": 2} if kind == "rq" else {}
    padded = torch.nn.functional.pad(pipeline.item_vectors, (0, quantizer.dim - width))
    quantizer.fit(padded, seed=1, **epochs)
    made = Pipeline(
        pipeline.retriever, pipeline.ranker, pipeline.reranker, pipeline.catalogue, quantizer=quantizer, candidates=12
    )
    ids = ids_of(made, users)
    scores, items = made.retrieve(ids, 12, exclude="nothing")
    # The score is the inner product with the vector that the item's codes stand for.
    stands_for = quantizer.decode(quantizer.encode(padded))[:, :width]
    wanted = (made.user_vectors(ids)[:, None] * stands_for[items - 1]).sum(2)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
    made.save(tmp_path / "made")
    again = Pipeline.load(tmp_path / "made")
    assert type(again.quantizer) is type(quantizer)
    assert again.quantizer.config() == quantizer.config()
    assert again.recommend(users, k=5).equals(made.recommend(users, k=5))


def test_tokenisers_that_cannot_score_are_refused(pipeline, tmp_path):
    width = pipeline.item_vectors.shape[1]

    class Own(nn.ProductQuantizer):
        pass

    hidden = nn.ResidualQuantizer(width, 2, 8, latent_dim=4, hidden=(6,)).fit(pipeline.item_vectors, epochs=1)
    narrow = nn.ProductQuantizer(width - 1, 1, 4).fit(pipeline.item_vectors[:, 1:].contiguous())
    for quantizer, sentence in (
        (nn.ResidualKMeans(width), "quantizer cannot score: ResidualKMeans.score_table: the centroids must be fitted"),
        (hidden, "quantizer cannot score: .* the decoder must be affine"),
        (narrow, rf"quantizer codes vectors of {width - 1} coordinates, and the items have {width}"),
    ):
        with pytest.raises(InputError, match=sentence):
            Pipeline(pipeline.retriever, None, None, pipeline.catalogue, quantizer=quantizer)
    own = Own(width, 1, 4).fit(pipeline.item_vectors)
    made = Pipeline(pipeline.retriever, None, None, pipeline.catalogue, quantizer=own)
    with pytest.raises(InputError, match="a quantizer of the class Own cannot be saved, expected one of Product"):
        made.save(tmp_path / "own")


def test_a_pipeline_of_before_there_was_a_choice_is_read(loaded, users, tmp_path):
    loaded.save(tmp_path / "old")
    quantizer = loaded.quantizer
    shape = {name: getattr(quantizer, name) for name in ("dim", "n_codebooks", "n_codes")}
    path = tmp_path / "old" / "quantizer.safetensors"
    storage.write_tensors(path, quantizer.state_dict(), shape)
    files.write_checksums(tmp_path / "old")
    assert Pipeline.load(tmp_path / "old").recommend(users, k=5).equals(loaded.recommend(users, k=5))
    storage.write_tensors(path, quantizer.state_dict(), {"kind": "Tree", "options": {}})
    files.write_checksums(tmp_path / "old")
    with pytest.raises(InputError, match="holds a Tree, expected one of ProductQuantizer, ResidualKMeans"):
        Pipeline.load(tmp_path / "old")


# -- NaN ---------------------------------------------------------------------------------------------------------


def poison(model, value=float("nan")):
    """A copy whose output is `value`: the last bias, or all weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_named(pipeline, users, value):
    pipeline.ranker = poison(pipeline.ranker, value)
    with pytest.raises(InputError) as found:
        pipeline.recommend(users[:2], k=3)
    sentence = str(found.value)
    assert sentence.startswith("Pipeline.rank: the ranker's score of item ")
    assert f"for user {users[0]!r} is " in sentence
    assert "expected a number" in sentence


def test_a_vector_that_is_no_number_is_named(pipeline, users):
    wrong = poison(pipeline.retriever)
    with pytest.raises(InputError, match=r"Pipeline: item_vectors of the retriever\[0, 0\] is nan, expected a finite"):
        Pipeline(wrong, None, None, pipeline.catalogue)
    pipeline.retriever = wrong
    with pytest.raises(InputError, match=r"Pipeline: user_vectors of the retriever\[0, 0\] is nan, expected a finite"):
        pipeline.recommend(users[:1])


def test_a_saved_nan_is_found_at_serving_time(tiny_run, tmp_path, users, refused):
    folder = tmp_path / "run" / "pipeline"
    shutil.copytree(tiny_run / "pipeline", folder)
    path = folder / "ranker" / "model.safetensors"
    tensors, header = storage.read_tensors(path)
    name = next(name for name in sorted(tensors, reverse=True) if tensors[name].is_floating_point())
    for name in tensors:
        if tensors[name].is_floating_point() and tensors[name].dim() > 0:
            tensors[name].fill_(float("nan"))
    storage.write_tensors(path, tensors, {"extra": header["extra"]})
    assert "is damaged" in refused("recommend", tmp_path / "run", "--users", users[0])
    # Checksums that fit the poisoned weights: the file is whole, its numbers are not.
    files.write_checksums(folder)
    sentence = refused("recommend", tmp_path / "run", "--users", users[0])
    assert "is nan, expected a number" in sentence


# -- disk --------------------------------------------------------------------------------------------------------


def test_round_trip(loaded, users, tmp_path):
    loaded.save(tmp_path / "again")
    again = Pipeline.load(tmp_path / "again")
    for exclude in ("seen", "liked", "nothing"):
        first, second = (p.recommend(users, k=10, exclude=exclude) for p in (loaded, again))
        assert first.equals(second)
    assert again.reranker.config() == loaded.reranker.config()
    for name in ("candidates", "pool", "features", "exclude", "blend"):
        assert getattr(again, name) == getattr(loaded, name), name
    assert torch.equal(again.index.codes, loaded.index.codes)
    assert snapshot(tmp_path / "again").keys() == snapshot(tmp_path / "again").keys()


def test_round_trip_of_a_retriever_alone(pipeline, users, tmp_path):
    bare = Pipeline(pipeline.retriever, None, None, pipeline.catalogue, quantizer=pipeline.quantizer, candidates=7)
    bare.save(tmp_path / "bare")
    again = Pipeline.load(tmp_path / "bare")
    assert again.ranker is None
    assert again.reranker is None
    assert again.recommend(users, k=9).equals(bare.recommend(users, k=9))


def test_every_file_cut_or_changed_is_named(tiny_run, tmp_path, refused):
    """Through the command line: one sentence that names the file, exit code 2, and the folder as it was."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run / "pipeline", run / "pipeline")
    paths = sorted(p for p in run.rglob("*") if p.is_file())
    assert len(paths) > 20
    for path in paths:
        content = path.read_bytes()
        changed = [content[: len(content) // 2], b"", content[:-1], content + b"x"]
        changed += [
            content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]
            for place in (0, len(content) // 3, len(content) - 1)
        ]
        for wrong in changed:
            path.write_bytes(wrong)
            sentence = refused("recommend", run, "--users", "1")
            assert str(path) in sentence, (path, sentence)
            assert "damaged, expected" in sentence
            assert path.read_bytes() == wrong
        path.unlink()
        sentence = refused("recommend", run, "--users", "1")
        assert str(path) in sentence
        assert "is missing" in sentence
        path.write_bytes(content)
    Pipeline.load(run / "pipeline")


def test_another_version_is_refused(tiny_run, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(tiny_run / "pipeline", run / "pipeline")
    path = run / "pipeline" / "pipeline.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    files.write_checksums(run / "pipeline")
    assert "pipeline.json has the format 99, expected 1" in refused("recommend", run, "--users", "1")


def test_no_pipeline_there(tmp_path, refused):
    assert "is not a folder, expected one that Pipeline.save wrote" in refused("recommend", tmp_path, "--users", "1")


def _full(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "place",
    [
        "numpy.save",
        "os.replace",
        "os.rename",
        "polars.DataFrame.write_parquet",
        "recfast.models.storage.save_file",
        "recfast.index._file._write",
        "recfast.files._crc32",
        "pathlib.Path.write_text",
    ],
)
def test_a_full_disk_keeps_the_earlier_pipeline(loaded, tmp_path, monkeypatch, place):
    folder = tmp_path / "pipeline"
    loaded.save(folder)
    before = snapshot(folder)
    with monkeypatch.context() as patch:
        patch.setattr(place, _full)
        with pytest.raises(
            InputError, match=r"cannot be written, the disk is full; what was there before is untouched"
        ):
            loaded.save(folder)
    assert snapshot(folder) == before
    assert os.listdir(tmp_path) == ["pipeline"]


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size)` mounts, or grows, a little file system of its own; skip where that is not permitted."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = []

    def mount(size: str):
        how = ["mount", "-o", f"remount,size={size}"] if mounted else ["mount", "-t", "tmpfs", "-o", f"size={size}"]
        done = subprocess.run([*how, *([] if mounted else ["tmpfs"]), str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(size)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", ["8k", "64k", "128k"])
def test_a_disk_that_is_really_full(loaded, users, small_disk, size):
    place = small_disk(size)
    with pytest.raises(InputError, match=r"small.pipeline cannot be written, the disk is full"):
        loaded.save(place / "pipeline")
    assert os.listdir(place) == []
    small_disk("64m")
    loaded.save(place / "pipeline")
    assert Pipeline.load(place / "pipeline").recommend(users[:2]).equals(loaded.recommend(users[:2]))


@pytest.mark.parametrize("size", ["32k", "400k"])
def test_a_run_goes_on_when_there_is_room_again(tiny_run, tiny_overrides, small_disk, refused, command, size):
    place = small_disk(size)
    arguments = ["run", "--out", place / "run", *(part for text in tiny_overrides for part in ("-o", text))]
    sentence = refused(*arguments)
    assert "cannot be written, the disk is full" in sentence
    assert not [p for p in place.rglob("*") if ".partial" in p.name]
    assert not (place / "run" / "report.html").exists()
    small_disk("64m")
    code, _, err = command(*arguments)
    assert code == 0, err
    found, expected = (json.loads((run / "metrics.json").read_text()) for run in (place / "run", tiny_run))
    assert found["retriever"]["table"] == expected["retriever"]["table"]
    assert found["rerank"] == expected["rerank"]
