"What reads a model's state says what to do on a model that has none."
import pytest
import torch

from sentinel_ai import random_model
from sentinel_ai.memory import channels_by_layer, local_channels
from sentinel_ai.pruning import heads_for_ms
from sentinel_ai.repair import move_param, out_weight, repair_share, shift_repair
from sentinel_ai.bridges import in_order, take_bridges
from sentinel_ai.surgery import local_head, original_heads
from sentinel_ai.shaping import kinds_of
from sentinel_ai.stash import full_param, put_full
from sentinel_ai.train import close_random, open_heads, sentinel_parameters
from sentinel_ai.viz import open_channels, open_gates

NAME, ONE = 'lm_head.weight', torch.ones(1, 1)
SHARE = dict(A=ONE, B=ONE, a0=torch.ones(1))
READS = dict(
    channels_by_layer=lambda m: channels_by_layer(m, [(0, 1)]),
    close_random=lambda m: close_random(m, .5),
    full_param=lambda m: full_param(m, NAME),
    heads_for_ms=lambda m: heads_for_ms(m, 1., None, None),
    in_order=in_order,
    kinds_of=kinds_of,
    local_channels=lambda m: local_channels(m, 0, torch.tensor([0])),
    local_head=lambda m: local_head(m, 0, 0),
    move_param=lambda m: move_param(m, NAME, ONE),
    open_channels=open_channels,
    open_gates=open_gates,
    open_heads=open_heads,
    original_heads=lambda m: original_heads(m, 0),
    out_weight=lambda m: out_weight(m, 0),
    put_full=lambda m: put_full(m, NAME, ONE),
    repair_share=lambda m: repair_share(m, 0, 0),
    sentinel_parameters=sentinel_parameters,
    shift_repair=lambda m: shift_repair(m, 0, SHARE, 1.),
    take_bridges=lambda m: take_bridges(m, 'heads', {0: 1.}))


@pytest.fixture(scope='module')
def plain(): return random_model('llama')


@pytest.mark.parametrize('name', READS)
def test_a_plain_model_is_told_to_adapt(name, plain):
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    with pytest.raises(TypeError, match=r'adapt\(model\) first'): READS[name](plain)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
