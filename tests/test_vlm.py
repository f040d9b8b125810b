"""Vision-language models: what holds for a decoder holds for the text decoder of a model that sees, with the picture in."""
import copy
import functools

import pytest
import torch
from sentinel_ai import (GateConfig, adapt, channel_map, compact, compensate, export_hf, head_map, load_adaptive_model,
                         load_baseline_model, measure, prune, random_model, set_gates, unadapt, unprune, unpruned)
from sentinel_ai.decoder import text_decoder
from sentinel_ai.heads import core_linear, in_dim
from sentinel_ai.loaders import auto_class
from sentinel_ai.pixels import FAMILIES, PICTURE, image_batch, random_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

torch.set_num_threads(1)
KINDS = sorted(FAMILIES)
FEWER = ['llava', 'qwen2_5_vl', 'paligemma', 'gemma3', 'idefics3', 'mllama', 'blip-2']      # one of each way to be put together
HEAVY = ['llava', 'qwen2_vl', 'gemma3', 'idefics3', 'blip-2']                               # prune takes its time
QUIET = dict(rounds=1, progress=False)


@functools.cache
def built(kind): return random_vlm(kind)


def build(kind): return copy.deepcopy(built(kind))


@torch.no_grad()
def logits(model, batch): return model(**batch).logits


def closed(model):
    "The last head of each layer is closed, and every third channel."
    heads, channels = head_map(model), channel_map(model)
    table = {(s.layer, s.n - 1): 0. for s in heads}
    table |= {('channels', s.layer, c): 0. for s in channels for c in range(0, s.n, 3)}
    return table


def close(model):
    table = closed(model)
    heads = {k: v for k, v in table.items() if len(k) == 2}
    set_gates(adapt(model), heads)
    for site in model.sentinel.now.channels:
        with torch.no_grad(): site.module.sentinel.gate[::3] = 0.
    return model


@pytest.mark.parametrize('kind', KINDS)
def test_only_the_text_decoder_is_mapped(kind):
    model = build(kind)
    inside = text_decoder(model) + '.'
    for found in (head_map(model), channel_map(model)):
        assert all(s.path.startswith(inside) for s in found)
        assert len(found) == 2
    left = ' '.join(head_map(model).unmapped)
    assert any(word in left for word in ('vision', 'visual'))


@pytest.mark.parametrize('kind', KINDS)
def test_open_gates_change_nothing(kind):
    model, batch = build(kind), image_batch(kind)
    want = logits(model, batch)
    assert torch.equal(logits(adapt(model), batch), want)
    unadapt(model)
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize('kind', KINDS)
def test_closed_gates_equal_zeroed_columns_and_what_is_cut_out(kind, tmp_path):
    model, batch = build(kind), image_batch(kind)
    zeroed, whole = copy.deepcopy(model), logits(model, batch)
    for found in (head_map(zeroed), channel_map(zeroed)):
        for s in found:
            weight, dim = core_linear(s.out).weight, in_dim(core_linear(s.out))
            gone = range(s.cols(s.n - 1).start, s.cols(s.n - 1).stop) if found.kind == 'heads' else range(0, s.n, 3)
            with torch.no_grad(): weight.index_fill_(dim, torch.tensor([*gone]), 0.)
    close(model)
    want = logits(model, batch)
    assert torch.equal(want, logits(zeroed, batch)) and not torch.allclose(want, whole)
    compact(model)
    assert model.sentinel.compact
    torch.testing.assert_close(logits(model, batch), want, rtol=1e-4, atol=1e-4)
    now = logits(model, batch)
    model.save_pretrained(tmp_path)
    for back in (AutoModelForImageTextToText.from_pretrained(tmp_path), load_adaptive_model(tmp_path)):
        assert type(back) is type(model) and torch.equal(logits(back, batch), now)
    unprune(model)
    assert torch.equal(logits(model, batch), whole)
    unprune(back)
    assert torch.equal(logits(back, batch), whole)


@pytest.mark.parametrize('kind', FEWER)
def test_plain_folders_are_read(kind, tmp_path):
    model, batch = build(kind), image_batch(kind)
    model.save_pretrained(tmp_path)
    assert type(load_baseline_model(tmp_path)) is type(model)
    back = load_adaptive_model(tmp_path)
    assert torch.equal(logits(back, batch), logits(model, batch))
    back.save_pretrained(tmp_path)                                # nothing was done: as plain as before
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize('kind', FEWER)
def test_generate_with_a_picture(kind):
    model, batch = build(kind), image_batch(kind)
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    want = model.generate(**batch, **how)
    assert torch.equal(adapt(model).generate(**batch, **how), want)
    close(model)
    masked = model.generate(**batch, **how)
    compact(model)
    assert torch.equal(model.generate(**batch, **how), masked)


@pytest.mark.parametrize('kind', HEAVY)
def test_pruning_sees_the_picture(kind):
    "Another picture with the same text leads to another plan; and what was done is undone bit for bit."
    model, batch = build(kind), image_batch(kind, rows=4, length=16)
    other = batch | dict(pixel_values=-2*batch['pixel_values'])
    whole = logits(model, batch)
    stats = [measure(model, b, ('gradient', 'use'), progress=False).tables['fisher'] for b in (batch, other)]
    assert not torch.allclose(*stats, equal_nan=True)
    plans = []
    for b in (batch, other):
        m = copy.deepcopy(model)
        plans.append(prune(m, params=.95 if kind == 'blip-2' else .9, batches=b, **QUIET))
        pruned = logits(m, batch)
        assert not torch.allclose(pruned, whole)
        assert torch.equal(logits(unpruned(m), batch), whole)
        compact(m)
        torch.testing.assert_close(logits(m, batch), pruned, rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(unprune(m), batch), whole)
    first, second = (p.channels.keep for p in plans)
    assert not torch.equal(first, second)


def test_text_alone_gives_another_plan():
    model, batch = build('llava'), image_batch('llava', rows=4, length=16)
    words = batch['input_ids'].masked_fill(batch['input_ids'] == PICTURE, 5)
    plans = []
    for b in (batch, words):
        m = copy.deepcopy(model)
        plans.append(prune(m, params=.9, batches=b, **QUIET))
    assert not torch.equal(*(p.channels.keep for p in plans))


@pytest.mark.parametrize('kind', FEWER)
def test_the_loss_is_that_of_the_model(kind):
    "Placeholders are no labels unless the batch says so."
    model, batch = build(kind), image_batch(kind)
    hidden = batch['input_ids'] == PICTURE
    if kind == 'paligemma': hidden = hidden | (batch['token_type_ids'] == 0)       # what it reads both ways
    given = batch | dict(labels=batch['input_ids'].masked_fill(hidden, -100))
    said = [measure(model, b, 'gradient', progress=False).info['loss'] for b in (batch, given)]
    assert said[0] == said[1]


def test_entropy_and_attribution_with_a_picture():
    stats = measure(build('llava'), image_batch('llava'), ('entropy', 'attribution'), steps=2, progress=False)
    assert stats.tables['entropy'].isfinite().all() and stats.tables['attribution'].isfinite().all()


def test_errors_before_are_made_up_for():
    model, batch = build('llava'), image_batch('llava', rows=8, length=24)
    whole = logits(model, batch)
    prune(model, params=.9, batches=[batch]*4, **QUIET)
    left = compensate(model, [batch]*4)
    assert left and torch.equal(logits(unprune(model), batch), whole)


@pytest.mark.parametrize('kind', ['llava', 'qwen2_vl', 'paligemma', 'internvl'])
def test_padding_on_the_left_counts_for_nothing(kind):
    "Rows of different length: the loss is the mean of what each row gives alone."
    model, batch = build(kind), image_batch(kind, rows=1)
    wide = {k: v.clone() for k, v in batch.items()}
    for name, filling in dict(input_ids=0, attention_mask=0, mm_token_type_ids=0, token_type_ids=0).items():
        if name in wide: wide[name] = torch.nn.functional.pad(wide[name], (3, 0), value=filling)
    loss = [measure(model, b, 'gradient', progress=False).info['loss'] for b in (batch, wide)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-4)


def test_what_a_model_does_not_take_is_refused_by_name():
    batch = image_batch('llava')
    blind = random_model('llama')
    with pytest.raises(ValueError, match='batch 0 has pixel_values'): measure(blind, batch, progress=False)
    with pytest.raises(ValueError, match='batch 0 has pixel_values'): prune(blind, params=.9, batches=batch)
    with pytest.raises(ValueError, match='batch 0 has image_grid_thw'):
        measure(build('llava'), batch | dict(image_grid_thw=torch.ones(2, 3)), progress=False)


def test_learned_gates_get_gradients_with_a_picture():
    model, batch = adapt(build('qwen2_5_vl'), GateConfig('learned')).train(), image_batch('qwen2_5_vl')
    model(**batch, labels=batch['input_ids']).loss.backward()
    for s in model.sentinel.now.heads: assert (s.module.sentinel.gate.grad != 0).all()


@pytest.mark.parametrize('kind', ['llava', 'internvl', 'idefics3'])
def test_export_writes_a_plain_checkpoint(kind, tmp_path):
    "The same heads and channels in every layer: a folder that needs no sentinel_ai, eye included."
    model, batch = build(kind), image_batch(kind)
    n_heads = head_map(model)[0].n
    set_gates(adapt(model), {(layer, h): 0. for layer in range(2) for h in range(n_heads//2)})
    want = logits(model, batch)
    export_hf(model, tmp_path/'plain')
    back = AutoModelForImageTextToText.from_pretrained(tmp_path/'plain')
    assert type(back) is type(built(kind))
    torch.testing.assert_close(logits(back, batch), want, rtol=1e-4, atol=1e-4)


def test_a_model_of_text_is_no_model_that_sees(tmp_path):
    model = random_model('llama')
    set_gates(adapt(model), {(0, 0): 0.})
    compact(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='a model of text alone.*AutoModelForCausalLM'): AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).sentinel.compact


def test_the_folder_says_which_class():
    config = build('mllama').config
    assert auto_class(config).__name__ == 'AutoModelForCausalLM'                  # both have it; nothing is said
    config.architectures = ['MllamaForConditionalGeneration']
    assert auto_class(config).__name__ == 'AutoModelForImageTextToText'
