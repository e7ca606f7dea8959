"""The schema: round trips, roles, and what it refuses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recfast.data import Categorical, Numeric, Schema, Sequence, Vector
from recfast.errors import InputError

_NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    names = draw(_NAMES)
    columns = [Categorical(names[0], role=draw(st.sampled_from([None, "item"])), min_count=draw(st.integers(1, 9)))]
    side = st.sampled_from(["user", "item", "context"])
    for name in names[1:]:
        columns.append(
            draw(
                st.one_of(
                    st.builds(Categorical, st.just(name), side=side, min_count=st.integers(1, 9)),
                    st.builds(Sequence, st.just(name), of=st.just(names[0]), max_length=st.integers(1, 500)),
                    st.builds(Numeric, st.just(name), st.sampled_from(["standard", "log", None]), side),
                    st.builds(Vector, st.just(name), st.integers(1, 999), side),
                )
            )
        )
    label = draw(st.none() | st.text(min_size=9, max_size=12))
    schema = Schema(columns, label=label, time=draw(st.none() | st.just("ts")), group=draw(st.none() | st.just("g")))
    if draw(st.booleans()):
        schema = schema.fit({column.name: draw(st.integers(1, 10**9)) for column in schema.categorical})
    return schema


@given(schemas())
def test_round_trip(schema: Schema) -> None:
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


def test_save_and_load(tmp_path) -> None:
    schema = Schema([Categorical("u", role="user"), Categorical("i", role="item"), Sequence("h"), Vector("v", 3)])
    schema = schema.fit({"u": 3, "i": 8})
    schema.save(tmp_path / "schema.json")
    assert Schema.load(tmp_path / "schema.json") == schema
    assert schema.sequences[0].of == "i", "'item' stands for the column with that role"
    assert (schema.user, schema.item, schema.names) == ("u", "i", ["u", "i", "h", "v"])
    assert [schema.rows(name) for name in ("u", "i", "h")] == [3, 8, 8]
    assert [column.side for column in schema.categorical] == ["user", "item"]


U, I = Categorical("user", role="user"), Categorical("item", role="item")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Schema([U, I, Numeric("user")]), "two columns are named 'user'"),
        (lambda: Schema([U, Categorical("who", role="user")]), "'user' and 'who' both have the role 'user'"),
        (lambda: Schema([U, I, Sequence("h", of="itme")]), "of = 'itme' is not .*'item'"),
        (lambda: Schema([U, Sequence("h")]), "of = 'item' is not a categorical column"),
        (lambda: Schema([Numeric("x")]), "no Categorical column"),
        (lambda: Schema([]), "no Categorical column"),
        (lambda: Schema([U, "item"]), r"columns\[1\] = 'item' is not"),
        (lambda: Schema([U, Numeric("click")], label="click"), "label 'click' is also a feature"),
        (lambda: Categorical("x", role="usr"), "role = 'usr'"),
        (lambda: Categorical("x", side="left"), "side = 'left'"),
        (lambda: Categorical("x", role="user", side="item"), "implies that side"),
        (lambda: Categorical("", role="user"), "non-empty string"),
        (lambda: Categorical("x", min_count=0), "min_count = 0"),
        (lambda: Sequence("x", max_length=0), "max_length = 0"),
        (lambda: Numeric("x", transform="sqrt"), "transform = 'sqrt'"),
        (lambda: Vector("x", dim=-1), "dim = -1"),
        (lambda: Schema([U, I]).rows("item"), "known after data.prepare"),
        (lambda: Schema([U, I]).fit({"user": 2, "item": 3}).rows("itm"), "no column 'itm'.*'item'"),
        (lambda: Schema([U, I, Numeric("p")]).position("p"), "no categorical column 'p'"),
        (lambda: Schema.from_dict({"columns": [], "labell": "x"}), "unknown key 'labell'.*'label'"),
        (lambda: Schema.from_dict({"columns": [{"kind": "cat"}]}), r"columns\[0\] has no 'kind'"),
        (lambda: Schema.from_dict({"columns": [{"kind": "numeric", "nam": "x"}]}), "unknown key 'nam'.*'name'"),
        (lambda: Schema.from_dict({"columns": [{"kind": "vector", "name": "x"}]}), "incomplete"),
        (lambda: Schema.from_dict([]), "JSON object"),
        (lambda: Schema.load("nowhere/schema.json"), "does not exist"),
    ],
)
def test_rejects_bad_input(make, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        make()
