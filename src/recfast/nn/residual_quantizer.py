"""Codes for vectors: an auto-encoder whose middle is coded by residual quantisation (RQ-VAE)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from recfast.nn._tokenizer import Tokenizer, kmeans, sample, squared_distances
from recfast.nn.collisions import Method


class ResidualQuantizer(Tokenizer):
    """An encoder, M levels of codes for what it gives, and a decoder, trained together (RQ-VAE).

    .. math::
        z = E(x), \\qquad r_0 = z, \\qquad c_m = \\arg\\min_j \\lVert r_m - \\mu_{m,j} \\rVert^2, \\qquad
        r_{m+1} = r_m - \\mu_{m,c_m}, \\qquad \\hat x = D\\Big(\\sum_m \\mu_{m,c_m}\\Big)

        L = \\lVert x - \\hat x \\rVert^2 + \\sum_m \\lVert \\mathrm{sg}(r_m) - \\mu_{m,c_m} \\rVert^2
            + \\beta \\lVert r_m - \\mathrm{sg}(\\mu_{m,c_m}) \\rVert^2

    each square a mean over its entries. The gradient of the first term reaches the encoder as if coding were the
    identity (straight-through). Inside, vectors are centred and divided by one number, so that L has no unit: their
    mean and root mean square, of the rows of `fit` or of the first batch in training.

    Parameters
    ----------
    dim : int
        Width of the vectors.
    n_levels : int
        M.
    n_codes : int
        K, in [1, 65536].
    latent_dim : int
        Width of z.
    hidden : sequence of int
        Widths of the encoder's hidden layers (ReLU); the decoder's are the same backwards.
    decoder_hidden : sequence of int, optional
        The decoder's own; empty for an affine decoder, which `score_table` needs.
    codebook : "ema" or "gradient"
        How centroids learn: as moving averages of the residuals coded by them (the middle term of L is left out then),
        or by the gradient of the middle term.
    commitment : float
        beta.
    decay : float
        Of the moving averages.
    revive : float
        A code used less than this share of the uniform use is dead and moved to a residual of the batch, drawn at
        random; 0 leaves dead codes alone.
    collisions : "digit", "sinkhorn" or "none"
        How `assign` tells items of equal codes apart; see `resolve_collisions`.

    Notes
    -----
    The first batch of training initialises the centroids by residual k-means (FAISS) of what the encoder gives. Only
    `loss` in training mode changes buffers; `encode` is deterministic. Ties go to the lowest code.

    References
    ----------
    Lee et al., "Autoregressive Image Generation using Residual Quantization", CVPR 2022. Rajput et al., "Recommender
    Systems with Generative Retrieval" (TIGER), NeurIPS 2023: 512-256-128, 32, three levels of 256, beta .25, k-means
    first. Moving averages and dead codes: van den Oord et al., "Neural Discrete Representation Learning", NeurIPS
    2017; Dhariwal et al., "Jukebox", 2020.

    Examples
    --------
    >>> x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    >>> tokenizer = ResidualQuantizer(16, n_levels=2, n_codes=8, latent_dim=8, hidden=(32,)).fit(x, epochs=3)
    >>> tokenizer.encode(x).shape
    torch.Size([500, 2])
    """

    def __init__(
        self,
        dim: int,
        n_levels: int = 3,
        n_codes: int = 256,
        *,
        latent_dim: int = 32,
        hidden: Sequence[int] = (512, 256, 128),
        decoder_hidden: Sequence[int] | None = None,
        codebook: Literal["ema", "gradient"] = "ema",
        commitment: float = 0.25,
        decay: float = 0.99,
        revive: float = 0.03,
        collisions: Method = "digit",
    ):
        super().__init__(dim, n_levels, n_codes, collisions)
        if codebook not in ("ema", "gradient"):
            raise ValueError(f"ResidualQuantizer: codebook must be ema or gradient, got {codebook!r}")
        if latent_dim < 1 or min([*hidden, *(decoder_hidden or ()), 1]) < 1:
            raise ValueError("ResidualQuantizer: latent_dim and the widths of hidden layers must be at least 1")
        if not 0 <= decay < 1 or not commitment >= 0 or not 0 <= revive < 1:
            raise ValueError(
                "ResidualQuantizer: decay and revive must be in [0, 1) and commitment at least 0,"
                f" got {decay}, {revive} and {commitment}"
            )
        self.codebook, self.commitment, self.decay, self.revive = codebook, commitment, decay, revive
        self.hidden = tuple(hidden)
        outward = self.hidden[::-1] if decoder_hidden is None else tuple(decoder_hidden)
        self.decoder_hidden = outward
        self.encoder = _mlp(dim, *hidden, latent_dim)
        self.decoder = _mlp(latent_dim, *outward, dim)
        centroids = torch.zeros(n_levels, n_codes, latent_dim)
        if codebook == "gradient":
            self.centroids = nn.Parameter(centroids)
        else:
            self.register_buffer("centroids", centroids)
            self.register_buffer("sums", torch.zeros(n_levels, n_codes, latent_dim))
        # Moving averages of how many rows of a batch have each code.
        self.register_buffer("counts", torch.zeros(n_levels, n_codes))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        # Batches seen; 0 before the centroids are initialised. Seeds what is drawn at random, with `seed`.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self.history: list[float] = []

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_levels={self.n_codebooks}, n_codes={self.n_codes}, codebook={self.codebook!r}"

    def _options(self) -> dict[str, Any]:
        return {
            "n_levels": self.n_codebooks,
            "latent_dim": self.centroids.shape[2],
            "hidden": list(self.hidden),
            "decoder_hidden": list(self.decoder_hidden),
            "codebook": self.codebook,
            "commitment": self.commitment,
            "decay": self.decay,
            "revive": self.revive,
        }

    def fit(
        self,
        x: torch.Tensor | np.ndarray,
        seed: int = 0,
        *,
        epochs: int = 100,
        batch_size: int = 1024,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
    ) -> ResidualQuantizer:
        """Train from the start on these vectors alone, by AdamW.

        `history` holds the mean loss of each epoch afterwards. Warns where a level has collapsed and items share
        their codes: a perplexity below a quarter of K (or of the items, if fewer).

        Parameters
        ----------
        x : Tensor or array [N, D], float32, N >= 1
        seed : int
            Of the weights, the centroids and the order of rows: the same seed gives the same tokeniser on the same
            machine with the same number of threads.
        epochs, batch_size : int
        lr, weight_decay : float

        Returns
        -------
        The tokeniser itself, in evaluation mode.

        Raises
        ------
        TypeError, ValueError
            Another dtype or shape, no rows, NaN or infinity; no epoch, no row a batch.
        """
        x = self._rows_to_fit(x)
        if epochs < 1 or batch_size < 1:
            raise ValueError(
                f"ResidualQuantizer.fit: epochs and batch_size must be at least 1, got {epochs} and {batch_size}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in [*self.encoder, *self.decoder]:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        self.seed.fill_(seed)
        self._initialise(x.to(self._device))
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay)
        self.train()
        self.history = []
        with torch.enable_grad():
            for _ in range(epochs):
                total = 0.0
                for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                    loss = self.loss(x[rows].to(self._device))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += float(loss.detach()) * len(rows)
                self.history.append(total / len(x))
        self.eval()
        self._after_fit(x)
        self._warn_of_collapse(len(x))
        return self

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """L of a batch, a scalar to be minimised, alone or beside other losses.

        In training mode the first call initialises the centroids, and each call moves them on where they are moving
        averages and revives dead codes. Differentiable in `x`, the weights, and the centroids where they learn by
        gradient.

        Parameters
        ----------
        x : Tensor [B, D], float32, B >= 1

        Raises
        ------
        TypeError, ValueError
            Another dtype or shape, no rows, NaN or infinity.
        RuntimeError
            In evaluation mode before any training.
        """
        self._vectors("loss", x)
        if len(x) == 0:
            raise ValueError("ResidualQuantizer.loss: x must have at least one row, got none")
        if not self._fitted():
            if not self.training:
                self._require_fitted("loss")
            self._initialise(x.detach())
        scaled = (x - self.mean) / self.scale
        z = self.encoder(scaled)
        codes, residuals = self._levels(z.detach())
        said = torch.zeros_like(z)
        commitment = learning = z.new_zeros(())
        for level in range(self.n_codebooks):
            chosen = self.centroids[level][codes[:, level]]
            # The residual with the gradient of z: what earlier levels said is a constant to it.
            commitment = commitment + F.mse_loss(z - said.detach(), chosen.detach())
            if self.codebook == "gradient":
                learning = learning + F.mse_loss(chosen, residuals[level])
            said = said + chosen
        loss = F.mse_loss(self.decoder(straight_through(z, said)), scaled) + learning + self.commitment * commitment
        if self.training:
            self._learn(codes, residuals)
        return loss

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What vectors become: (decoded [B, D], differentiable as `loss` is; codes [B, M] int64)."""
        self._require_fitted("forward")
        z = self.encoder((x - self.mean) / self.scale)
        codes, residuals = self._levels(z.detach())
        # What is left after the last level, taken off.
        said = z.detach() - residuals[-1] + self.centroids[-1].detach()[codes[:, -1]]
        return self.decoder(straight_through(z, said)) * self.scale + self.mean, codes

    def _score_table(self, queries: torch.Tensor) -> torch.Tensor:
        if len(self.decoder) > 1:
            raise ValueError(
                "ResidualQuantizer.score_table: the decoder must be affine (decoder_hidden=()),"
                " since scores are no sums over codes behind hidden layers"
            )
        layer = self.decoder[0]
        table = torch.einsum("ql,mkl->qmk", queries @ layer.weight * self.scale, self.centroids)
        constant = queries @ (layer.bias * self.scale + self.mean)
        return torch.cat([table[:, :1] + constant[:, None, None], table[:, 1:]], dim=1)

    def _fitted(self) -> bool:
        return bool(self.steps > 0)

    @torch.no_grad()
    def _initialise(self, x: torch.Tensor) -> None:
        """Mean and scale of these rows, and centroids by residual k-means of what the encoder gives for them."""
        self.mean.copy_(x.mean(0))
        spread = float((x - self.mean).square().mean().sqrt())
        self.scale.fill_(spread if spread > 1e-6 * float(x.abs().max()) else 1.0)
        residual = torch.cat([self.encoder((x[rows] - self.mean) / self.scale) for rows in self._pieces(len(x))])
        for level in range(self.n_codebooks):
            rows = sample(residual.cpu(), self.n_codes, int(self.seed) + level)
            centroids, _ = kmeans(rows.numpy(), self.n_codes, int(self.seed) + level, 10)
            self.centroids[level] = torch.from_numpy(centroids).to(residual.device)
            for rows in self._pieces(len(residual)):
                residual[rows] -= self.centroids[level][self._nearest(level, residual[rows])]
            # As if every code had been used alike: none is dead before it had its time.
            self.counts[level] = 1.0
        if self.codebook == "ema":
            self.sums.copy_(self.centroids)
        self.steps.fill_(1)

    def _nearest(self, level: int, residual: torch.Tensor) -> torch.Tensor:
        return squared_distances(residual, self.centroids[level], self.n_codes).argmin(1)

    @torch.no_grad()
    def _levels(self, z: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The codes [n, M] and what each level was to code."""
        codes, residuals = [], [z]
        for level in range(self.n_codebooks):
            codes.append(self._nearest(level, residuals[-1]))
            residuals.append(residuals[-1] - self.centroids[level][codes[-1]])
        return torch.stack(codes, dim=1), residuals[:-1]

    @torch.no_grad()
    def _learn(self, codes: torch.Tensor, residuals: list[torch.Tensor]) -> None:
        """Move averages on, and dead codes to where rows are."""
        generator = torch.Generator().manual_seed((1_000_003 * int(self.seed) + int(self.steps)) % 2**63)
        share = self.n_codes / len(codes)
        for level, residual in enumerate(residuals):
            # In units of the uniform use, so that batches of any size count alike.
            here = torch.bincount(codes[:, level], minlength=self.n_codes).to(self.counts) * share
            self.counts[level].lerp_(here, 1 - self.decay)
            if self.codebook == "ema":
                total = torch.zeros_like(self.sums[level]).index_add_(0, codes[:, level], residual) * share
                self.sums[level].lerp_(total, 1 - self.decay)
            dead = (self.counts[level] < self.revive).nonzero()[:, 0]
            dead = dead[: len(residual)]
            if len(dead):
                rows = torch.randperm(len(residual), generator=generator)[: len(dead)].to(residual.device)
                self.centroids.data[level, dead] = residual[rows]
                self.counts[level, dead] = 1.0
                if self.codebook == "ema":
                    self.sums[level, dead] = residual[rows]
            if self.codebook == "ema":
                # A code hardly ever used keeps its place.
                used = self.counts[level] > 1e-6
                fresh = self.sums[level] / self.counts[level].clamp(min=1e-6)[:, None]
                self.centroids[level] = torch.where(used[:, None], fresh, self.centroids[level])
        self.steps += 1

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._levels(self.encoder((x - self.mean) / self.scale))[0]

    def _decodings(self, codes: torch.Tensor, mean: torch.Tensor) -> Iterator[torch.Tensor]:
        said = torch.zeros(len(codes), self.centroids.shape[2], device=codes.device)
        for level in range(self.n_codebooks):
            said += self.centroids[level][codes[:, level]]
            yield self.decoder(said) * self.scale + self.mean

    def _last_distances(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        last = self._levels(self.encoder((x - self.mean) / self.scale))[1][-1]
        return squared_distances(last, self.centroids[-1], self.n_codes) + last.square().sum(1, keepdim=True)


def straight_through(x: torch.Tensor, coded: torch.Tensor) -> torch.Tensor:
    """`coded`, with the gradient going to `x` as if nothing had been done to it."""
    return x + (coded - x).detach()


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
