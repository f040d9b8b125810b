"""Which model is it? All that transformers lists with a language-model head is a causal decoder, or refused by a sentence."""
import functools

import pytest
import torch
from sentinel_ai import UnsupportedArchitecture, adapt, compact, head_map, measure, prune, random_model, set_gates, unprune
from sentinel_ai.decoder import reads_ahead
from sentinel_ai.testing import random_config
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune
from test_matrix import LISTED, MORE, SEED
from transformers import (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM,
                          Gemma4ForCausalLM, Gemma4TextConfig, T5EncoderModel)

torch.set_num_threads(1)
LARGEST = 1_000_000
COVERED = {*SEED, *LISTED, *MORE} - {'bert', 'roberta', 'bart'}       # by test_matrix::test_causal
IDS = torch.tensor([[5, 17, 33, 8, 21, 40, 11, 29, 62, 14]])
# Tables of these are far larger than their small configs say, or a small config needs more than small numbers
NOT_SMALL = {'apertus1p5', 'blt', 'dots3_note', 'emu3', 'esm', 'fuyu', 'gemma3', 'gemma4', 'gemma4_unified', 'gemma4_unified_assistant', 'got_ocr2',
             'llama4', 'mllama', 'moss_transcribe_diarize', 'phi4_multimodal', 'qwen3_5', 'qwen3_5_moe', 'ultravbert', 'perceiver', 'git', 'modernvbert'}


def listed(mapping): return sorted({config.model_type for config in mapping.keys()} - NOT_SMALL - COVERED - {'sentinel'})


@functools.cache
def tiny(auto, model_type):
    "A tiny model as its config has it by default, or None where small numbers aren't enough."
    kw = dict(is_decoder=False) if auto is AutoModelForMaskedLM else {}
    try: config = random_config(model_type, **kw)
    except Exception: return None
    if auto is not AutoModelForCausalLM and hasattr(config, 'is_decoder'): config.is_decoder = False
    try:
        with torch.device('meta'): n = sum(p.numel() for p in auto.from_config(config).parameters())
        if n > LARGEST: return None
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        with torch.no_grad(): model(IDS)
    except Exception: return None                     # what can't run here has no logits to be wrong about
    return model


@torch.no_grad()
def looks_ahead(model):
    "By other means than the library's: another last token."
    other = IDS.clone()
    other[:, -1] = 70
    a, b = (model(ids).logits[:, :-1] for ids in (IDS, other))
    return bool((a - b).abs().max() > 1e-5*a.abs().max())


@pytest.mark.parametrize('auto,mapping', [(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING), (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING)])
def test_causal_or_refused(auto, mapping):
    taken, refused, odd = [], [], []
    for model_type in listed(mapping):
        model = tiny(auto, model_type)
        if model is None: continue
        try:
            head_map(model)
            taken.append(model_type)
            if looks_ahead(model): odd.append(model_type)
        except UnsupportedArchitecture as e:
            refused.append(model_type)
            assert len(str(e)) > 40
    assert not odd, f'these read both ways, and are taken for decoders: {odd}'
    is_causal = auto is AutoModelForCausalLM
    assert len(taken) > 50 if is_causal else not taken
    assert len(refused) > (3 if is_causal else 25)


@pytest.mark.parametrize('name', ['distilbert', 'modernbert', 'electra', 'albert', 'roberta', 'xlm', 'longformer', 'mpnet', 'deberta-v2', 'camembert'])
def test_encoders_are_refused_by_name(name):
    model = tiny(AutoModelForMaskedLM, name)
    assert model is not None and reads_ahead(model)
    with pytest.raises(UnsupportedArchitecture, match='reads both ways'): adapt(model)


@pytest.mark.parametrize('name', ['t5', 'bart', 'pegasus', 'm2m_100', 'whisper'])
def test_encoder_decoders_are_refused_by_name(name):
    if name == 'whisper':
        from transformers import WhisperForConditionalGeneration as auto
        with torch.device('meta'): model = auto(random_config(name, is_decoder=False))
    else:
        with torch.device('meta'): model = AutoModelForSeq2SeqLM.from_config(random_config(name, is_decoder=False))
    with pytest.raises(UnsupportedArchitecture, match='is an encoder-decoder'): adapt(model)


def test_parts_of_models_are_refused_by_name():
    with torch.device('meta'): model = T5EncoderModel(random_config('t5', is_decoder=False))
    with pytest.raises(UnsupportedArchitecture): adapt(model)
    with pytest.raises(UnsupportedArchitecture, match='no language-model head'): adapt(random_model('llama').model)


def test_a_switch_of_the_config_is_seen():
    "The same class reads token by token or both ways; each is asked."
    assert adapt(random_model('gemma3_text'))
    with pytest.raises(UnsupportedArchitecture, match='reads both ways'): adapt(random_model('gemma3_text', use_bidirectional_attention=True))
    assert adapt(random_model('gemma3_text'))


COMPUTED = dict(
    weight_norm=(lambda layer: parametrizations.weight_norm(layer), 'remove_parametrizations',
                 lambda layer: nn.utils.parametrize.remove_parametrizations(layer, 'weight')),
    mask=(lambda layer: torch_prune.l1_unstructured(layer, 'weight', .5), 'prune.remove', lambda layer: torch_prune.remove(layer, 'weight')),
    spectral_norm=(lambda layer: parametrizations.spectral_norm(layer), 'remove_parametrizations',
                   lambda layer: nn.utils.parametrize.remove_parametrizations(layer, 'weight')))


@pytest.mark.parametrize('path', ['model.layers.0.self_attn.o_proj', 'model.layers.1.mlp.up_proj', 'lm_head'])
@pytest.mark.parametrize('kind', COMPUTED)
def test_computed_weights_say_how_they_become_plain(kind, path):
    make, way_out, undo = COMPUTED[kind]
    model = random_model('llama')
    make(model.get_submodule(path))
    with pytest.raises(UnsupportedArchitecture, match=f'{path}.*{way_out}'): adapt(model)
    undo(model.get_submodule(path))
    with torch.no_grad(): want = model(IDS).logits
    with torch.no_grad(): assert torch.equal(adapt(model)(IDS).logits, want)


@pytest.mark.filterwarnings('ignore')
def test_packed_weights_are_refused_by_name():
    "And a model of that class that isn't quantised is still one."
    model = random_model('llama')
    torch.ao.quantization.quantize_dynamic(model.model.layers[0].mlp, {nn.Linear}, inplace=True)
    with pytest.raises(UnsupportedArchitecture, match='packed by torch.ao.*quantize the result'): prune(model, params=.9, batches=IDS)
    assert head_map(random_model('llama')).n == 8


def test_inference_mode_is_told_before_anything_is_changed():
    model = random_model('llama')
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match='torch.inference_mode forbids'): measure(model, IDS, progress=False)
        made = random_model('llama')
    with pytest.raises(RuntimeError, match='torch.inference_mode forbids'): prune(made, params=.9, batches=IDS, progress=False)
    measure(made, IDS, 'use', progress=False)                    # takes no gradients
    measure(model, IDS, progress=False)


def gemma4(**kw):
    small = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, intermediate_size=48, vocab_size=96,
                 num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96, sliding_window=16,
                 layer_types=['sliding_attention', 'full_attention']*2, pad_token_id=0)
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**(small | kw))).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3) if p.ndim > 1 else p.add_(torch.randn_like(p)*.1)
    return model


SHARING = dict(shared={}, k_eq_v=dict(attention_k_eq_v=True, num_global_key_value_heads=2),
               per_layer=dict(attention_k_eq_v=True, num_kv_shared_layers=0, num_global_key_value_heads=1, global_head_dim=16))


@pytest.mark.filterwarnings('ignore:.*only columns of the output')
@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('closed', ['reader', 'producer', 'both'])
def test_layers_that_share_keys_and_values(sharing, closed, tmp_path):
    "Layers 2 and 3 read what 0 and 1 keep: any of them may lose heads, or all."
    from sentinel_ai import load_adaptive_model
    gone = dict(reader=[(3, h) for h in range(4)], producer=[(1, h) for h in range(4)],
                both=[(0, 0), (0, 1), (1, 2), (1, 3), (2, 0), *((3, h) for h in range(4))])[closed]
    model = gemma4(**SHARING[sharing])
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        whole = model(IDS).logits
        set_gates(adapt(model), {unit: 0. for unit in gone})
        masked, said = model(IDS).logits, model.generate(IDS, **how)
        compact(model)
        torch.testing.assert_close(model(IDS).logits, masked, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(IDS, **how), said)
        model.save_pretrained(tmp_path)
        assert torch.equal(load_adaptive_model(tmp_path)(IDS).logits, model(IDS).logits)
        assert torch.equal(unprune(model)(IDS).logits, whole)


@pytest.mark.filterwarnings('ignore:.*only columns of the output')
def test_a_cache_that_others_read_is_not_saved():
    "Its layers hold all the cache there is, so no head saves any of it; the parameters of their rows stay, too."
    model = gemma4()
    assert [s.cost('kv_bytes') for s in head_map(model)] == [(0., 0.)]*4
    assert [s.cost('params')[1] for s in head_map(model)] == [0.]*4
    with pytest.raises(ValueError, match='a budget of kv_bytes where no head.*params='): prune(model, kv_bytes=.75, batches=IDS, progress=False)
    deeper = gemma4(num_hidden_layers=6, layer_types=['sliding_attention', 'full_attention']*3)
    plan = prune(deeper, kv_bytes=.75, batches=IDS.repeat(6, 1), rounds=1, progress=False)
    bytes_of = lambda m: sum(s.cost('kv_bytes')[1]*s.n_kv_heads for s in head_map(m))
    before = bytes_of(deeper)
    compact(deeper)
    assert bytes_of(deeper) <= .75*before and plan.removed
