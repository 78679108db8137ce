"""Rules on module names: order, whole-name matching, shared weights, what is refused, and the printed table."""

import re

import pytest
import torch
from torch import nn

from vlmeff.diffusion.rules import Rule, as_rules, bytes_of, choose_layers, common_name, layer_report
from vlmeff.diffusion.schemes import SCHEMES, get_scheme
from vlmeff.errors import AlreadyQuantizedError, IncompatibleError, QuantConfigError, UnknownNameError, VlmeffError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 10)
        self.proj_out = nn.Linear(10, 6, bias=False)


def network(blocks: int = 2) -> nn.Module:
    net = nn.Module()
    net.blocks = nn.ModuleList([Block() for _ in range(blocks)])
    net.proj_out = nn.Linear(6, 4)
    net.conv = nn.Conv3d(2, 3, 1)
    return net


def schemes_of(model, *rules):
    return {choice.name: choice.scheme for choice in choose_layers(model, "w8a8_int8", rules)}


def test_first_match_wins_and_what_no_rule_names_stays():
    chosen = schemes_of(
        network(),
        (r"blocks\.1\.to_q", "keep"),
        (r"blocks\.0\.to_q", "w4a16"),
        (r"blocks\.\d+\.to_q", "default"),
    )
    assert chosen == {
        "blocks.0.to_q": "w4a16",
        "blocks.0.proj_out": None,
        "blocks.1.to_q": None,
        "blocks.1.proj_out": None,
        "proj_out": None,
    }


def test_a_pattern_must_match_the_whole_name():
    chosen = schemes_of(network(), (r"proj_out", "default"))
    assert [name for name, scheme in chosen.items() if scheme] == ["proj_out"]
    with pytest.raises(QuantConfigError, match=r"'to_q' match none of the 5 linear layers.*'blocks.0.to_q'"):
        schemes_of(network(), (r"proj_out", "default"), ("to_q", "default"))


def test_a_rule_that_an_earlier_one_shadows_is_no_error_and_an_optional_one_may_match_nothing():
    chosen = schemes_of(
        network(), (r"blocks.*", "default"), (r"blocks\.0\.to_q", "keep"), Rule("nothing", "keep", optional=True)
    )
    assert chosen["blocks.0.to_q"] == "w8a8_int8"


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        ([(".*", "keep")], QuantConfigError, "none of the 5 linear layers would be quantized"),
        ([], QuantConfigError, "would be quantized"),
        ([("(", "default")], QuantConfigError, "not a regular expression"),
        ([(3, "default")], QuantConfigError, "not a regular expression"),
        ([("x", "")], QuantConfigError, "the scheme of 'x' is ''"),
        ([("x", None)], QuantConfigError, "the scheme of 'x' is None"),
        ([("x",)], QuantConfigError, "is not a rule"),
        (["x"], QuantConfigError, "is not a rule"),
        ([(".*", "w8a8_int7")], UnknownNameError, "Did you mean"),
    ],
)
def test_rules_that_cannot_work_say_why(rules, error, text):
    with pytest.raises(error, match=text):
        choose_layers(network(), "w8a8_int8", rules)


def test_an_unknown_scheme_is_refused_before_anything_is_chosen():
    with pytest.raises(UnknownNameError, match="w9a9"):
        choose_layers(network(), "w9a9", [(".*", "default")])


def test_layers_that_share_a_weight_follow_the_first_and_count_once():
    net = network()
    net.blocks[1].to_q.weight = net.blocks[0].to_q.weight
    net.alias = net.blocks[0].proj_out  # one module under two names
    choices = choose_layers(net, "w8a8_int8", [(r"blocks\.0\..*", "default"), (r"blocks\.1\.to_q|alias", "keep")])
    found = {choice.name: choice for choice in choices}
    assert found["blocks.1.to_q"].shared_with == "blocks.0.to_q"
    assert found["alias"].shared_with == "blocks.0.proj_out"
    assert found["blocks.1.to_q"].scheme == found["alias"].scheme == "w8a8_int8"
    assert found["blocks.0.to_q"].shared_with is None
    assert found["alias"].bytes_before == bytes_of(found["alias"], get_scheme("w8a8_int8")) == 0


def test_weights_tied_to_another_kind_of_module_and_subclasses_stay():
    net = network()
    net.words = nn.Embedding(4, 6)
    net.proj_out.weight = net.words.weight
    net.attention = nn.MultiheadAttention(6, 1)
    found = {choice.name: choice for choice in choose_layers(net, "w8a8_int8", [(".*", "default")])}
    assert found["proj_out"].scheme is None
    assert found["proj_out"].reason == "shares its weight with Embedding words"
    assert found["attention.out_proj"].scheme is None
    assert "NonDynamicallyQuantizableLinear" in found["attention.out_proj"].reason
    assert found["blocks.0.to_q"].scheme == "w8a8_int8"


def test_quantized_layers_and_adapters_are_refused():
    net = network()
    net.blocks[1].to_q = nn.Module()
    net.blocks[1].to_q.register_parameter("qweight", nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), False))
    with pytest.raises(AlreadyQuantizedError, match=r"blocks\.1\.to_q"):
        choose_layers(net, "w8a8_int8", [(".*", "default")])
    net = network()
    net.blocks[0].to_q.base_layer = nn.Linear(2, 2)
    with pytest.raises(IncompatibleError, match=r"blocks\.0\.to_q.*unload_lora_weights"):
        choose_layers(net, "w8a8_int8", [(".*", "default")])
    assert issubclass(AlreadyQuantizedError, VlmeffError)


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize(("n", "k"), [(64, 256), (10, 7), (3, 130)])
def test_bytes_are_those_of_a_layer_that_is_really_quantized(name, n, k):
    from vlmeff.diffusion.layers import QuantLinear

    net = nn.ModuleDict({"a": nn.Linear(k, n, dtype=torch.bfloat16)})
    (choice,) = choose_layers(net, name, [("a", "default")])
    layer = QuantLinear(k, n, get_scheme(name), dtype=torch.bfloat16)
    assert bytes_of(choice, get_scheme(name)) == sum(p.numel() * p.element_size() for p in layer.parameters())
    assert choice.bytes_before == (n * k + n) * 2


def test_the_table_groups_counts_and_adds_up():
    net = network(3).to(torch.bfloat16)
    rules = as_rules([(r"blocks\.\d+\.(to_q|proj_out)", "default", "tokens"), (r"proj_out", "keep", "output")])
    report = layer_report(choose_layers(net, "w8a16_int8", rules), net)
    tokens, output = report.groups
    assert (tokens.label, tokens.count, tokens.params) == ("blocks.*.{to_q,proj_out}", 6, 3 * (70 + 60))
    assert (output.label, output.scheme, output.bytes_after) == ("proj_out", None, 28 * 2)
    # codes, one float32 scale a row, a bfloat16 bias on to_q
    assert tokens.bytes_after == 3 * (60 + 40 + 20 + 60 + 24)
    assert report.other_params == 2 * 3 + 3
    assert report.bytes_before + report.other_bytes == sum(p.numel() * 2 for p in net.parameters())
    assert report.share == pytest.approx(390 / 418)
    text = str(report)
    assert re.search(r"blocks\.\*\.\{to_q,proj_out\} +6 .*w8a16_int8.*tokens", text)
    assert re.search(r"proj_out +1 .*keep.*output", text)
    assert "93.3% of the linear layers' parameters" in text
    assert report.to_dict()["groups"][0]["count"] == 6


def test_long_lists_of_names_are_shortened():
    assert common_name(["a.0.q"]) == "a.*.q"
    assert common_name(["a.0.net.0.proj", "a.1.net.0.proj", "a.1.net.2"]) == "a.*.net.{0.proj,2}"
    assert common_name([f"a.first.{'x' * 30}{i}" for i in range(4)]) == "a.first.*"
    assert common_name([f"e.{p}.{'x' * 20}.{i}" for p in ("t", "u") for i in "qk"]) == "e.{t,u}"
