"""A saved folder in programs that never import sentinel_ai: each runs in a process of its own and is compared with the model."""
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from sentinel_ai import add_skips, compact, load_adaptive_model, load_tokenizer, prune, set_gates, set_skip_gates
from sentinel_ai.modeling import MODELING_FILE

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
IDS = torch.arange(5, 25)[None]
KINDS = ['masked', 'compact', 'repaired', 'skips']

# what a client's process begins with; `wants` are the logits of the models, `folders` their folders
HEAD = """
import json, os, sys, warnings
warnings.simplefilter('ignore')
import torch
torch.set_num_threads(1)
ids = torch.arange(5, 25)[None]
root, = sys.argv[1:2]
kinds = ['masked', 'compact', 'repaired', 'skips']
folders = {kind: os.path.join(root, kind) for kind in kinds}
wants = torch.load(os.path.join(root, 'wants.pt'))
def same(model, kind):
    with torch.no_grad(): return torch.equal(model(ids).logits, wants[kind])
"""


def made(kind):
    "A model of the package, pruned in one of four ways."
    m = load_adaptive_model('tiny-llama')
    rng = torch.Generator().manual_seed(0)
    if kind == 'masked': set_gates(m, {(0, 0): 0., (1, 1): .5})
    if kind == 'compact': compact(set_gates(m, {(0, 0): 0., (1, 1): 0.}))
    if kind == 'repaired':
        prune(m, .3, torch.randint(3, 90, (8, 32), generator=rng), rounds=1, progress=False)
        compact(m)
    if kind == 'skips':
        add_skips(m)
        set_skip_gates(m, .5)
    return m


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Four folders, each with a tokenizer, and the logits of their models."
    root, wants = tmp_path_factory.mktemp('clients'), {}
    tok = load_tokenizer('tiny-llama')
    for kind in KINDS:
        m = made(kind)
        m.save_pretrained(root/kind)
        tok.save_pretrained(root/kind)
        with torch.no_grad(): wants[kind] = m(IDS).logits
    torch.save(wants, root/'wants.pt')
    return root


def client(root, code, *args, installed=True, fails=False):
    "Run a client's script; what it printed, or how it failed. `installed=False`: on a machine without sentinel_ai."
    block = '' if installed else "import sys; sys.modules['sentinel_ai'] = None\n"
    script = block + HEAD + textwrap.dedent(code)
    env = dict(os.environ, HF_HOME=str(root/'hf'), HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', OMP_NUM_THREADS='1')
    run = subprocess.run([sys.executable, '-c', script, str(root), *map(str, args)], capture_output=True, text=True, env=env,
                         stdin=subprocess.DEVNULL, timeout=600)
    assert (run.returncode != 0) == fails, run.stderr[-3000:]
    return run.stderr if fails else run.stdout


def needs(name):
    if importlib.util.find_spec(name) is None: pytest.skip(f'{name} is not installed')


# --- transformers ---

def test_auto_classes(root):
    out = client(root, """
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
        trust = dict(trust_remote_code=True)
        for kind, folder in folders.items():
            config = AutoConfig.from_pretrained(folder, **trust)
            assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (128, 4, 256)
            assert len(AutoTokenizer.from_pretrained(folder)('a b').input_ids)
            m = AutoModelForCausalLM.from_pretrained(folder, **trust)
            assert same(m, kind), kind
            with torch.no_grad():
                want = m(ids, output_hidden_states=True).hidden_states[-1]
                body = AutoModel.from_pretrained(folder, **trust)
                assert type(body).__name__ == 'LlamaModel' and torch.equal(body(ids).last_hidden_state, want), kind
            again = os.path.join(root, 'again', kind)
            m.save_pretrained(again)
            assert same(AutoModelForCausalLM.from_pretrained(again, **trust), kind), kind
            for name in ('config.json', 'modeling_sentinel.py'):
                assert open(os.path.join(again, name)).read() == open(os.path.join(folder, name)).read(), name
        print('done')
    """)
    assert 'done' in out


def test_pipeline(root):
    out = client(root, """
        from transformers import pipeline
        for kind, folder in folders.items():
            p = pipeline('text-generation', model=folder, trust_remote_code=True)
            assert same(p.model, kind), kind
            print(p('Return the', max_new_tokens=4, do_sample=False)[0]['generated_text'])
    """)
    assert out.count('Return the') == len(KINDS)


def test_without_permission(root):
    "The message is transformers' own; a tokenizer needs none."
    out = client(root, """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        AutoTokenizer.from_pretrained(folders['compact'])
        for trust in (None, False):
            try: AutoModelForCausalLM.from_pretrained(folders['compact'], trust_remote_code=trust)
            except ValueError as e: print(e)
    """)
    assert out.count('trust_remote_code=True') >= 2 and 'upgrade transformers' not in out.lower()


def test_where_it_is_not_installed(root):
    err = client(root, """
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained(folders['compact'], trust_remote_code=True)
    """, installed=False, fails=True)
    assert 'pip install sentinel-ai' in err.strip().splitlines()[-1]


def test_an_explicit_class(root):
    "`LlamaForCausalLM` would drop the gates of one folder and mistake the plan of another for a config."
    code = """
        from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM
        for kind, folder in folders.items():
            config = LlamaConfig.from_pretrained(folder)
            assert (config.hidden_size, config.num_hidden_layers) == (128, 4)
            for cls in (LlamaForCausalLM, MistralForCausalLM):
                try: cls.from_pretrained(folder)
                except ValueError as e: print(e)
    """
    for installed in (True, False):
        out = client(root, code, installed=installed)
        assert out.count('import sentinel_ai') == 2*len(KINDS) and 'AutoModelForCausalLM' in out


def test_nothing_is_asked_once_it_is_imported(root):
    out = client(root, """
        import builtins
        def ask(*args): raise AssertionError('asked')
        builtins.input = ask
        import sentinel_ai
        from transformers import AutoConfig, AutoModelForCausalLM, pipeline
        for kind, folder in folders.items():
            assert same(AutoModelForCausalLM.from_pretrained(folder), kind)
            assert same(pipeline('text-generation', model=folder).model, kind)
        assert not any('modeling_sentinel' in name for name in sys.modules)     # the file isn't run
        for kind, folder in folders.items():
            assert same(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), kind)
        print('done')
    """)
    assert 'done' in out


def test_serve_finds_the_class(root):
    "`transformers serve` looks up `architectures` in the module that it imported before anything else."
    pytest.importorskip('transformers.cli.serving.model_manager', reason='this transformers has no such server', exc_type=ImportError)
    out = client(root, """
        from transformers.cli.serving import model_manager
        for kind, folder in folders.items():
            about = json.load(open(os.path.join(folder, 'config.json')))
            model_manager.transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
            cls = getattr(model_manager.transformers, about['architectures'][0])
            assert same(cls.from_pretrained(folder), kind)
        print('done')
    """)
    assert 'done' in out


# --- others ---

def test_trl_by_name(root):
    needs('trl')
    out = client(root, """
        from trl.trainer.utils import create_model_from_path
        for kind, folder in folders.items():
            assert same(create_model_from_path(folder, trust_remote_code=True), kind), kind
        import sentinel_ai
        for kind, folder in folders.items(): assert same(create_model_from_path(folder), kind), kind
        print('done')
    """)
    assert 'done' in out


def test_trl_trains(root):
    "SFT by the folder's name, and DPO on a reloaded model, whose reference TRL loads by name."
    needs('trl')
    out = client(root, """
        import tempfile
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
        folder, common = folders['compact'], dict(max_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
        tok = AutoTokenizer.from_pretrained(folder)
        trust = dict(model_init_kwargs=dict(trust_remote_code=True))
        data = Dataset.from_dict(dict(text=['a b c d e f']*4))
        sft = SFTTrainer(folder, SFTConfig(tempfile.mkdtemp(), **common, **trust), train_dataset=data, processing_class=tok)
        assert same(sft.model, 'compact') and type(sft.model).__name__ == 'AdaptiveLlamaForCausalLM'
        sft.train()
        pairs = Dataset.from_dict(dict(prompt=['The object is']*4, chosen=[' a class.']*4, rejected=[' a cow.']*4))
        m = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        dpo = DPOTrainer(m, args=DPOConfig(tempfile.mkdtemp(), **common), train_dataset=pairs, processing_class=tok)
        assert same(dpo.ref_model, 'compact')
        dpo.train()
        print('done')
    """)
    assert 'done' in out


def test_lm_eval(root):
    needs('lm_eval')
    out = client(root, """
        from lm_eval.models.huggingface import HFLM
        for kind, folder in folders.items():
            lm = HFLM(pretrained=folder, trust_remote_code=True, device='cpu', dtype='float32', batch_size=1)
            assert same(lm.model, kind) and lm.max_length == 256, kind
        print('done')
    """)
    assert 'done' in out


def test_peft_by_name(root):
    needs('peft')
    out = client(root, """
        from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        folder, adapter = folders['compact'], os.path.join(root, 'adapter')
        m = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        get_peft_model(m, LoraConfig(target_modules=['q_proj', 'down_proj'], task_type='CAUSAL_LM')).save_pretrained(adapter)
        back = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
        assert same(back, 'compact')
        print('done')
    """)
    assert 'done' in out


# --- the folder ---

def test_what_lies_in_it(root, tmp_path):
    for kind in KINDS:
        about = json.loads((root/kind/'config.json').read_text())
        assert about['auto_map'].keys() == {'AutoConfig', 'AutoModel', 'AutoModelForCausalLM', 'AutoModelForImageTextToText'}
        assert about['hidden_size'] == 128 and about['vocab_size'] == 1024
        assert (root/kind/MODELING_FILE).read_text() == (root/KINDS[0]/MODELING_FILE).read_text()
    m = made('masked')
    m.save_pretrained(tmp_path)
    assert (tmp_path/MODELING_FILE).exists()
    set_gates(m, 1.).save_pretrained(tmp_path)                      # now a plain model, for anyone
    assert not (tmp_path/MODELING_FILE).exists() and 'auto_map' not in (tmp_path/'config.json').read_text()
    (tmp_path/MODELING_FILE).write_text('# mine')
    m.save_pretrained(tmp_path)
    assert (tmp_path/MODELING_FILE).read_text() == '# mine'


def test_no_path_of_this_machine(tmp_path):
    "Wherever a model was read from, its config doesn't say."
    home = tmp_path/'somebody'
    made('masked').save_pretrained(home/'a')
    for place in (home/'a', os.path.relpath(home/'a')):
        m = load_adaptive_model(place)
        m.save_pretrained(tmp_path/'b')
        for file in (tmp_path/'b').iterdir(): assert b'somebody' not in file.read_bytes(), file


# --- the config ---

def reads(folder, **kwargs): return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize('kind', KINDS)
def test_edits_take_effect(root, kind, tmp_path):
    config = AutoConfig.from_pretrained(root/kind)
    assert config.attention_dropout == 0. and config.num_key_value_heads == 4
    config.attention_dropout, config.use_cache, config.output_hidden_states, config.output_attentions = .3, False, True, True
    config.rope_parameters['rope_theta'] = 500.
    config.save_pretrained(tmp_path)
    for cfg in (config, AutoConfig.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config))):
        got = reads(root/kind, config=cfg).config
        assert (got.attention_dropout, got.use_cache, got.output_hidden_states, got.output_attentions) == (.3, False, True, True)
        assert got.rope_parameters['rope_theta'] == 500.
    assert reads(root/kind, attention_dropout=.2).config.attention_dropout == .2
    assert reads(root/kind).config.attention_dropout == 0.


@pytest.mark.parametrize('change', [dict(hidden_size=64), dict(num_hidden_layers=2), dict(vocab_size=7), dict(num_attention_heads=4),
                                    dict(num_key_value_heads=2), dict(intermediate_size=16), dict(head_dim=8)])
def test_sizes_are_refused_by_name(root, change):
    (name, value), = change.items()
    config = AutoConfig.from_pretrained(root/'compact')
    setattr(config, name, value)
    for kwargs in (dict(config=config), change):
        with pytest.raises(ValueError, match=f'{name} is to be {value}'): reads(root/'compact', **kwargs)


def test_the_type_of_the_weights(root, tmp_path):
    config = AutoConfig.from_pretrained(root/'compact')
    config.dtype = torch.bfloat16
    assert reads(root/'compact', config=config).dtype == reads(root/'compact', dtype=torch.bfloat16).dtype == torch.bfloat16
    made('compact').half().save_pretrained(tmp_path)
    assert reads(tmp_path).dtype == torch.float16 and json.loads((tmp_path/'config.json').read_text())['base']['dtype'] == 'float16'


@pytest.mark.parametrize('name', ['other/model--modeling_sentinel.X', 'modeling_other.X', 'modeling_sentinel.X.y', 3, ['modeling_sentinel.X']])
def test_no_code_but_ours(root, name, tmp_path):
    "A config that was passed on can't name code of its own."
    shutil.copytree(root/'masked', tmp_path/'m')
    file = tmp_path/'m'/'config.json'
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | dict(auto_map=dict(AutoModelForSeq2SeqLM=name))))
    for read in (AutoConfig.from_pretrained, reads, load_adaptive_model):
        with pytest.raises(ValueError, match='code from elsewhere: auto_map'): read(tmp_path/'m')


def test_other_heads(root):
    for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification,
                 transformers.AutoModelForQuestionAnswering):
        with pytest.raises(ValueError, match=f'export_hf.*{auto.__name__} reads'): auto.from_pretrained(root/'compact', num_labels=3)
    body = transformers.AutoModel.from_pretrained(root/'compact')
    with pytest.raises(RuntimeError, match='a part is not saved'): body.save_pretrained(root/'nowhere')


def test_an_old_folder_gets_the_file_when_it_is_saved(tmp_path):
    old = Path(__file__).parent/'fixtures'/'0.1.0'/'llama'/'compact'
    m = reads(old)
    m.save_pretrained(tmp_path)
    assert (tmp_path/MODELING_FILE).exists()
    with torch.no_grad(): assert torch.equal(reads(tmp_path)(IDS).logits, m(IDS).logits)
    with pytest.raises(ValueError, match='AutoModelForCausalLM'): transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    made('masked').save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='holds no tokenizer.*model.safetensors.*save_pretrained'): load_tokenizer(tmp_path)


def test_a_pipeline_of_another_task(root):
    "It would go on with the language model, and say so in a log only."
    for task in ('text-classification', 'token-classification'):
        with pytest.raises(ValueError, match='is a causal language model'): transformers.pipeline(task, model=str(root/'compact'))
    got = transformers.pipeline('feature-extraction', model=str(root/'compact'))('Return the')
    assert len(got[0][0]) == 128
