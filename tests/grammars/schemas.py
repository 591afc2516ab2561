"""JSON schemas of the kinds that APIs, forms and agents' tools ask for."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def obj(optional: tuple[str, ...] = (), /, **properties: Any) -> Schema:
    """An object whose properties are required but for those that are named."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def arr(items: Schema, least: int = 0, most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def text(most: int = 12, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def enum(*values: Any) -> Schema:
    return {"enum": list(values)}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def number(kind: str = "number", **more: Any) -> Schema:
    return {"type": kind, **more}


def formatted(name: str) -> Schema:
    return {"type": "string", "format": name}


STRING, INTEGER, BOOLEAN = text(), number("integer"), {"type": "boolean"}
POSITIVE = number("integer", minimum=1, maximum=1000)
SHARE = number(minimum=0, maximum=1)
CURRENCY = enum("eur", "usd", "jpy", "gbp")

TREE = {
    "$defs": {
        "node": obj(
            value=number("integer", minimum=0, maximum=9),
            children=arr({"$ref": "#/$defs/node"}, most=2),
        )
    },
    "$ref": "#/$defs/node",
}
EXPRESSION = {
    "$defs": {
        "expression": {
            "anyOf": [
                number("integer", minimum=0, maximum=99),
                obj(
                    op=enum("+", "-", "*", "/"),
                    left={"$ref": "#/$defs/expression"},
                    right={"$ref": "#/$defs/expression"},
                ),
            ]
        }
    },
    "$ref": "#/$defs/expression",
}
LINKED = {
    "$defs": {"cell": obj(("next",), head=STRING, next={"$ref": "#/$defs/cell"})},
    **obj(list={"$ref": "#/$defs/cell"}),
}
COMMENTS = {
    "$defs": {
        "comment": obj(
            ("replies",),
            author=STRING,
            body=text(20),
            replies=arr({"$ref": "#/$defs/comment"}, most=2),
        )
    },
    **obj(thread={"$ref": "#/$defs/comment"}),
}
POINT = arr(number(minimum=-180, maximum=180), 2, 2)

SCHEMAS: dict[str, Schema] = {
    # Bookings, orders and payments.
    "payment": obj(
        id=text(pattern="^pi_[a-z0-9]{8}$"), amount=POSITIVE, currency=CURRENCY
    ),
    "refund": obj(
        ("reason",),
        charge=text(pattern="^ch_[0-9]{4,6}$"),
        amount=POSITIVE,
        reason=enum("duplicate", "fraudulent", "requested_by_customer"),
    ),
    "invoice": obj(
        number=text(pattern="^INV-[0-9]{4}$"),
        lines=arr(obj(sku=STRING, quantity=POSITIVE, price=number(minimum=0)), 1),
        total=number(minimum=0, maximum=100000),
        paid=BOOLEAN,
    ),
    "subscription": obj(
        plan=enum("free", "team", "enterprise"),
        seats=POSITIVE,
        trial_end=maybe(formatted("date")),
    ),
    "cart": obj(items=arr(obj(name=STRING, count=POSITIVE)), coupon=maybe(STRING)),
    "order_status": obj(
        status=enum("pending", "shipped", "delivered", "returned"),
        carrier=maybe(enum("DHL", "UPS", "FedEx")),
        updated=formatted("date-time"),
    ),
    "flight": obj(
        carrier=text(pattern="^[A-Z]{2}$"),
        flight=number("integer", minimum=1, maximum=9999),
        legs=arr(obj(start=text(pattern="^[A-Z]{3}$"), end=text(pattern="^[A-Z]{3}$"))),
    ),
    "hotel": obj(
        name=text(20), stars=number("integer", minimum=1, maximum=5), pets=BOOLEAN
    ),
    "seat": obj(row=number("integer", minimum=1, maximum=60), seat=enum(*"ABCDEF")),
    "price": obj(amount=number(multipleOf=0.5, minimum=0, maximum=50), unit=CURRENCY),
    # Places and weather.
    "weather": obj(
        city=STRING,
        temperature=number(minimum=-60, maximum=60),
        conditions=arr(enum("sun", "rain", "snow", "wind"), 1),
    ),
    "geo_point": obj(type={"const": "Point"}, coordinates=POINT),
    "geo_line": obj(type={"const": "LineString"}, coordinates=arr(POINT, 2, 3)),
    "address": obj(
        ("unit",), street=text(20), unit=STRING, zip=text(pattern="^[0-9]{5}$")
    ),
    "place": obj(
        name=text(20), location=obj(lat=number(minimum=-90, maximum=90), lng=number())
    ),
    "country": obj(
        code=text(pattern="^[A-Z]{2}$"), name=enum("Österreich", "日本", "España")
    ),
    # People and messages.
    "person": obj(name=text(20), age=number("integer", minimum=0, maximum=130)),
    "contact": obj(name=STRING, email=formatted("email"), phone=maybe(STRING)),
    "user": obj(
        id=formatted("uuid"),
        login=text(10, minLength=1),
        roles=arr(enum("admin", "editor", "viewer"), 1, 2),
    ),
    "login": obj(user=STRING, password=text(16, minLength=8), remember=BOOLEAN),
    "email": obj(to=arr(STRING, 1), subject=text(20), body=text(40)),
    "chat_message": obj(role=enum("user", "assistant", "system"), content=text(30)),
    "slack": obj(channel=text(pattern="^#[a-z-]{1,10}$"), text=text(30)),
    "emoji": obj(reaction=enum("👍", "🎉", "❤️"), by=STRING),
    "translation": obj(
        source=enum("de", "en", "fr"),
        text=text(20),
        words=arr(enum("Straße", "été", "naïve")),
    ),
    "sms": {"type": "object", "properties": {"to": STRING, "text": STRING}},
    # Software.
    "issue": obj(
        title=text(30),
        labels=arr(enum("bug", "feature", "docs")),
        assignee=maybe(STRING),
        priority=number("integer", minimum=0, maximum=4),
    ),
    "pull_request": obj(head=STRING, base=STRING, draft=BOOLEAN, reviewers=arr(STRING)),
    "commit": obj(
        sha=text(pattern="^[0-9a-f]{7}$"), message=text(30), files=arr(STRING)
    ),
    "release": obj(tag=text(pattern=r"^v\d\.\d\.\d$"), prerelease=BOOLEAN),
    "diff": obj(path=STRING, hunks=arr(obj(line=POSITIVE, old=STRING, new=STRING))),
    "read_file": obj(("limit", "offset"), path=STRING, limit=POSITIVE, offset=POSITIVE),
    "edit_file": obj(("all",), path=STRING, old=text(20), new=text(20), all=BOOLEAN),
    "bash": obj(("timeout",), command=text(30), timeout=POSITIVE),
    "grep": obj(
        ("glob",), pattern=STRING, glob=STRING, **{"-n": BOOLEAN, "-i": BOOLEAN}
    ),
    "todo": obj(
        todos=arr(obj(content=STRING, status=enum("pending", "done"), id=STRING), 1)
    ),
    "http_request": obj(
        method=enum("GET", "POST", "PUT", "DELETE"),
        url=formatted("uri"),
        body=maybe(STRING),
    ),
    "sql": obj(table=STRING, columns=arr(STRING, 1), limit=maybe(POSITIVE)),
    "log_line": obj(
        level=enum("debug", "info", "error"), time=formatted("time"), message=text(30)
    ),
    "metric": obj(
        name=STRING, value=number(), tags={"type": "object", "maxProperties": 0}
    ),
    "container": obj(
        image=STRING,
        ports=arr(number("integer", minimum=1, maximum=65535)),
        tty=BOOLEAN,
    ),
    "ip": obj(v4=formatted("ipv4"), v6=maybe(formatted("ipv6"))),
    "config": {
        "type": "object",
        "patternProperties": {"^x-[a-z]{1,4}$": INTEGER},
        "additionalProperties": False,
    },
    # What models are asked to extract or to judge.
    "sentiment": obj(label=enum("positive", "neutral", "negative"), score=SHARE),
    "classification": obj(labels=arr(obj(name=STRING, confidence=SHARE), 1)),
    "answer": obj(reasoning=text(40), answer=enum("A", "B", "C", "D")),
    "steps": obj(steps=arr(obj(explanation=text(20), output=STRING), 1), final=STRING),
    "entities": obj(
        entities=arr(obj(text=STRING, kind=enum("person", "place"), start=INTEGER))
    ),
    "keywords": arr(text(10, minLength=2), 1, 4),
    "rating": number("integer", minimum=1, maximum=5),
    "yes": BOOLEAN,
    "choice": enum("yes", "no", None, 3),
    "quiz": obj(question=text(30), choices=arr(STRING, 2, 4), right=enum(0, 1, 2, 3)),
    "recipe": obj(
        title=text(20),
        ingredients=arr(
            obj(name=STRING, grams=number(exclusiveMinimum=0, maximum=5000))
        ),
        minutes=POSITIVE,
    ),
    "event": obj(
        day=formatted("date"), title=text(20), guests=arr(STRING), online=BOOLEAN
    ),
    # Alternatives, references, tuples and numbers.
    "shape": {
        "anyOf": [
            obj(kind={"const": "circle"}, radius=number(minimum=0)),
            obj(kind={"const": "rectangle"}, width=number(), height=number()),
        ]
    },
    "action": {
        "oneOf": [
            obj(type={"const": "click"}, x=INTEGER, y=INTEGER),
            obj(type={"const": "type"}, text=STRING),
            obj(type={"const": "wait"}, seconds=SHARE),
        ]
    },
    "id": {"anyOf": [STRING, INTEGER]},
    "types": {"type": ["string", "integer", "null"], "maxLength": 8},
    "pair": {
        "type": "array",
        "prefixItems": [STRING, INTEGER],
        "items": False,
        "minItems": 2,
    },
    "all_of": {"allOf": [{"type": "object"}, obj(a=INTEGER, b=STRING)]},
    "color": obj(hex=text(pattern="^#[0-9a-f]{6}$"), alpha=SHARE),
    "big": number("integer", minimum=10**12, maximum=10**15),
    "negative": number("integer", minimum=-50, maximum=-10),
    "any": {},
    "object": {"type": "object"},
    "map": {"type": "object", "additionalProperties": INTEGER},
    "escapes": obj(
        **{'quo"te': BOOLEAN, "line\nbreak": BOOLEAN, "back\\slash": BOOLEAN}
    ),
    "unicode_keys": obj(**{"größe": INTEGER, "名前": STRING}),
    # Those that contain themselves.
    "tree": TREE,
    "expression": EXPRESSION,
    "linked": LINKED,
    "comments": COMMENTS,
    "deep": obj(a=obj(b=obj(c=obj(d=obj(e=obj(f=obj(g=BOOLEAN))))))),
}
