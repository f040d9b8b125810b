"""Compact models whose layers differ, as graphs: torch.export gives their logits bit for bit, and ONNX where it is installed to rounding."""
import importlib.util

import pytest
import torch
from sentinel_ai import adapt, compact, random_model, set_gates

torch.set_num_threads(1)
FAMILIES = ['llama', 'gpt2', 'gpt_neox', 'bloom']
LENGTH = torch.export.Dim('length', min=2, max=64)
IDS = torch.arange(5, 17)[None]
needs_onnx = pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ('onnx', 'onnxscript', 'onnxruntime')),
                                reason='onnx, onnxscript or onnxruntime is not installed')


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids): return self.model(input_ids=ids, use_cache=False).logits


def uneven(family):
    "Three heads of layer 0 and one of layer 1 are pruned, six channels and twelve; removed for real."
    m = adapt(random_model(family)).eval()
    set_gates(m, {(0, 0): 0., (0, 1): 0., (0, 2): 0., (1, 3): 0.})
    set_gates(m, {(s.layer, c): 0. for s in m.sentinel.now.channels for c in range(6*(s.layer + 1))}, kind='channels')
    compact(m)
    sizes = [(s.n_heads, c.n) for s, c in zip(m.sentinel.now.heads, m.sentinel.now.channels)]
    assert sizes[0] != sizes[1]
    return m


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_the_graph_is_the_model(family):
    "At a length that it wasn't made with; no gate is at work in it."
    m = uneven(family)
    graph = torch.export.export(Logits(m), (IDS,), dynamic_shapes=dict(ids={1: LENGTH}))
    other = torch.arange(30, 51)[None]
    assert torch.equal(graph.module()(other), m(other).logits)
    gates = [given.arg.name for given in graph.graph_signature.input_specs if (given.target or '').endswith('.gate')]
    assert not [node for node in graph.graph.nodes if node.name in gates and node.users], 'gates of 1 are not multiplied'


@torch.no_grad()
def test_gates_are_tensors_of_the_graph():
    "Of a masked model, exported before it is compact."
    m = set_gates(adapt(random_model('llama')), {(0, 1): 0., (1, 2): .5})
    graph = torch.export.export(Logits(m), (IDS,))
    assert torch.equal(graph.module()(IDS), m(IDS).logits)
    gates = [t for name, t in graph.state_dict.items() if name.endswith('self_attn.sentinel.gate')]
    assert [t.tolist() for t in gates] == [[1., 0., 1., 1.], [1., 1., .5, 1.]]


@needs_onnx
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gpt_neox'])
@torch.no_grad()
def test_onnx(family, tmp_path):
    import onnxruntime
    m, other = uneven(family), torch.arange(30, 51)[None]
    torch.onnx.export(Logits(m), (IDS,), dynamo=True, verbose=False, dynamic_shapes=dict(ids={1: LENGTH})).save(str(tmp_path/'m.onnx'))
    session = onnxruntime.InferenceSession(str(tmp_path/'m.onnx'))
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0])
    assert torch.allclose(got, m(other).logits, atol=1e-4)
