"`pick` where someone can click, pictures in TensorBoard, and maps of attention on architectures that compute it in other ways."
import copy

import pytest
import torch
from sentinel_ai import AdaptiveTrainer, adapt, compact, load_adaptive_model, load_tokenizer, set_gates
from sentinel_ai.agency import Agency
from sentinel_ai.attention import attention_maps
from sentinel_ai.controller import ThresholdController
from sentinel_ai.data import lm_dataset
from sentinel_ai.sentinel import GateConfig
from sentinel_ai.growth import grow
from sentinel_ai.testing import random_model
from sentinel_ai.measure import measure
from sentinel_ai.memory import HeadMemory
from sentinel_ai.regrow import regrow
from sentinel_ai.report import Dashboard
from sentinel_ai.surgery import HeadPlan
from sentinel_ai.train import AdaptiveCallback, GateRun, TrainResult
from transformers import TrainingArguments

ARCHS = ('gpt2', 'opt', 'bloom', 'gpt_neox', 'llama', 'mistral', 'gemma2', 'phi3', 'falcon', 'gptj', 'gpt_neo', 'codegen', 'mpt', 'gpt_bigcode', 'gpt_oss')


@pytest.fixture(scope='module')
def kernel():
    pytest.importorskip('ipywidgets')
    manager = pytest.importorskip('jupyter_client.manager')
    km, kc = manager.start_new_kernel(kernel_name='python3')
    yield kc
    kc.stop_channels(), km.shutdown_kernel(now=True)


def run(kc, code, stdin=True):
    "What a cell prints, and the types of what it shows."
    out = []
    def hook(m):
        c = m['content']
        text = c.get('text', '').strip()                 # a busy kernel sends the line's end by itself
        if m['msg_type'] == 'stream' and c['name'] == 'stdout' and text: out.append(text)
        if m['msg_type'] == 'display_data': out.append(sorted(c['data'])[0])
        if m['msg_type'] == 'error': raise AssertionError('\n'.join(c['traceback']))
    kc.execute_interactive(code, allow_stdin=stdin, output_hook=hook, timeout=120)
    return out


def test_pick_follows_its_dropdown(kernel):
    code = "from sentinel_ai.viz import pick\nname = pick('model', ['a', 'b'], 'a')\n"
    assert run(kernel, code + 'other = name; print(name)') == ['application/vnd.jupyter.widget-view+json', 'a']
    move = "import gc, ipywidgets\nbox, = [o for o in gc.get_objects() if type(o) is ipywidgets.Dropdown]\nbox.value = 'b'\n"
    assert run(kernel, move + "print(name, other, {'b': 1}[name])") == ['b b 1']
    assert run(kernel, code + 'print(name)')[-1] == 'b'                                     # the choice outlives the cell


def test_pick_shows_nothing_where_nobody_clicks(kernel):
    "nbconvert and papermill run a kernel that takes no input."
    assert run(kernel, "from sentinel_ai.viz import pick\nprint(type(pick('text', ['a'], 'a')).__name__)", stdin=False) == ['str']


def test_images_reach_tensorboard(tmp_path):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    data = lm_dataset('python_docs', load_tokenizer('tiny-gpt2'), 64)
    args = TrainingArguments(tmp_path, max_steps=4, per_device_train_batch_size=2, logging_steps=2, eval_strategy='steps', eval_steps=4, use_cpu=True,
                             save_strategy='no', disable_tqdm=True, report_to=['tensorboard'])
    AdaptiveTrainer(load_adaptive_model('tiny-gpt2'), args, train_dataset=data['train'], eval_dataset=data['validation'].select(range(4)),
                    callbacks=[Dashboard()]).train()
    found = []
    for d in {f.parent for f in tmp_path.rglob('events.out.tfevents.*')}:
        acc = events.EventAccumulator(str(d), size_guidance=dict(images=0)).Reload()
        found += [(n, x.step) for n in acc.Tags()['images'] for x in acc.Images(n)]
    assert sorted(found) == [('sentinel/entropy', 4), ('sentinel/gates', 2), ('sentinel/gates', 4)]


def test_dashboard_without_a_writer_says_so(tmp_path):
    data = lm_dataset('python_docs', load_tokenizer('tiny-gpt2'), 64)
    args = TrainingArguments(tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=2, use_cpu=True, save_strategy='no',
                             disable_tqdm=True, report_to=[])
    with pytest.raises(RuntimeError, match='no TensorBoard writer'):
        AdaptiveTrainer(load_adaptive_model('tiny-gpt2'), args, train_dataset=data['train'], callbacks=[Dashboard()]).train()


@pytest.mark.parametrize('arch', ARCHS)
def test_maps_hold_the_entropy_that_is_measured(arch):
    "Rows sum to one (with a sink to less), nothing looks ahead, and a table's entropy is that of `measure`; compact as masked."
    m, ids = adapt(random_model(arch)), torch.randint(5, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    maps, exact = attention_maps(m, ids), measure(m, ids, 'entropy', progress=False).entropy
    assert len(maps) == m.sentinel.now.heads.n_heads
    for k, p in maps.items():
        assert p.shape == (12, 12) and not p.triu(1).any()
        if arch == 'gpt_oss': assert (p.sum(-1) < 1).all(); continue
        torch.testing.assert_close(p.sum(-1), torch.ones(12), atol=1e-5, rtol=0)
        torch.testing.assert_close(-(p*p.clamp_min(1e-30).log()).sum(-1).mean(), exact[k], atol=1e-4, rtol=0)
    site = next(iter(m.sentinel.now.heads))
    set_gates(m, {(site.layer, 0): 0.})
    c = copy.deepcopy(m)
    compact(c)
    masked, cut = attention_maps(m, ids), attention_maps(c, ids)
    assert list(masked) == list(cut) == [k for k in maps if k != (site.layer, 0)]
    for k in cut: torch.testing.assert_close(masked[k], cut[k], atol=1e-5, rtol=0)


def test_grown_heads_are_measured_in_their_own_places():
    "Under SDPA heads that read keys of earlier ones are computed in another order; what is measured must not be."
    m, ids = load_adaptive_model('tiny-llama'), torch.randint(5, 90, (1, 16), generator=torch.Generator().manual_seed(0))
    grow(m, heads={1: 3}, scores=torch.rand(4, 8, generator=torch.Generator().manual_seed(0)))
    maps, stats = attention_maps(m, ids), measure(m, ids, 'entropy', progress=False)
    m.set_attn_implementation('eager')
    for k, p in attention_maps(m, ids).items(): torch.testing.assert_close(maps[k], p, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.entropy, measure(m, ids, 'entropy', progress=False).entropy, atol=1e-5, rtol=0, equal_nan=True)


def test_main_types_have_a_rich_display():
    "The last line of a cell is enough: a table for each, its head and its first rule of equal width."
    m, ids = adapt(random_model('llama')), torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    memory, agency = HeadMemory(), Agency()
    memory.attach(m), agency.attach(m)
    agency.withdraw([(1, 1)], 'a test')
    stats = measure(m, ids, progress=False)
    memory.remember(m, [(0, 1)])
    set_gates(m, {(0, 1): 0.})
    cycle = AdaptiveCallback(ThresholdController(steps=10, schedule=.25), every=1, batches=ids)
    model = adapt(random_model('llama'))
    cycle.cycle.step(model, torch.optim.SGD(model.parameters(), lr=.1), 1)
    end = dict(loss=1., perplexity=2.7, open=8, heads=8)
    for x in (HeadPlan.from_gates(m), m.sentinel.now.heads, memory, agency, regrow(m, [(0, 1)], warmup=4), GateConfig(), GateRun(), cycle, cycle.cycle,
              TrainResult(m, end, end, end, [], [], torch.ones(1, 2, 4), 1.)):
        head, rule, row, *_ = x._repr_markdown_().splitlines()
        assert head.count('|') == rule.count('|') == row.count('|') > 2, type(x).__name__
    assert stats._repr_html_().startswith('<table')
