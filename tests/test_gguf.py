"Files of llama.cpp are read back: uneven layers, biases, ties, scaled positions, damaged and foreign files."
import importlib.util, json
import pytest, torch
from types import SimpleNamespace as Namespace

if not importlib.util.find_spec('gguf'): pytest.skip('needs gguf', allow_module_level=True)

import gguf
from transformers import AutoTokenizer, GenerationConfig
from sentinel_ai.export import export_gguf
from sentinel_ai.gates import adapt, set_gates
from sentinel_ai.heads import UnsupportedArchitecture
from sentinel_ai.loaders import load_adaptive_model, load_baseline_model, load_tokenizer, resolve
from sentinel_ai.pruning import prune
from sentinel_ai.surgery import HeadPlan, compact
from sentinel_ai.testing import random_model

IDS = torch.arange(3, 27)[None]


def logits(m):
    with torch.no_grad(): return m(IDS).logits.float()


def with_biases(m):
    "Biases on output and down projections, as repairs add them."
    for layer in m.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            rng = torch.Generator().manual_seed(1)
            linear.bias = torch.nn.Parameter(torch.randn(linear.weight.shape[0], generator=rng)*.1)
    return m


def closed(m, heads, channels=()):
    set_gates(m, {unit: 0. for unit in heads})
    return set_gates(m, {unit: 0. for unit in channels}, kind='channels')


def whole(m): return m
def uneven(m): return closed(m, [(0, 1), (1, 2), (1, 3)], [(0, c) for c in range(7)])
def no_first(m): return closed(m, [(0, h) for h in range(4)], [(1, 5)])
def no_last(m): return closed(m, [(1, h) for h in range(4)] + [(0, 3)])
def no_channels(m): return closed(m, [(1, 0)], [(1, c) for c in range(48)])
def half(m): return set_gates(uneven(m), {(0, 0): .5})


YARN = dict(rope_type='yarn', factor=4., original_max_position_embeddings=32, rope_theta=1e4)
MODELS = {
    'llama': lambda: random_model('llama'),
    'biases': lambda: with_biases(random_model('llama')),
    'tied': lambda: random_model('llama', tie_word_embeddings=True),
    'yarn': lambda: random_model('llama', rope_parameters=YARN),
    'own biases': lambda: random_model('llama', attention_bias=True, mlp_bias=True),
    'qwen2': lambda: random_model('qwen2'),
}


@pytest.mark.parametrize('shape', [whole, uneven, no_first, no_last, no_channels, half])
@pytest.mark.parametrize('name', MODELS)
def test_a_file_becomes_the_model_again(name, shape, tmp_path):
    m = shape(adapt(MODELS[name]()))
    export_gguf(m, tmp_path/'m.gguf', False, 'f32')
    back = load_adaptive_model(tmp_path/'m.gguf')
    torch.testing.assert_close(logits(back), logits(m), rtol=1e-4, atol=1e-5)
    want, got = HeadPlan.from_gates(m), back.sentinel.plan
    assert (got.heads(), got.channels.counts) == (want.heads(), want.channels.counts)
    export_gguf(back, tmp_path/'again.gguf', False, 'f32')
    torch.testing.assert_close(logits(load_baseline_model(tmp_path/'again.gguf')), logits(m), rtol=1e-4, atol=1e-5)


def test_what_is_read_is_pruned_saved_and_written_again(tmp_path):
    m = load_adaptive_model('tiny-llama')
    text = torch.arange(1024).view(8, 128)
    prune(m, params=.9, batches=text, rounds=1, progress=False)
    export_gguf(m, tmp_path/'m.gguf', dtype='f32')
    back = load_adaptive_model(tmp_path/'m.gguf')
    prune(back, params=.95, batches=text, rounds=1, progress=False)
    compact(back)
    back.save_pretrained(tmp_path/'folder')
    assert torch.equal(logits(load_adaptive_model(tmp_path/'folder')), logits(back))
    export_gguf(back, tmp_path/'again.gguf', load_tokenizer(tmp_path/'m.gguf'), 'f32')


def test_types(tmp_path):
    m = uneven(adapt(random_model('llama', dtype=torch.bfloat16)))
    export_gguf(m, tmp_path/'m.gguf', False)
    assert load_baseline_model(tmp_path/'m.gguf').dtype == torch.float32
    back = load_baseline_model(tmp_path/'m.gguf', dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(logits(back), logits(m), rtol=.05, atol=.05)


def test_a_quantised_tensor_is_widened():
    from sentinel_ai import deci
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for kind, most in (('Q8_0', .03), ('Q4_0', .5)):
        kind = gguf.GGMLQuantizationType[kind]
        stored = Namespace(data=gguf.quants.quantize(w.numpy(), kind), tensor_type=kind)
        assert (deci.numbers(stored) - w).abs().max() < most


def test_stop_tokens_are_the_model_s(tmp_path):
    m = load_adaptive_model('tiny-llama')
    m.generation_config = GenerationConfig(eos_token_id=[5, 7])
    export_gguf(m, tmp_path/'m.gguf')
    fields = gguf.GGUFReader(tmp_path/'m.gguf').fields
    found = [fields[f'tokenizer.ggml.{name}_token_id'].contents() for name in ('eos', 'eot')]
    assert found == [5, 7]
    assert load_baseline_model(tmp_path/'m.gguf').generation_config.eos_token_id == [5, 7]
    m.generation_config = GenerationConfig(eos_token_id=[1, 2, 3, 4])
    with pytest.raises(ValueError, match='room for 3'): export_gguf(m, tmp_path/'m.gguf')
    assert load_baseline_model(tmp_path/'m.gguf').generation_config.eos_token_id == [5, 7]


def test_the_tokenizer_comes_from_the_file(tmp_path):
    export_gguf(load_adaptive_model('tiny-llama'), tmp_path/'m.gguf')
    own, read = AutoTokenizer.from_pretrained(resolve('tiny-llama')[0]), load_tokenizer(tmp_path/'m.gguf')
    for text in ('', 'The object is a', ' x = 12345\n\tpass', '東京 🙂'):
        assert read(text).input_ids == own(text).input_ids
        assert read.decode(read(text).input_ids) == own.decode(own(text).input_ids)
    export_gguf(load_adaptive_model('tiny-llama'), tmp_path/'m.gguf', False)
    with pytest.raises(ValueError, match='no tokenizer'): load_tokenizer(tmp_path/'m.gguf')


def rewritten(path, out, change):
    "A copy of a file, of whose facts and tensors `change` makes others."
    reader = gguf.GGUFReader(path)
    facts = {k: f.contents() for k, f in reader.fields.items() if not k.startswith(('GGUF.', 'general.arch'))}
    tensors = {t.name: t.data.copy() for t in reader.tensors}
    change(facts, tensors)
    w = gguf.GGUFWriter(out, 'deci')
    add = {int: w.add_uint32, float: w.add_float32, list: w.add_array, str: w.add_string}
    for key, value in facts.items(): add[type(value)](key, value)
    for name, t in tensors.items(): w.add_tensor(name, t)
    for step in ('header', 'kv_data', 'tensors'): getattr(w, f'write_{step}_to_file')()
    w.close()


def told(change):
    def changed(facts, tensors):
        model = json.loads(facts['sentinel.model'])
        change(model)
        facts['sentinel.model'] = json.dumps(model)
    return changed


CHANGES = {
    'another program': (lambda f, t: f.pop('sentinel.model'), 'another program'),
    'no JSON': (lambda f, t: f.update({'sentinel.model': '{'}), ''),
    'no base': (told(lambda m: m.pop('base')), 'base'),
    'a list': (lambda f, t: f.update({'sentinel.model': '[]'}), ''),
    'huge': (told(lambda m: m['base'].update(hidden_size=10**9)), 'do not belong together'),
    'many layers': (told(lambda m: m['base'].update(num_hidden_layers=10**6)), 'do not belong together'),
    'foreign code': (told(lambda m: m['base'].update(attn_implementation='x/y')), 'code from elsewhere'),
    'no norm': (lambda f, t: t.pop('output_norm.weight'), ''),
    'no values': (lambda f, t: t.pop('blk.0.attn_v.weight'), ''),
    'short': (lambda f, t: t.update({'blk.0.ffn_up.weight': t['blk.0.ffn_up.weight'][:-1]}), ''),
    'other plan': (told(lambda m: m.update(plan=None)), ''),
}


@pytest.mark.parametrize('name', CHANGES)
def test_files_from_strangers(name, tmp_path):
    change, message = CHANGES[name]
    export_gguf(uneven(adapt(random_model('llama'))), tmp_path/'m.gguf', False, 'f32')
    rewritten(tmp_path/'m.gguf', tmp_path/'x.gguf', lambda f, t: None)
    load_baseline_model(tmp_path/'x.gguf')
    rewritten(tmp_path/'m.gguf', tmp_path/'x.gguf', change)
    with pytest.raises((ValueError, UnsupportedArchitecture), match=message or None) as e:
        load_baseline_model(tmp_path/'x.gguf')
    assert 'x.gguf' in str(e.value)


def test_options_that_are_not_for_such_a_file(tmp_path):
    export_gguf(random_model('llama'), tmp_path/'m.gguf', False)
    with pytest.raises(ValueError, match='device= and dtype='): load_baseline_model(tmp_path/'m.gguf', device_map='auto')


def test_files_are_compared_in_float32(tmp_path):
    "A scaled model in half precision isn't mistaken for a plain one, and a sound one isn't refused."
    m = random_model('llama', dtype=torch.bfloat16)
    assert export_gguf(m, tmp_path/'m.gguf', False, 'f32').error < 1e-3
    m.model.rotary_emb.inv_freq.mul_(.9)
    export_gguf(m, tmp_path/'m.gguf', False, 'f32')                    # frequencies travel along
    m.model.norm.variance_epsilon = .3
    with pytest.raises(UnsupportedArchitecture, match='other logits'): export_gguf(m, tmp_path/'m.gguf', False)


def test_eight_bits(tmp_path):
    "Matrices whose rows are no multiple of 32 stay in float16; what is read is what was written."
    m = closed(adapt(random_model('llama', hidden_size=64, intermediate_size=96)), [(0, 1)], [(0, c) for c in range(40)])
    done = export_gguf(m, tmp_path/'m.gguf', False, 'q8_0')
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path/'m.gguf').tensors}
    assert kinds['blk.1.ffn_down.weight'] == 'Q8_0' and kinds['blk.0.ffn_down.weight'] == 'F16'
    assert kinds['output_norm.weight'] == 'F32' and done.dtype == 'q8_0' and 0 < done.error < .05
    want = logits(m)
    assert (logits(load_baseline_model(tmp_path/'m.gguf')) - want).norm()/want.norm() < .05
