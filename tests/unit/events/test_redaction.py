"""The redactor returns what z4j_core's redaction engine returns."""

from hypothesis import given, settings
from hypothesis import strategies as st
from z4j_core.redaction.engine import RedactionConfig, RedactionEngine
from z4j_core.redaction.patterns import DEFAULT_VALUE_PATTERNS

from z4j_bare.events.redaction import Redactor, ValueMatcher, _required_literal
from z4j_bare.events.snapshot import MAX_CHARS, snapshot

KEYS = st.sampled_from(["password", "user", "Api-Key", "token", "note", "order_id"]) | st.text(
    max_size=8
)
TEXTS = st.sampled_from(
    [
        "alice@example.com",
        "Bearer abcdefghijklmnop",
        "plain",
        "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
        "123-45-6789",
    ]
) | st.text(max_size=90)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=15,
)


@given(VALUES)
def test_redactor_equals_engine(value):
    """For any plain value, scrubbed twice, the redactor returns what z4j_core's engine returns."""
    engine = RedactionEngine(
        RedactionConfig(extra_key_patterns=("order_.*",), extra_value_patterns=("pl.in",))
    )
    redactor = Redactor(engine)
    expected = engine.scrub(value)
    assert redactor.scrub(value) == expected
    assert redactor.scrub(value) == expected


PIECES = st.sampled_from(
    [
        "eyJhbGci",
        ".eyJzdWIi",
        ".sig-_1",
        "Bearer ",
        "bEaReR\t",
        "a" * 24,
        "0" * 36,
        "sk_live_",
        "SK_TEST_",
        "pk_test_",
        "whsec_",
        "rk_live_",
        "xoxb-",
        "XOXP-",
        "xoxa-",
        "ghp_",
        "gho_",
        "ghs_",
        "github_pat_",
        "x" * 82,
        "AKIA",
        "asia",
        "ABCDEFGH12345678",
        "https://hooks.slack.com/services/T0/B0/x",
        "AIza",
        "b" * 35,
        "SK",
        "f" * 32,
        "SG.",
        "c" * 22,
        ".",
        "d" * 43,
        "postgres://",
        "user:pw@host",
        "redis://",
        "-----BEGIN RSA PRIVATE KEY-----",
        "me@x.io",
        "@",
        "123-45-6789",
        "-",
        " ",
        "task",
        "\u212a",
        "\u017f",
        "plain",
    ]
)


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=6).map("".join))
def test_value_matcher_equals_engine(text):
    """For any text made of secrets and their parts, the literals change no answer."""
    engine = RedactionEngine()
    assert ValueMatcher(engine)(text) == engine.value_matches(text)


def test_every_built_in_pattern_has_required_literal():
    """Every pattern of this z4j_core has its literal; one of a later version is tried on every
    text.
    """
    assert [
        pattern for pattern in DEFAULT_VALUE_PATTERNS if _required_literal(pattern) is None
    ] == []
    assert (
        len(ValueMatcher(RedactionEngine(RedactionConfig(extra_value_patterns=("odd",))))._ungated)
        == 1
    )


def test_redactor_truncates_like_engine():
    """A string over the byte limit is truncated with z4j_core's own marker."""
    engine = RedactionEngine()
    assert Redactor(engine).scrub("é" * 9000) == engine.scrub("é" * 9000)


def test_redactor_matches_secret_across_the_limit():
    """A secret that begins before the limit and ends after it redacts the whole value."""
    text = "x " * (MAX_CHARS // 2 - 4) + "alice@example.com" + " y" * 10_000
    assert Redactor(RedactionEngine()).scrub(snapshot(text)) == "[REDACTED]"


def test_redactor_marks_truncated_string():
    """A truncated string says how much is missing, and has no more characters than the limit."""
    text = "word " * 10_000
    scrubbed = Redactor(RedactionEngine(RedactionConfig(max_value_bytes=1 << 20))).scrub(
        snapshot(text)
    )
    assert scrubbed == text[:MAX_CHARS] + f"[... {len(text) - MAX_CHARS} more characters cut]"


def test_redactor_caches_are_bounded():
    """Ten thousand different values do not stay in the caches."""
    redactor = Redactor(RedactionEngine())
    for number in range(10_000):
        redactor.scrub({f"k{number}": f"v{number}"})
    assert len(redactor._values) <= 4096
    assert len(redactor._keys) <= 4096
