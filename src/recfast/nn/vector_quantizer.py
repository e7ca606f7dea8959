"""Vectors replaced by learnt codes inside a network: product quantisation with a straight-through gradient."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of k-means when the codebooks begin.
_ITERATIONS = 10
# Distances held at once, 64 MiB.
_DISTANCES = 1 << 24
# Vectors a code that are remembered from the warm-up.
_RECENT = 64


class Quantized(NamedTuple):
    """What `VectorQuantizer` makes of vectors.

    vectors
        float32 [..., D], each part the nearest code vector; the gradient passes through as if nothing had happened.
    codes
        int64 [..., M].
    loss
        A scalar that draws vectors (and codebooks learnt by gradient) to each other.
    """

    vectors: Tensor
    codes: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    r"""Cut a vector in M parts and replace each by the nearest of the K vectors of its own codebook, in training too.

    .. math::
        c_m = \arg\min_j \lVert x^{(m)} - e_{m,j} \rVert^2, \qquad q = [e_{1,c_1}; \ldots; e_{M,c_M}], \qquad
        \frac{\partial q}{\partial x} := I

    Ties go to the lowest code.

    Parameters
    ----------
    dim : int
        D, a multiple of `n_codebooks`.
    n_codebooks, n_codes : int
        M and K.
    update : {"ema", "gradient"}
        "ema": a code vector is the moving average of the parts it stands for, and the loss is
        :math:`\beta\,\mathrm{mse}(x, \mathrm{sg}(q))`. "gradient": it is a parameter, and the loss is
        :math:`\mathrm{mse}(q, \mathrm{sg}(x)) + \beta\,\mathrm{mse}(x, \mathrm{sg}(q))`.
    commitment : float, optional
        :math:`\beta`; 1 for "ema" and 0.25 for "gradient" where left out.
    decay : float in (0, 1)
        Of the moving averages.
    init : {"kmeans", "sample"}
        How the codebooks begin, from the vectors of the first training batch: k-means, or some of them.
    warm_up : int
        So many training batches pass unchanged, while the codebooks only follow them; then the codebooks begin anew,
        from the latest 64 K vectors: vectors that are not trained yet tell nothing about where codes are needed.
    revive : float
        A code that is used less than this share of the average use is dead, and begins again at a vector of the batch;
        0 leaves the dead alone.
    seed : int
        Of the beginning of the codebooks. Revived codes draw from torch's own generator.

    Raises
    ------
    ValueError
        An option out of range.

    Notes
    -----
    The codebooks, the averages and the count of batches travel with `state_dict`.

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017, arXiv 1711.00937
    (appendix A: moving averages). Bengio, Léonard, Courville, arXiv 1308.3432 (straight-through).

    Examples
    --------
    >>> quantizer = VectorQuantizer(8, n_codebooks=2, n_codes=4)
    >>> out = quantizer(torch.randn(100, 3, 8, generator=torch.Generator().manual_seed(0)))
    >>> out.vectors.shape, out.codes.shape
    (torch.Size([100, 3, 8]), torch.Size([100, 3, 2]))
    """

    def __init__(
        self,
        dim: int,
        n_codebooks: int = 2,
        n_codes: int = 256,
        *,
        update: Literal["ema", "gradient"] = "ema",
        commitment: float | None = None,
        decay: float = 0.99,
        init: Literal["kmeans", "sample"] = "kmeans",
        warm_up: int = 0,
        revive: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if n_codebooks < 1 or dim < 1 or dim % n_codebooks:
            raise ValueError(f"VectorQuantizer: dim must be a positive multiple of {n_codebooks} codebooks, got {dim}")
        if n_codes < 1 or warm_up < 0:
            raise ValueError(
                f"VectorQuantizer: n_codes and warm_up must be at least 1 and 0, got {n_codes} and {warm_up}"
            )
        for name, value, allowed in (("update", update, ("ema", "gradient")), ("init", init, ("kmeans", "sample"))):
            if value not in allowed:
                raise ValueError(f"VectorQuantizer: {name} must be {allowed[0]!r} or {allowed[1]!r}, got {value!r}")
        commitment = {"ema": 1.0, "gradient": 0.25}[update] if commitment is None else commitment
        if not 0 < decay < 1 or not 0 <= revive < 1 or not 0 <= commitment < float("inf"):
            raise ValueError(
                "VectorQuantizer: decay must lie in (0, 1), revive in [0, 1) and commitment be at least 0, got "
                f"{decay}, {revive} and {commitment}"
            )
        self.dim, self.n_codebooks, self.n_codes, self.update = dim, n_codebooks, n_codes, update
        self.commitment, self.decay, self.init, self.revive = commitment, decay, init, revive
        self.warm_up, self.seed = warm_up, seed
        books = torch.zeros(n_codebooks, n_codes, dim // n_codebooks)
        if update == "gradient":
            self.codebooks = nn.Parameter(books)
        else:
            self.register_buffer("codebooks", books)
            self.register_buffer("sums", books.clone())
        # How often a training batch takes each code, as a moving average.
        self.register_buffer("counts", torch.zeros(n_codebooks, n_codes))
        # The latest vectors of the warm-up, oldest first, and how many of them there are.
        self.register_buffer("recent", torch.zeros(_RECENT * n_codes if warm_up else 0, dim))
        self.register_buffer("n_recent", torch.zeros((), dtype=torch.int64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_codebooks={self.n_codebooks}, n_codes={self.n_codes}, update={self.update!r}"

    def forward(self, x: Tensor) -> Quantized:
        """Quantise, and in training move the codebooks.

        Parameters
        ----------
        x : Tensor [..., D], float32

        Returns
        -------
        Quantized
            In training during `warm_up` the vectors are `x` itself and the loss is 0.

        Raises
        ------
        RuntimeError
            In evaluation, before the codebooks have begun.
        ValueError
            Another width; a vector that is not finite, in training.
        """
        self._check(x)
        learning = self.training and x.numel() > 0
        if learning:
            if int(self.batches) <= self.warm_up:
                self._remember(x.detach())
            if not bool(self.begun) or int(self.batches) == self.warm_up:
                self._begin(self.recent[len(self.recent) - int(self.n_recent) :] if self.warm_up else x.detach())
                # Each code begins with the average use, so that none is dead before it had its turn.
                self.counts.fill_(x.numel() / self.dim / self.n_codes)
                if self.update == "ema":
                    self.sums.copy_(self.codebooks * self.counts[..., None])
                self.begun.fill_(True)
            self.batches += 1
        codes = self.encode(x)
        if learning:
            self._learn(x.detach(), codes)
            if int(self.batches) <= self.warm_up:
                return Quantized(x, codes, x.new_zeros(()))
        found = self.decode(codes)
        loss = self.commitment * F.mse_loss(x, found.detach()) if x.numel() else x.sum()
        if self.update == "gradient" and x.numel():
            loss = loss + F.mse_loss(found, x.detach())
        # In this order the values are the code vectors to the last bit.
        return Quantized(found.detach() + (x - x.detach()), codes, loss)

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of vectors [..., D]: int64 [..., M]."""
        self._check(x)
        if not bool(self.begun):
            raise RuntimeError("VectorQuantizer.encode: the codebooks must be trained or loaded first")
        books = self.codebooks.detach()
        parts = x.detach().reshape(-1, self.n_codebooks, books.shape[2]).transpose(0, 1)
        # |x|^2 is the same for every code and left out.
        norms, books = books.square().sum(-1)[:, None], books.transpose(1, 2)
        pieces = parts.split(max(1, _DISTANCES // (self.n_codebooks * self.n_codes)), dim=1)
        codes = [torch.baddbmm(norms, piece, books, alpha=-2).argmin(-1) for piece in pieces]
        joined = codes[0] if len(codes) == 1 else torch.cat(codes, dim=1)
        return joined.T.reshape(*x.shape[:-1], self.n_codebooks)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors that codes [..., M] stand for, float32 [..., D]; differentiable in the codebooks."""
        books = torch.arange(self.n_codebooks, device=codes.device)
        return self.codebooks[books, codes].flatten(-2)

    def composite(self, codes: Tensor) -> Tensor:
        r"""Return one number for the M codes [..., M]: :math:`\sum_m c_m K^{M-m}`, int64 [...]."""
        number, *rest = codes.unbind(-1)
        for code in rest:
            number = number * self.n_codes + code
        return number

    def split(self, composite: Tensor, n_codebooks: int | None = None) -> Tensor:
        """Return the M codes of composite numbers, the inverse of `composite`: int64 [..., M]."""
        books = self.n_codebooks if n_codebooks is None else n_codebooks
        powers = self.n_codes ** torch.arange(books - 1, -1, -1, device=composite.device)
        return composite[..., None] // powers % self.n_codes

    @torch.no_grad()
    def report(self, x: Tensor | None = None) -> dict[str, Any]:
        """How the codes are used: by `x` [..., D], or by the latest training batches (their moving average).

        Returns
        -------
        dict
            used_codes: codes in use, per codebook; perplexity: exp of the entropy of the codes, per codebook, at most
            K. With `x` also unique_codes: distinct composite codes; and reconstruction_error: sum of squared errors
            over the sum of squared deviations from the mean.
        """
        if x is None:
            counts, out = self.counts, {}
            used = counts > self.revive * counts.mean(1, keepdim=True)
        else:
            codes = self.encode(x).flatten(0, -2)
            counts = torch.stack([torch.bincount(c, minlength=self.n_codes) for c in codes.T]).float()
            used, flat = counts > 0, x.flatten(0, -2).double()
            spread = (flat - flat.mean(0)).square().sum()
            out = {
                "unique_codes": len(self.composite(codes).unique()),
                "reconstruction_error": float((self.decode(codes) - flat).square().sum() / spread),
            }
        share = counts / counts.sum(1, keepdim=True).clamp(min=1e-12)
        perplexity = torch.exp(-torch.xlogy(share, share).sum(1))
        return {"used_codes": used.sum(1).tolist(), "perplexity": [float(p) for p in perplexity], **out}

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        """Put the codebooks where the vectors are."""
        generator = torch.Generator().manual_seed(self.seed)
        parts = x.unflatten(-1, (self.n_codebooks, -1)).flatten(0, -3)
        self._finite(parts)
        for book in range(self.n_codebooks):
            part = parts[:, book]
            order = torch.randperm(len(part), generator=generator).to(part.device)
            # Fewer vectors than codes: some codes begin at the same place, and are revived when vectors spread.
            centres = part[order[torch.arange(self.n_codes, device=part.device) % len(part)]].clone()
            for _ in range(_ITERATIONS if self.init == "kmeans" else 0):
                nearest = torch.cdist(part, centres).argmin(1)
                counts = torch.bincount(nearest, minlength=self.n_codes)
                means = torch.zeros_like(centres).index_add_(0, nearest, part) / counts.clamp(min=1)[:, None]
                centres = torch.where(counts[:, None] > 0, means, centres)
            self.codebooks.data[book] = centres

    @torch.no_grad()
    def _remember(self, x: Tensor) -> None:
        """Put the vectors of a batch behind the others, and forget as many of the oldest."""
        x = x.flatten(0, -2)[-len(self.recent) :] if len(self.recent) else x.flatten(0, -2)[:0]
        if len(x):
            self.recent.copy_(torch.cat([self.recent[len(x) :], x]))
            self.n_recent.fill_(min(len(self.recent), int(self.n_recent) + len(x)))

    @torch.no_grad()
    def _learn(self, x: Tensor, codes: Tensor) -> None:
        """Move averages by one batch, then the code vectors and the dead codes."""
        parts = x.unflatten(-1, (self.n_codebooks, -1)).flatten(0, -3)
        self._finite(parts)
        codes = codes.flatten(0, -2)
        for book in range(self.n_codebooks):
            count = torch.bincount(codes[:, book], minlength=self.n_codes).to(parts.dtype)
            self.counts[book].lerp_(count, 1 - self.decay)
            if self.update == "ema":
                total = torch.zeros_like(self.sums[book]).index_add_(0, codes[:, book], parts[:, book])
                self.sums[book].lerp_(total, 1 - self.decay)
                self.codebooks[book] = self.sums[book] / self.counts[book].clamp(min=1e-30)[:, None]
        average = len(parts) / self.n_codes
        dead = (self.counts < self.revive * average).nonzero()
        if len(dead):
            taken = torch.randint(len(parts), (len(dead),), device=parts.device)
            book, code = dead.unbind(1)
            self.codebooks.data[book, code] = parts[taken, book]
            self.counts[book, code] = average
            if self.update == "ema":
                self.sums[book, code] = parts[taken, book] * average

    def _finite(self, parts: Tensor) -> None:
        if not bool(torch.isfinite(parts).all()):
            raise ValueError("VectorQuantizer: x must be finite, got NaN or infinity")

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"VectorQuantizer: x must have shape [..., {self.dim}], got {list(x.shape)}")
