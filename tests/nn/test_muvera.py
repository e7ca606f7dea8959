"""Fixed dimensional encodings, against the similarity that they stand for."""

import pytest
import torch

from recfast import index
from recfast.nn import FixedDimensionalEncoding, chamfer


def sets(count: int, dim: int, seed: int, longest: int = 6, shortest: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    points = torch.nn.functional.normalize(torch.randn(int(offsets[-1]), dim, generator=generator), dim=1)
    return points, offsets


def plain_chamfer(queries, query_offsets, documents, document_offsets) -> torch.Tensor:
    scores = torch.empty(len(query_offsets) - 1, len(document_offsets) - 1)
    for b in range(scores.shape[0]):
        for d in range(scores.shape[1]):
            q = queries[query_offsets[b] : query_offsets[b + 1]]
            p = documents[document_offsets[d] : document_offsets[d + 1]]
            scores[b, d] = (q @ p.T).max(1).values.sum()
    return scores


@pytest.mark.parametrize("bits", [0, 1, 5])
def test_one_point_documents_are_exact(bits):
    """Filled cells hold the one point everywhere: each repetition gives the sum of q . p."""
    queries, documents = sets(7, 8, 0), sets(9, 8, 1, longest=1)
    encoding = FixedDimensionalEncoding(8, repetitions=3, bits=bits)
    found = encoding.encode_queries(*queries) @ encoding.encode_documents(*documents).T
    torch.testing.assert_close(found, 3 * plain_chamfer(*queries, *documents))


def test_cells_are_sums_means_and_nearest_points():
    encoding = FixedDimensionalEncoding(2, repetitions=1, bits=2)
    with torch.no_grad():
        encoding.planes.copy_(torch.eye(2)[None])
    # Cells by the signs of x (bit 0) and y (bit 1): two points in 3, one in 1.
    points = torch.tensor([[1.0, 3.0], [3.0, 1.0], [2.0, -1.0]])
    offsets = torch.tensor([0, 3, 3])
    query = encoding.encode_queries(points, offsets)
    assert query.view(2, 4, 2)[0].tolist() == [[0, 0], [2, -1], [0, 0], [4, 4]]
    document = encoding.encode_documents(points, offsets)
    # Cell 2 is one bit from cell 3, whose first point is taken; cell 0 is one bit from cell 1.
    assert document.view(2, 4, 2)[0].tolist() == [[2, -1], [2, -1], [1, 3], [2, 2]]
    assert not query[1].any()
    assert not document[1].any()


def test_blocks_of_documents_change_nothing(monkeypatch):
    documents = sets(40, 4, 0, shortest=0)
    encoding = FixedDimensionalEncoding(4, repetitions=2, bits=4)
    whole = encoding.encode_documents(*documents)
    monkeypatch.setattr("recfast.nn.muvera._PAIRS", 16)
    assert torch.equal(encoding.encode_documents(*documents), whole)


def test_same_seed_same_encoding():
    documents = sets(10, 8, 0)
    options = {"repetitions": 4, "bits": 3, "projection": 4, "final_dim": 50}
    first = FixedDimensionalEncoding(8, seed=5, **options)
    encoded = first.encode_documents(*documents)
    assert encoded.shape == (10, 50)
    assert first.width == 50
    assert torch.equal(FixedDimensionalEncoding(8, seed=5, **options).encode_documents(*documents), encoded)
    assert not torch.equal(FixedDimensionalEncoding(8, seed=6, **options).encode_documents(*documents), encoded)
    other = FixedDimensionalEncoding(8, seed=6, **options)
    other.load_state_dict(first.state_dict())
    assert torch.equal(other.encode_documents(*documents), encoded)


def test_projections_and_sketch_are_right_on_average():
    """Their expectation over seeds is the encoding without them."""
    queries, documents = sets(3, 8, 0), sets(4, 8, 1, longest=1)
    wanted = plain_chamfer(*queries, *documents)
    found = []
    for seed in range(300):
        encoding = FixedDimensionalEncoding(8, repetitions=1, bits=1, projection=4, final_dim=64, seed=seed)
        found.append(encoding.encode_queries(*queries) @ encoding.encode_documents(*documents).T)
    found = torch.stack(found)
    assert ((found.mean(0) - wanted).abs() < 5 * found.std(0) / 300**0.5).all()


def test_recall_rises_with_repetitions_and_reranking_is_exact():
    """Topical sets: of the exact ten best, more are found with more repetitions, through an index of dense vectors."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 16, generator=generator)

    def topical(count):
        lengths = torch.randint(2, 7, (count,), generator=generator)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        topic = torch.randint(0, 60, (int(offsets[-1]),), generator=generator)
        points = centres[topic] + 0.5 * torch.randn(len(topic), 16, generator=generator)
        return torch.nn.functional.normalize(points, dim=1), offsets

    queries, documents = topical(30), topical(600)
    everything = torch.arange(600).expand(30, -1)
    exact = chamfer(*queries, *documents, everything)
    torch.testing.assert_close(exact, plain_chamfer(*queries, *documents), rtol=1e-5, atol=1e-5)
    best = exact.topk(10).indices
    recall = []
    for repetitions in (1, 5, 25):
        encoding = FixedDimensionalEncoding(16, repetitions=repetitions, bits=4)
        found = index.DenseIndex(encoding.encode_documents(*documents))
        _, ids = found.search(encoding.encode_queries(*queries), 50)
        recall.append((best[:, :, None] == ids[:, None, :]).any(2).float().mean().item())
    assert recall[0] < recall[1] < recall[2]
    assert recall[2] > 0.9
    again = chamfer(*queries, *documents, ids)
    torch.testing.assert_close(again, exact.gather(1, ids), rtol=1e-5, atol=1e-5)


def test_chamfer_pads():
    queries, documents = sets(2, 4, 0), sets(3, 4, 1, shortest=0, longest=2)
    empty = int((documents[1].diff() == 0).nonzero()[0, 0]) if (documents[1].diff() == 0).any() else None
    candidates = torch.tensor([[0, -1], [2, 1]])
    scores = chamfer(*queries, *documents, candidates)
    assert scores[0, 1] == -torch.inf
    for b, c in ((0, 0), (1, 0), (1, 1)):
        assert (scores[b, c] == -torch.inf) == (int(candidates[b, c]) == empty)
    none = chamfer(torch.zeros(0, 4), torch.zeros(1, dtype=torch.int64), *documents, torch.zeros(0, 5).long())
    assert none.shape == (0, 5)


def test_gradient_flows_within_cells():
    points, offsets = sets(3, 4, 0)
    points = points.double().requires_grad_()
    encoding = FixedDimensionalEncoding(4, repetitions=2, bits=2, projection=3, final_dim=20).double()
    assert torch.autograd.gradcheck(lambda x: encoding.encode_queries(x, offsets), (points,))
    assert torch.autograd.gradcheck(lambda x: encoding.encode_documents(x, offsets), (points,))


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="bits = 17"):
        FixedDimensionalEncoding(4, bits=17)
    encoding = FixedDimensionalEncoding(4, repetitions=1, bits=1)
    with pytest.raises(ValueError, match=r"vectors must have shape \[T, 4\]"):
        encoding.encode_queries(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="offsets must go from 0 to 2"):
        encoding.encode_queries(torch.zeros(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="never fall"):
        encoding.encode_queries(torch.zeros(2, 4), torch.tensor([0, 3, 2]))
    with pytest.raises(IndexError, match=r"candidates\[0, 1\] = 3 is outside \[-1, 3\)"):
        chamfer(*sets(1, 4, 0), *sets(3, 4, 1), torch.tensor([[0, 3]]))
