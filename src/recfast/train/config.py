"""Typed settings: pydantic models are the truth, TOML the file, and an unknown key names the nearest known one."""

from __future__ import annotations

import copy
import difflib
import os
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recfast.errors import InputError
from recfast.files import write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A section of settings. Fields that may be None have the default None, for TOML has no word for it."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @classmethod
    def parse(cls: type[C], values: Mapping[str, Any], *, place: str = "config") -> C:
        """Check `values` and return the settings.

        Raises
        ------
        InputError
            A key is unknown (the nearest known one is named) or a value does not fit; `place` begins the sentence.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(f"{place}: {_sentence(cls, error.errors()[0])}") from None

    def to_toml(self) -> str:
        """Return the settings as TOML; what is None is left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the settings as TOML, whole or not at all."""
        write_text(path, self.to_toml())

    @classmethod
    def load(cls: type[C], path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> C:
        """Read a TOML file and apply `overrides`, each written `dotted.key=value`."""
        return cls.parse(override(read_toml(path), overrides), place=str(path))


class TrainConfig(Config):
    """How a model is trained.

    Attributes
    ----------
    epochs, steps
        Passes over the training rows; `steps` ends training earlier, after so many updates in all. Inside an epoch
        the model is measured then, and a training that goes on from there is the same as one that was not stopped.
    batch_size, eval_batch_size
        Rows of a training step; rows (ranking) or users (retrieval) scored at once in an evaluation.
    shared_histories
        Rankers: the rows of one moment are given their user's history once (`data.Loader(shared=True)`), which saves
        the more the longer histories are; the two batch sizes then count such requests, and requests are shuffled.
    lr, optimizer, weight_decay, clip_norm
        Of the dense weights. Embedding tables update themselves inside backward, with the model's own options.
        "lazy_adam": retrievers give sparse gradients of their tables, and only the rows of a batch (and their moments)
        move, which is not what dense Adam does: see `LazyAdam`. It takes no `clip_norm`.
    monitor, patience
        The metric that says which weights are the best: "auc" for ranking and "recall@50" for retrieval if left out,
        both on the validation split, or "loss" of the training rows. Training ends after `patience` evaluations
        without a gain; 0 never ends it early.
    lr_plateau
        After an evaluation without a gain lr is multiplied by this, a number in (0, 1); None never does.
    lr_patience
        So many evaluations without a gain in a row pass before `lr_plateau` acts, each time. A loss with few or shared
        negatives is noisy, and one unlucky epoch would else end the fast part of the training.
    seed
        Of the order of the rows and of dropout; 0 if left out.
    precision
        Of the dense arithmetic, in the words of Lightning Fabric.
    accelerator
        "auto" takes a GPU where there is one; the embedding tables have kernels for the CPU alone so far.
    checkpoint_every_steps
        Write a checkpoint inside an epoch too, after so many steps each.
    """

    epochs: int = Field(10, ge=0)
    batch_size: int = Field(1024, ge=1)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adam", "adamw", "adagrad", "sgd", "lazy_adam"] = "adam"
    weight_decay: float = Field(0.0, ge=0)
    patience: int = Field(2, ge=0)
    monitor: str | None = None
    lr_plateau: float | None = Field(None, gt=0, lt=1)
    lr_patience: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    clip_norm: float | None = Field(None, gt=0)
    eval_batch_size: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    shared_histories: bool = False
    checkpoint_every_steps: int | None = Field(None, ge=1)


class DataConfig(Config):
    """Which data: a name that `data.load` knows, where its files are, and its options."""

    name: str = "synthetic"
    path: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class CodesConfig(Config):
    """How item vectors become codes: `codebooks` bytes an item, each one of `n_codes` values."""

    codebooks: int = Field(16, ge=1)
    n_codes: int = Field(256, ge=2, le=65536)


class StageConfig(Config):
    """A trained stage of the cascade: the model's name, its options, its training."""

    model: str
    options: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = Field(default_factory=TrainConfig)


class RetrieverConfig(StageConfig):
    """The stage that finds candidates; its item vectors are served as codes."""

    model: str = "TwoTower"
    codes: CodesConfig = Field(default_factory=CodesConfig)


class RankerConfig(StageConfig):
    """The stage that orders candidates."""

    model: str = "DIN"


class RerankerConfig(Config):
    """The stage that diversifies the list.

    Attributes
    ----------
    kind
        Which re-ranker: "DPP", "KDPP", "MMR", "MSD", "SSD" or "XQuAD", see `recfast.rerank`.
    options
        Further options of it, such as `window`.
    diversity
        0 keeps the ranker's order, 1 looks at diversity alone.
    gain
        By what share intra-list diversity shall rise: the smallest trade-off that does it on the validation rows is
        taken. With 0, `diversity` is taken as it is.
    personal
        How much of the trade-off is the user's own, in [0, 1]: with 0 it is the same for all, with 1 it is `diversity`
        times the user's appetite for diversity, read from the history.
    gamma
        Of the kernel, (1 - gamma) F F' + gamma I, of DPP and KDPP: 0 forbids two items that are alike in all, more
        forgives them.
    features
        What makes two items alike: "genres", "vectors" (of the retriever), "both", or "auto": both, where genres are
        known. XQuAD looks at genres alone.
    pool
        How many of the best ranked candidates are re-ranked.
    recent
        So many of the items that a user liked last count as shown: the list is to differ from them too. KDPP takes no
        heed of it.
    """

    kind: Literal["DPP", "KDPP", "MMR", "MSD", "SSD", "XQuAD"] = "DPP"
    options: dict[str, Any] = Field(default_factory=dict)
    diversity: float = Field(0.3, ge=0, le=1)
    gain: float = Field(0.21, ge=0)
    personal: float = Field(0.5, ge=0, le=1)
    gamma: float = Field(0.2, ge=0, lt=1)
    features: Literal["auto", "genres", "vectors", "both"] = "auto"
    pool: int | None = Field(50, ge=1)
    recent: int = Field(0, ge=0)


class PipelineConfig(Config):
    """Lengths along the cascade, and what is left out of it.

    Attributes
    ----------
    candidates
        Items that are retrieved for a user.
    k
        Items in the final list.
    exclude
        What is not recommended again: what the user has "seen" (any row of the log), what the user has "liked", or
        "nothing".
    blend
        How much the retriever's score counts beside the ranker's; chosen from a grid by NDCG on the validation rows if
        left out.
    """

    candidates: int = Field(100, ge=1)
    k: int = Field(10, ge=1)
    exclude: Literal["seen", "liked", "nothing"] = "seen"
    blend: float | None = Field(None, ge=0)


class RunConfig(Config):
    """All of `recfast run`: data, the three stages, lengths, seed, and where the results go.

    `compare_seeds` trains the ranker again with 8-bit and with float tables, on so many seeds each.
    """

    seed: int = Field(0, ge=0, lt=2**63)
    out: str | None = None
    data: DataConfig = Field(default_factory=DataConfig)
    retriever: RetrieverConfig = Field(default_factory=RetrieverConfig)
    ranker: RankerConfig = Field(default_factory=RankerConfig)
    second_ranker: StageConfig | None = None
    reranker: RerankerConfig = Field(default_factory=RerankerConfig)
    compare_seeds: int = Field(0, ge=0)
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig)

    def training(self, stage: Literal["retriever", "ranker", "second_ranker"]) -> TrainConfig:
        """Return the training settings of `stage`; one that names no seed takes the run's."""
        train = getattr(self, stage).train
        return train if train.seed is not None else train.model_copy(update={"seed": self.seed})


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file; a missing or malformed one is an `InputError`."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected settings in TOML") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read, expected settings in TOML ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not TOML: {error}") from None


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `values` with each `dotted.key=value` set; a value is a TOML literal, or else a plain string."""
    result = copy.deepcopy(dict(values))
    for text in overrides:
        key, equals, literal = text.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise InputError(f"-o {text}: expected dotted.key=value, such as ranker.train.lr=5e-4")
        table = result
        for depth, name in enumerate(names[:-1]):
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise InputError(f"-o {text}: {'.'.join(names[: depth + 1])} is a value, expected a table")
        table[names[-1]] = _literal(literal.strip())
    return result


def _literal(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break could smuggle in a second key: then the text is no literal.
    return parsed["value"] if parsed.keys() == {"value"} else text


def _sentence(root: type[BaseModel], error: Mapping[str, Any]) -> str:
    """Turn one pydantic error into a sentence."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = sorted(_fields_at(root, error["loc"][:-1]))
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        if not close:
            return f"the key {where} is unknown, expected one of {', '.join(known)}"
        return f"the key {where} is unknown, did you mean {'.'.join([*map(str, error['loc'][:-1]), close[0]])}?"
    if error["type"] == "missing":
        return f"the key {where} is missing"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where} = {error['input']!r}: {message}"


def _fields_at(root: type[BaseModel], location: Iterable[Any]) -> Iterable[str]:
    """Return the names of the fields of the section that `location` leads to."""
    section: type[BaseModel] = root
    for part in location:
        annotation = section.model_fields[part].annotation
        choices = [annotation, *typing.get_args(annotation)]
        section = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return section.model_fields.keys()
