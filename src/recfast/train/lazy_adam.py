"""Adam that touches only the table rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from recfast import ops


class LazyAdam(torch.optim.Adam):
    """Adam whose sparse gradients move the rows they name, and no other; dense gradients are dense Adam's, fused.

    Where most of a model is tables, a dense step reads and writes all of them for the few rows of a batch. It is
    another algorithm, not only a faster one: rows without a gradient stay where they are, and so do their moments,
    while dense Adam lets momentum carry them on and decays their moments at every step; weight decay is that of the
    rows that occur. The correction of the moments goes by the number of steps of the whole table.

    Parameters
    ----------
    params : iterable of parameters, or of groups
    lr, betas, eps, weight_decay
        As in `torch.optim.Adam`; `eps` is added before the correction of the second moment, as `torch.optim.SparseAdam`
        does. A learning rate is a number, not a tensor.

    Notes
    -----
    Sparse gradients come from `nn.Embedding(sparse=True)`, `NegativesLoss.sparse`, or a retriever's `sparse_gradients`.
    Rows named several times are summed in the order of the gradient, in float32: the step is deterministic. State and
    checkpoints have the form of `torch.optim.Adam`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Do one step; `closure`, if given, computes the loss again, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._move(parameter, parameter.grad, group)
                    sparse.append((parameter, parameter.grad))
                    parameter.grad = None
        super().step()
        for parameter, gradient in sparse:
            parameter.grad = gradient
        return loss

    def _move(self, table: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=table.device)
            state["exp_avg"] = torch.zeros_like(table, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(table, memory_format=torch.preserve_format)
        first, second, steps = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
        state["step"] += 1
        (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
        if table.device.type == "cpu" and table.dtype == torch.float32 and table.dim() == 2 and table.is_contiguous():
            ops.embedding_update_(
                table.detach(),
                gradient._indices()[0],
                None,
                gradient._values(),
                ops.UpdateState(moment=first, second=second),
                optimizer="adam",
                lr=lr,
                betas=(beta1, beta2),
                eps=eps,
                weight_decay=decay,
                step_count=steps,
                check=False,  # the training loop looks at the loss
            )
            return
        gradient = gradient.coalesce()
        ids = gradient.indices()[0]
        rows = table[ids]
        slope = gradient.values() + decay * rows
        mean, square = (
            first[ids].lerp_(slope, 1 - beta1),
            second[ids].mul_(beta2).addcmul_(slope, slope, value=1 - beta2),
        )
        first[ids], second[ids] = mean, square
        rate = lr * (1 - beta2 ** (steps + 1)) ** 0.5 / (1 - beta1 ** (steps + 1))
        table[ids] = rows - rate * mean / (square.sqrt() + eps)
