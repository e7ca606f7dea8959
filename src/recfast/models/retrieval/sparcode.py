"""SparCode: a query becomes a few tokens, each token a code, and every code knows a score for every item.

Su, Duan, Zhu, Zhang, Cai, Zhang, Dong, Zhang, "Beyond Two-Tower Matching: Learning Sparse Retrievable Cross-Interactions
for Recommendation", SIGIR 2023, arXiv 2311.18213.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recfast.errors import InputError
from recfast.models.retrieval._candidates import NEGATIVES, Positives, draw, positives_of, softmax_loss, start_biases
from recfast.models.retrieval._history_encoder import HistoryEncoder
from recfast.models.retrieval._score_rows import ScoreRows
from recfast.models.retrieval._scorers import AttentionScorer, DotScorer, MLPScorer
from recfast.models.retrieval.base import Retriever
from recfast.nn.vector_quantizer import VectorQuantizer

if TYPE_CHECKING:
    from recfast.data import Batch, Dataset, Jagged, Schema
    from recfast.models.retrieval._sparcode_index import SparCodeIndex

_SCORERS = ("mlp", "attention", "dot")


class SparCode(Retriever):
    r"""Retriever whose score is any function of token and item, and is served as a sum of a few sparse rows.

    .. math::
        t_1, \ldots, t_{K_u} = \mathrm{heads}(\mathrm{encoder}(u)), \qquad q_k = \mathrm{quantise}(t_k), \qquad
        y_{ui} = \sum_{k=1}^{K_u} s(q_k, i)

    A quantised token is one of :math:`K_c^M` composite codes, so the scores of all codes and items can be worked out
    beforehand: `build_index`. With sparsity in training each term is :math:`\mathrm{ReLU}(s(q_k, i) + b)`.

    Parameters
    ----------
    schema
        Fitted; needs a column with the role "item" and a `Sequence` of items.
    dim
        D, width of embeddings and tokens.
    sequence, max_length
        Name of the sequence (the first one if None), and how many of its last items count.
    encoder
        "mean" (of the history, then an MLP), "gru" or "attention".
    hidden, user_id, recency, history_dropout, dropout
        Of the encoder: widths of its MLP; whether it adds an embedding of the user's id; whether the mean weighs items
        by age; the share of events, and of hidden units, left out in training.
    tokens, item_tokens
        K_u and K_i.
    codebooks, codes
        M and K_c. A token is cut in M parts, and each part is replaced by the nearest of K_c; all tokens share them.
    codebook_update, decay, warm_up, vq_weight
        Of `nn.VectorQuantizer`; `vq_weight` is the weight of its loss beside the softmax.
    scorer, scorer_hidden
        "attention": the token attends to the item's tokens. "mlp": an MLP with hidden layers of these widths over
        token and item tokens. "dot": their inner product, which is no more than two towers can say. A bias of the item
        is added to each.
    sparsity
        "train": ReLU and a learnt bias are part of the function. "index": training sums the scores as they are, and
        `build_index` cuts. What the source does is not certain.
    negatives, num_negatives
        "all" items; `num_negatives` "uniform" ones; "sampled", half of them uniform and half by popularity; those of
        the "batch"; "mixed", those of the batch and the uniform ones; "auto", all up to 5,000 items and sampled beyond.
        Each is weighed by how often it was to be expected.
    seed
        Of the initial weights and of the codebooks' beginning.

    Notes
    -----
    A batch whose rows share histories (`candidate_offsets`) costs one encoding and K_u token scores a history, however
    many positives it has.
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
        dropout: float = 0.0,
        tokens: int = 4,
        token_dim: int = 16,
        shared_codebooks: bool = True,
        item_tokens: int = 4,
        codebooks: int = 2,
        codes: int = 64,
        codebook_update: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        warm_up: int = 0,
        vq_weight: float = 1.0,
        scorer: Literal["attention", "mlp", "dot"] = "attention",
        scorer_hidden: Sequence[int] = (64,),
        sparsity: Literal["index", "train"] = "index",
        negatives: Literal["auto", "all", "uniform", "sampled", "batch", "mixed"] = "auto",
        num_negatives: int = 2048,
        seed: int = 0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "schema", "__class__")}
        options |= {"hidden": list(hidden), "scorer_hidden": list(scorer_hidden)}
        super().__init__(schema, sequence, options)
        for name, value, known in (
            ("scorer", scorer, _SCORERS),
            ("sparsity", sparsity, ("index", "train")),
            ("negatives", negatives, NEGATIVES),
        ):
            if value not in known:
                raise InputError(f"SparCode: {name} = {value!r} is not one of {', '.join(map(repr, known))}")
        if tokens < 1 or item_tokens < 1 or num_negatives < 1 or not vq_weight >= 0:
            raise InputError(
                f"SparCode: tokens = {tokens}, item_tokens = {item_tokens}, num_negatives = {num_negatives}, vq_weight "
                f"= {vq_weight}; expected at least 1, 1, 1 and 0"
            )
        self.schema, self.token_dim, self.tokens, self.shared = schema, token_dim, tokens, shared_codebooks
        self.codebooks, self.codes = codebooks, codes
        self.vq_weight, self.negatives, self.num_negatives = vq_weight, negatives, num_negatives
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            users = schema.rows(self.user_column) if user_id and self.user_column is not None else 0
            self.encoder = HistoryEncoder(
                self.rows, users, dim, kind=encoder, hidden=hidden, max_length=max_length, recency=recency,
                history_dropout=history_dropout, dropout=dropout,
            )  # fmt: skip
            self.heads = nn.Linear(self.encoder.width, tokens * token_dim)
            self.items = nn.Parameter(torch.randn(self.rows, item_tokens, dim) * 0.4 / dim**0.5)
            # Of tokens with codebooks of their own, the scorer is told which one it has.
            seen = token_dim if shared_codebooks else tokens * token_dim
            self.scorer = {
                "mlp": lambda: MLPScorer(seen, dim, item_tokens, scorer_hidden),
                "attention": lambda: AttentionScorer(seen, dim, 128),
                "dot": lambda: DotScorer(seen, dim, 128),
            }[scorer]()
        try:
            # With codebooks of their own all tokens of a user are one vector of many parts.
            width, books = (token_dim, codebooks) if shared_codebooks else (tokens * token_dim, tokens * codebooks)
            self.quantizer = VectorQuantizer(
                width, books, codes, update=codebook_update, decay=decay, warm_up=warm_up, seed=seed
            )
        except ValueError as error:
            raise InputError(f"SparCode: {error}") from None
        # A term of the sum has a K_u-th of the item's bias, and what is added before the ReLU.
        self.bias = nn.Parameter(torch.zeros(self.rows))
        self.threshold = nn.Parameter(torch.zeros(())) if sparsity == "train" else None
        self._score_rows = ScoreRows(self)

    @property
    def n_composite(self) -> int:
        """How many composite codes there are: K_c^M, for each token where these have codebooks of their own."""
        return self.codes**self.codebooks * (1 if self.shared else self.tokens)

    def prepare(self, dataset: Dataset) -> None:
        """Count the items; before the first training, begin the biases at the popularity."""
        first = not self.counts.any()
        super().prepare(dataset)
        if first:
            start_biases(self.bias, self.counts)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Positives]:
        """Return the quantised tokens float32 [B, K_u, D], the quantiser's loss and the positives."""
        histories, users, positives = positives_of(self, batch)
        quantized = self.quantizer(self._tokens(histories, users))
        return self._placed(quantized.vectors), quantized.loss, positives

    def loss(self, output: tuple[Tensor, Tensor, Positives], batch: Batch) -> Tensor:
        """Return the softmax loss of the positives plus the quantiser's."""
        tokens, vq_loss, positives = output
        candidates = draw(positives, self.counts, self.negatives, self.num_negatives)
        others = self.token_scores(tokens.flatten(0, 1), candidates.ids).unflatten(0, tokens.shape[:2])
        items = positives.items.repeat_interleave(self.tokens)
        pairs = self.scorer.pairs(tokens[positives.owner].flatten(0, 1), self.items[items])
        own = self._term(pairs, items).unflatten(0, (-1, self.tokens))
        return softmax_loss(own.sum(1), others.sum(1), candidates, positives) + self.vq_weight * vq_loss

    def token_scores(self, tokens: Tensor, items: Tensor | None = None) -> Tensor:
        """Return the term of each token [T, C] and item (ids int64 [N]; all rows if None), float32 [T, N]."""
        rows = slice(None) if items is None else items
        return self._term(self.scorer(tokens, self.items[rows]), rows)

    def _term(self, scores: Tensor, items: Tensor | slice) -> Tensor:
        scores = scores + self.bias[items] / self.tokens
        return scores if self.threshold is None else F.relu(scores + self.threshold)

    def _tokens(self, histories: Jagged, users: Tensor | None) -> Tensor:
        """Return what is quantised: the tokens [B, K_u, C], or side by side [B, K_u C] for codebooks of their own."""
        tokens = self.heads(self.encoder(histories, users))
        return tokens.unflatten(1, (self.tokens, self.token_dim)) if self.shared else tokens

    def _placed(self, tokens: Tensor) -> Tensor:
        """Return the tokens as the scorer takes them: with codebooks of their own, token k at place k among zeros."""
        if self.shared:
            return tokens
        parts = tokens.unflatten(1, (self.tokens, self.token_dim))
        return (torch.eye(self.tokens, device=tokens.device)[:, :, None] * parts[:, None]).flatten(2)

    def encode(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return the composite codes of users, int64 [B, K_u]: which rows of the index are theirs."""
        with torch.no_grad():
            codes = self.quantizer.encode(self._tokens(histories, users))
        if self.shared:
            return self.quantizer.composite(codes)
        digits = codes.unflatten(1, (self.tokens, self.codebooks))
        return self.quantizer.composite(digits) + self._first_of_token(codes.device)

    def _first_of_token(self, device: torch.device) -> Tensor:
        return torch.arange(self.tokens, device=device) * self.codes**self.codebooks

    def code_scores(self, codes: Tensor) -> Tensor:
        """Return the term of each composite code [T] and item, float32 [T, rows(item)]; a row of the dense index."""
        with torch.no_grad():
            token, code = codes // self.codes**self.codebooks, codes % self.codes**self.codebooks
            digits = self.quantizer.split(code, self.codebooks)
            if self.shared:
                return self.token_scores(self.quantizer.decode(digits))
            books = token[:, None] * self.codebooks + torch.arange(self.codebooks, device=codes.device)
            parts = torch.zeros(len(codes), self.tokens, self.token_dim, device=codes.device)
            parts[torch.arange(len(codes)), token] = self.quantizer.codebooks[books, digits].flatten(1)
            return self.token_scores(parts.flatten(1))

    def scores(self, histories: Jagged, users: Tensor | None = None) -> Tensor:
        """Return the scores of all items by the quantised tokens, float32 [B, rows(item)]; -inf for item 0.

        The rows of codes are kept for the next call (512 MB at most), since users share them.
        """
        table, place = self._score_rows(self.encode(histories, users))
        scores = table[place[:, 0]]
        for token in range(1, self.tokens):
            scores += table[place[:, token]]
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
