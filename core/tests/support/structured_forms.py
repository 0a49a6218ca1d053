"""Forms that structured output must serve, drawn by chance, and those that must hurt nobody."""

from hypothesis import strategies as st

_LEAVES = st.one_of(
    st.just({"type": "integer", "minimum": -50, "maximum": 500}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(1, 6).map(lambda n: {"type": "string", "maxLength": n}),
    st.lists(st.sampled_from(["red", "a b", "ü", "", 3, None, True]), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["x", 7, [1], {"k": "v"}]).map(lambda value: {"const": value}),
    st.just({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}),
)


def _larger(inner):
    names = st.lists(st.sampled_from(["a", "b", "name", "é", "x y"]), min_size=1, max_size=3, unique=True)
    objects = names.flatmap(
        lambda keys: st.tuples(st.tuples(*(inner for _ in keys)), st.integers(0, len(keys))).map(
            lambda drawn: {
                "type": "object",
                "properties": dict(zip(keys, drawn[0], strict=True)),
                "required": keys[: drawn[1]],
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda drawn: {"type": "array", "items": drawn[0], "minItems": drawn[1], "maxItems": drawn[1] + 2}
    )
    return st.one_of(objects, arrays, st.tuples(inner, inner).map(lambda drawn: {"anyOf": list(drawn)}))


SCHEMAS = st.recursive(_LEAVES, _larger, max_leaves=5)
"""JSON schemas whose every instance is short."""


def _references(count, link):
    chain = {f"a{i}": link(f"#/$defs/a{i + 1}") for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**chain, f"a{count}": {"type": "string"}}}


def _choices(depth):
    return {"allOf": [{"oneOf": [{"minLength": i}, {"maxLength": j}]} for i in range(depth) for j in range(depth)]}


HOSTILE_SCHEMAS = {
    "properties by the thousand": {"type": "object", "properties": {f"p{i}": {} for i in range(8000)}},
    "combinations": _choices(12),
    "products of alternatives": {
        "allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(8)]} for i in range(8)]
    },
    "a chain of references": _references(3000, lambda to: {"$ref": to}),
    "a chain of items": _references(3000, lambda to: {"items": {"$ref": to}}),
    "doubled references": _references(400, lambda to: {"anyOf": [{"$ref": to}, {"properties": {"q": {"$ref": to}}}]}),
    "itself": {"$ref": "#"},
    "a remote schema": {"$ref": "http://127.0.0.1:1/x.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a product of primes": {"type": "integer", "allOf": [{"multipleOf": p} for p in (7919, 7907, 7901, 7883)]},
    "an endless range": {"type": "number", "multipleOf": 1e-9, "minimum": 1e-300, "maximum": 1e300},
    "a pattern of stars": {"type": "string", "pattern": ".*" * 3000},
    "a pattern and a length": {"type": "string", "pattern": "^(a|b|c)*x.{50}$", "minLength": 1000},
    "nothing at all": {"type": "string", "enum": [1]},
}
HOSTILE_REGEXES = {
    "unbalanced": "(a",
    "looking ahead": "(?=a)b",
    "never": r"[^\s\S]",
    "stars": ".*" * 3000,
    "depth": "(" * 5000 + "a" + ")" * 5000,
}
HOSTILE_GRAMMARS = {
    "doubling tokens": "\n".join(["start: A0", *(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)), 'A40: "x"']),
    "nothing but itself": 'start: start "a"',
    "an unknown name": "start: nope",
    "an import": '%import /etc/passwd\nstart: "a"',
    "a chain of rules": "\n".join(["start: a0", *(f"a{i}: a{i + 1}" for i in range(5000)), 'a5000: "x"']),
    "no grammar": "{}{}{}",
}
