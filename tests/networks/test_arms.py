import pytest
from hypothesis import given
from hypothesis import strategies as st

from normlab.errors import InputError
from normlab.networks import parse_arm

norms = st.one_of(
    st.sampled_from(["batch", "torch-batch", "layer", "instance", "rms"]),
    st.integers(1, 64).map("group:{}".format),
)
placed = st.tuples(norms, st.sampled_from(["", "@pre", "@post", "@input"])).map("".join)
dropouts = st.sampled_from(["dropout:0.5", "dropout:0.05", "dropout:1e-3"])
arms = st.one_of(
    st.just("plain"),
    placed,
    dropouts,
    st.permutations(["N", "D"]).flatmap(
        lambda order: st.tuples(placed, dropouts).map(
            lambda parts: "+".join(parts if order[0] == "N" else parts[::-1])
        )
    ),
)


@given(arms)
def test_an_arm_prints_back_the_same(text):
    assert str(parse_arm(text)) == text


def test_an_arm_is_read_into_its_parts():
    arm = parse_arm("dropout:0.25+group:4@post")
    assert (arm.norm, arm.position, arm.dropout) == ("group:4", "post", 0.25)
    assert parse_arm("plain").network == (None, "pre", 0.0, None)
    assert parse_arm("bfloat16+batch").network == ("batch", "pre", 0.0, "bfloat16")


def test_two_spellings_of_one_network_are_the_same_network():
    assert parse_arm("batch").network == parse_arm("batch@pre").network
    assert parse_arm("batch+dropout:0.5").network == parse_arm("dropout:.5+batch").network
    assert parse_arm("batch").network != parse_arm("torch-batch").network
    assert parse_arm("batch").network != parse_arm("batch+bfloat16").network


@pytest.mark.parametrize("text", ["batch", "torch-batch@post", "batch+dropout:0.5"])
def test_batch_norm_needs_batches(text):
    assert parse_arm(text).needs_batches


@pytest.mark.parametrize("text", ["plain", "layer", "dropout:0.5", "group:2"])
def test_other_arms_do_not(text):
    assert not parse_arm(text).needs_batches


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bacth", r"unknown arm 'bacth' \(did you mean batch\?\): known are plain, batch, "),
        ("", "unknown arm ''"),
        ("batch+", r"unknown arm 'batch\+'"),
        ("batch:3", "unknown norm 'batch:3'"),
        ("group", "wants its number of groups"),
        ("group:0", "wants its number of groups"),
        ("group:x", "wants its number of groups"),
        ("batch@middle", "unknown position 'middle', known are pre, post, input"),
        ("batch@", "unknown position ''"),
        ("batch+layer", "two norms"),
        ("dropout:0.5+dropout:0.2", "two dropouts"),
        ("batch+bfloat16+bfloat16", "says bfloat16 twice"),
        ("dropout", "between 0 and 1"),
        ("dropout:0", "between 0 and 1"),
        ("dropout:1", "between 0 and 1"),
        ("dropout:nan", "between 0 and 1"),
        ("dropout:half", "between 0 and 1"),
        ("plain+dropout:0.5", "plain stands alone"),
    ],
)
def test_what_is_not_an_arm_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_arm(text)
