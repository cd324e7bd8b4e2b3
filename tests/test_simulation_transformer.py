import pytest
import torch
from torch.nn.utils import parameters_to_vector

from quorsum.simulation.transformer import LORA_RANK, LoraLinear, Transformer


def model(seed: int = 0, *, lora: bool = False) -> Transformer:
    return Transformer(11, 16, torch.Generator().manual_seed(seed), lora=lora)


def counts(network: torch.nn.Module) -> tuple[int, int]:
    return (
        sum(p.numel() for p in network.parameters() if p.requires_grad),
        sum(p.numel() for p in network.parameters() if not p.requires_grad),
    )


def test_sizes() -> None:
    blocks = 2 * 4 * 64 + 2 * (64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64)
    outside = 11 * 64 + 16 * 64 + 2 * 64 + 64 * 11 + 11
    assert counts(model()) == (blocks + outside, 0)
    adapters = 2 * LORA_RANK * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))
    assert counts(model(lora=True)) == (adapters + outside + 2 * 4 * 64, blocks - 2 * 4 * 64)
    assert not list(model().buffers())


def test_sizes_that_the_documents_name() -> None:
    for lora, learnt in ((False, 112_577), (True, 29_505)):
        network = Transformer(65, 64, torch.Generator().manual_seed(0), lora=lora)
        assert counts(network)[0] == learnt


@pytest.mark.parametrize("lora", [False, True])
def test_nothing_later_is_seen(lora: bool) -> None:
    network = model(lora=lora)
    tokens = torch.arange(16)[None] % 11
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 11
    with torch.no_grad():
        one, other = network(tokens), network(changed)
    assert one.shape == (1, 16, 11)
    assert torch.allclose(one[:, :9], other[:, :9], atol=1e-6)
    assert (one[:, 9:] - other[:, 9:]).abs().amax(dim=-1).min() > 1e-4


def test_shorter_inputs_will_do() -> None:
    network = model()
    tokens = torch.arange(32).reshape(2, 16) % 11
    with torch.no_grad():
        assert torch.allclose(network(tokens[:, :5]), network(tokens)[:, :5], atol=1e-5)


def test_first_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (parameters_to_vector(model(seed, lora=True).parameters()) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.isfinite(one).all()
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_begin_as_their_base() -> None:
    tokens = torch.arange(16)[None] % 11
    with torch.no_grad():
        assert torch.allclose(model(lora=True)(tokens), model()(tokens), atol=1e-6)


def test_adapter_by_hand() -> None:
    base = torch.nn.Linear(3, 2)
    layer = LoraLinear(base, torch.Generator().manual_seed(0), rank=4)
    with torch.no_grad():
        layer.up.copy_(torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
        # W x + b + 16 / r B A x
        expected = x @ (base.weight + 16 / 4 * layer.up @ layer.down).T + base.bias
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"up", "down"}
