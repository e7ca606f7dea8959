"""SparCode: a query becomes a few tokens, each token a code, and every code knows a score for every item.

Su et al., "Beyond Two-Tower Matching: Learning Sparse Retrievable Cross-Interactions for Recommendation", SIGIR 2023,
arXiv 2311.18213.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval._candidates import (
    Positives,
    SoftmaxRetriever,
    draw,
    known_negatives,
    positives_of,
    private_loss,
    softmax_loss,
)
from recfast.models.retrieval._history_encoder import encoder_of, head
from recfast.models.retrieval._query_tokens import QueryTokens
from recfast.models.retrieval._score_rows import ScoreRows
from recfast.models.retrieval._scorers import scorer_of

if TYPE_CHECKING:
    from recfast.data import Batch, Jagged, Schema
    from recfast.models.retrieval._sparcode_index import SparCodeIndex


class SparCode(SoftmaxRetriever):
    r"""Retriever whose score is any function of token and item, and is served as a sum of a few sparse rows.

    .. math::
        t_1, \ldots, t_{K_u} = \mathrm{heads}(\mathrm{encoder}(u)), \qquad q_k = \mathrm{quantise}(t_k), \qquad
        y_{ui} = \sum_{k=1}^{K_u} s(q_k, i)

    A quantised token is one of :math:`K_c^M` composite codes, so the scores of all codes and items can be worked out
    beforehand: `build_index`. With sparsity in training each term is :math:`\mathrm{ReLU}(s(q_k, i) + b)`.

    Parameters
    ----------
    schema
        Fitted; needs a column with the role "item", and a `Sequence` of items or batches that bring one.
    dim
        D, width of the embeddings of events, users and item tokens.
    sequence, max_length
        Name of the sequence (the first one if None), and how many of its last items count.
    encoder, hidden, user_id, recency, history_dropout, dropout
        "mean" (of the history), "gru" or "attention"; then an MLP of these widths; whether the user's id is added, and
        whether the mean weighs by age; the share of events, and of hidden units, left out in training.
    tokens, token_dim, item_tokens
        K_u, the width of a query token, and K_i.
    codebooks, codes, shared_codebooks
        M and K_c. A token is cut in M parts, each replaced by the nearest of K_c; all tokens share the codebooks, as in
        the paper, or have their own (then the index has K_u times the rows).
    codebook_update, decay, warm_up, vq_weight
        Of `nn.VectorQuantizer`; `warm_up` counts training batches, `vq_weight` weighs its loss beside the softmax.
    scorer, scorer_hidden
        "attention" of the token to the item's tokens; "mlp" over both, with these hidden layers; "dot", their inner
        product, which says no more than two towers. A bias of the item is added to each.
    sparsity
        "train": ReLU and a learnt b are part of the function. "index": training sums the scores as they are, and
        `build_index` cuts. What the source does is not certain.
    negatives, num_negatives
        "all" items; `num_negatives` "uniform" ones; "sampled", half of them by popularity; those of the "batch";
        "mixed", of the batch and uniform; "auto", all up to 5,000 items, else sampled. Each is weighed by how often it
        was to be expected. "private": `num_negatives` uniform ones for each positive, not weighed, as in the source
        (which has 10).
    item_bias
        Whether items have a bias, which begins at the logarithm of their share; the source has none.
    seed
        Of the initial weights and of the codebooks' beginning.

    Notes
    -----
    A batch whose rows share histories (`candidate_offsets`) costs one encoding and K_u token scores a history, however
    many positives it has. What did best on ml-100k: tokens quantised only in the last sixth of the training
    (`warm_up`), with codebooks of their own.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 64,
        sequence: str | None = None,
        max_length: int = 50,
        encoder: Literal["mean", "gru", "attention"] = "mean",
        hidden: Sequence[int] = (128,),
        user_id: bool = True,
        recency: bool = True,
        history_dropout: float = 0.3,
        dropout: float = 0.3,
        tokens: int = 4,
        token_dim: int = 16,
        item_tokens: int = 2,
        codebooks: int = 2,
        codes: int = 64,
        shared_codebooks: bool = True,
        codebook_update: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        warm_up: int = 0,
        vq_weight: float = 1.0,
        scorer: Literal["attention", "mlp", "dot"] = "attention",
        scorer_hidden: Sequence[int] = (64,),
        sparsity: Literal["index", "train"] = "index",
        negatives: Literal["auto", "all", "uniform", "sampled", "batch", "mixed", "private"] = "auto",
        num_negatives: int = 2048,
        item_bias: bool = True,
        seed: int = 0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "schema", "__class__")}
        super().__init__(schema, sequence, options | {"hidden": list(hidden), "scorer_hidden": list(scorer_hidden)})
        if sparsity not in ("index", "train"):
            raise InputError(f"SparCode: sparsity = {sparsity!r} is not 'index' or 'train'")
        if min(tokens, token_dim, item_tokens, num_negatives) < 1 or not vq_weight >= 0:
            raise InputError(
                f"SparCode: tokens = {tokens}, token_dim = {token_dim}, item_tokens = {item_tokens}, num_negatives = "
                f"{num_negatives}, vq_weight = {vq_weight}; expected at least 1, 1, 1, 1 and 0"
            )
        self.schema, self.vq_weight, self.num_negatives = schema, vq_weight, num_negatives
        self.negatives = known_negatives("SparCode", negatives)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = encoder_of(self, schema, options, dim)
            try:
                self.tokens = QueryTokens(
                    head(self.encoder, tokens * token_dim), tokens, token_dim, codebooks, codes, shared_codebooks,
                    update=codebook_update, decay=decay, warm_up=warm_up, seed=seed,
                )  # fmt: skip
            except ValueError as error:
                raise InputError(f"SparCode: {error}") from None
            # An item's tokens begin close to each other, so that the model begins close to a dot product.
            apart = 0.4 * torch.randn(self.rows, 1, dim) + 0.1 * torch.randn(self.rows, item_tokens, dim)
            self.items = nn.Parameter(apart / dim**0.5)
            self.scorer = scorer_of(scorer, self.tokens.out, dim, item_tokens, scorer_hidden)
        # Each term of the sum has a K_u-th of the item's bias.
        self.bias = nn.Parameter(torch.zeros(self.rows), requires_grad=item_bias)
        self.threshold = nn.Parameter(torch.zeros(())) if sparsity == "train" else None
        self._score_rows = ScoreRows(self)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Positives]:
        """Return the quantised tokens float32 [B, K_u, C], the quantiser's loss and the positives."""
        histories, users, positives = positives_of(self, batch)
        return *self.tokens(self.encoder(histories, users)), positives

    def loss(self, output: tuple[Tensor, Tensor, Positives], batch: Batch) -> Tensor:
        """Return the softmax loss of the positives plus the quantiser's."""
        tokens, vq_loss, positives = output
        count = tokens.shape[1]

        def pairs(owner: Tensor, items: Tensor) -> Tensor:
            items = items.repeat_interleave(count)
            scores = self._term(self.scorer.pairs(tokens[owner].flatten(0, 1), self.items[items]), items)
            return scores.unflatten(0, (-1, count)).sum(1)

        own = pairs(positives.owner, positives.items)
        if self.negatives == "private":
            softmax = private_loss(own, pairs, positives, self.rows, self.num_negatives)
        else:
            candidates = draw(positives, self.counts, self.negatives, self.num_negatives)
            others = self.token_scores(tokens.flatten(0, 1), candidates.ids).unflatten(0, tokens.shape[:2])
            softmax = softmax_loss(own, others.sum(1), candidates, positives)
        return softmax + self.vq_weight * vq_loss

    def token_scores(self, tokens: Tensor, items: Tensor | None = None) -> Tensor:
        """Return the term of each token [T, C] and item (ids int64 [N]; all rows if None), float32 [T, N]."""
        rows = slice(None) if items is None else items
        return self._term(self.scorer(tokens, self.items[rows]), rows)

    def _term(self, scores: Tensor, items: Tensor | slice) -> Tensor:
        scores = scores + self.bias[items] / self.tokens.tokens
        return scores if self.threshold is None else F.relu(scores + self.threshold)

    @torch.no_grad()
    def encode(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return the composite codes of users, int64 [B, K_u]: which rows of the index are theirs."""
        return self.tokens.encode(self.encoder(histories, users))

    @torch.no_grad()
    def code_scores(self, codes: Tensor) -> Tensor:
        """Return the term of each composite code [T] and item, float32 [T, rows(item)]: rows of the dense index."""
        return self.token_scores(self.tokens.decode(codes))

    def scores(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return the scores of all items by the quantised tokens, float32 [B, rows(item)]; -inf for item 0."""
        table, place = self._score_rows(self.encode(histories, users))
        scores = table[place[:, 0]]
        for row in place.T[1:]:
            scores += table[row]
        scores[:, 0] = -torch.inf
        return scores

    def user_vectors(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        raise InputError("SparCode.user_vectors: its score is no dot product; use scores, or build_index and retrieve")

    def item_vectors(self) -> Tensor:
        """Return the tokens of the items side by side, float32 [rows(item), K_i D]: how alike items are, no more."""
        return self.items.flatten(1)

    def build_index(self, **options: Any) -> SparCodeIndex:
        """Work out the score rows of all composite codes; see `SparCodeIndex.build` for the options."""
        from recfast.models.retrieval._sparcode_index import SparCodeIndex

        return SparCodeIndex.build(self, **options)
