"""Whatever is typed, a command does it or ends with a sentence and code 2: no traceback, no endless work."""
import io
import json
import os
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentinel_ai import cli_compat, cli_eval, cli_generate, cli_inspect, cli_train, command, texts
from sentinel_ai.cli import (CompatOptions, EvalOptions, GenerateOptions, InspectOptions, compat_cli, eval_cli, generate_cli, inspect_cli,
                             train_cli)
from sentinel_ai.cli_train import _train_parser
from sentinel_ai.command import Parser
from sentinel_ai.data import load_text

torch.set_num_threads(1)
LONG = 'SENTINEL_COMMANDS' in os.environ          # all options, all values
transformers.utils.logging.disable_progress_bar()
NEVER = ['1e400', 'inf', '-inf', 'nan', '1e20', '99999999999999999999', 'x', '', ' ', '\u2603', '--']
PARSERS = [(generate_cli, Parser(GenerateOptions, prog='x')), (compat_cli, Parser(CompatOptions, prog='x')), (train_cli, _train_parser('x')),
           (eval_cli, Parser(EvalOptions, prog='x'))]
NUMBERS = [(main, a.option_strings[0]) for main, parser in PARSERS for a in parser._actions
           if a.type in (int, float) or getattr(a.type, '__name__', '') in ('int', 'float')]
# what -1 and 0 mean where they mean something
MINUS, ZERO = {'--max_steps', '--local_rank'}, {
    '--top_k', '--seed', '--held', '--sparsity', '--gate_lr', '--warmup_steps', '--weight_decay', '--adam_beta1', '--adam_beta2', '--max_grad_norm',
    '--label_smoothing_factor', '--neftune_noise_alpha', '--eval_delay', '--data_seed', '--dataloader_num_workers', '--local_rank'}


def refused(main, argv, capsys):
    "What a command says when it ends with code 2."
    with pytest.raises(SystemExit) as e: main(argv)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith('sentinel-') and 'Traceback' not in said, said
    return said


def test_all_numeric_options_are_known():
    names = {option for _, option in NUMBERS}
    assert len(names) > 30 and {'--num_beams', '--save_steps', '--warmup_steps', '--repeats', '--gradient_accumulation_steps'} <= names


@pytest.mark.parametrize('main, option', NUMBERS, ids=[f'{m.__name__}{o}' for m, o in NUMBERS])
def test_numbers(main, option, capsys):
    for value in NEVER: assert option.strip('-') in refused(main, [f'{option}={value}'], capsys)
    if option not in MINUS: assert option.strip('-') in refused(main, [f'{option}=-1'], capsys)
    if option not in MINUS | ZERO: assert option.strip('-') in refused(main, [f'{option}=0'], capsys)


@pytest.fixture
def odd(tmp_path):
    "Files and folders that aren't what they should be."
    files = {'junk.gguf': b'GGUF' + bytes(range(200)), 'short.gguf': b'GG', 'binary.txt': bytes(range(256)), 'zeros.txt': bytes(99), 'empty.txt': b'',
             'white.txt': b' \n\t ', 'latin.txt': 'caf\u00e9'.encode('latin-1'), 'bad.jsonl': b'{"text": ', 'bad.parquet': b'PAR1', 'no.jsonl': b'{"n": 1}\n',
             'list.json': b'[1, 2]', 'picture.png': b'\x89PNG', 'broken/config.json': b'{"model_type": ', 'deep/config.json': b'['*50_000,
             'odd/config.json': json.dumps(dict(model_type='llama', num_hidden_layers='x')).encode(), 'unknown/config.json': b'{"model_type": "x"}',
             'none/config.json': b'{"model_type": "llama"}', 'sentinel/config.json': b'{"model_type": "sentinel", "base": 3}'}
    for name, data in files.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(data)
    for name in ('nothing', 'folder.txt', 'folder.png', 'folder.gguf'): (tmp_path/name).mkdir()
    return tmp_path


MODELS = ['missing/model', 'nothing', 'picture.png', 'junk.gguf', 'short.gguf', 'folder.gguf', 'missing.gguf', 'broken', 'deep', 'odd', 'unknown', 'none',
          'sentinel', 'empty.txt']
TEXTS = ['missing.txt', 'nothing', 'folder.txt', 'picture.png', 'binary.txt', 'zeros.txt', 'empty.txt', 'white.txt', 'latin.txt', 'bad.jsonl', 'bad.parquet',
         'no.jsonl', 'list.json']


@pytest.mark.parametrize('name', MODELS)
def test_models_that_are_none(name, odd, capsys):
    for main, argv in ((inspect_cli, []), (generate_cli, ['x', '--model']), (train_cli, ['--model'])):
        said = refused(main, [*argv, str(odd/name)], capsys)
        assert name.split('/')[0] in said and len(said) < 1500, said
    assert compat_cli([str(odd/name)]) == 1


@pytest.mark.parametrize('name', TEXTS)
def test_texts_that_are_none(name, odd, capsys):
    said = refused(train_cli, ['--text', str(odd/name), '--output_dir', str(odd/'run')], capsys)
    assert name in said or name == 'white.txt' and 'empty text' in said, said
    assert not (odd/'run').exists()


def test_places_that_are_none(odd, capsys):
    assert 'picture.png' in refused(train_cli, ['--output_dir', str(odd/'picture.png')], capsys)
    for name in ('nothing', 'missing', 'picture.png'): assert name in refused(train_cli, ['--resume_from_checkpoint', str(odd/name)], capsys)
    for name in ('missing/x.png', 'folder.png'): assert name in refused(inspect_cli, ['random:llama', '--plot', str(odd/name)], capsys)


ODD = ['', ' ', '--', '-', '\u2603', '\u202e', 'a'*5000, '{}', '[]', '{"a":', '~', '../..', '/dev/null', '/dev/full', '%s', '\n']
REST = [(main, a.option_strings[0]) for main, parser in [*PARSERS, (inspect_cli, Parser(InspectOptions, prog='x'))] for a in parser._actions
        if a.option_strings and (main, a.option_strings[0]) not in NUMBERS and a.dest != 'help']


def test_all_other_options(monkeypatch, capsys, tmp_path):
    "Every option that takes a text, a path or a word, with texts, paths and words that are none: refused in a sentence, or handed on."
    class Reached(Exception): pass

    def stop(*args, **kw): raise Reached
    monkeypatch.chdir(tmp_path)
    for module in (cli_generate, cli_inspect, cli_compat, cli_eval): monkeypatch.setattr(module, 'load', stop, raising=False)
    monkeypatch.setattr(cli_train, '_prepare', stop)
    for main, option in REST if LONG else REST[::3]:
        for value in ODD if LONG else ODD[::2]:
            argv = [f'{option}={value}']
            try: code = main(['x', *argv] if main is generate_cli else ['random:llama', *argv] if main in (inspect_cli, compat_cli) else argv)
            except Reached: code = 0
            except SystemExit as e: code = e.code
            said = capsys.readouterr().err
            assert code in (0, 1) or code == 2 and said.strip() and 'Traceback' not in said, (option, value, said)
    assert not list(tmp_path.iterdir())


def test_the_whole_disk(tmp_path, monkeypatch, capsys):
    for i in range(30): (tmp_path/f'{i}.txt').write_text('x')
    monkeypatch.setattr(texts, '_MOST_FILES', 20)
    assert 'smaller folder' in refused(train_cli, ['--text', str(tmp_path)], capsys)
    monkeypatch.setattr(texts, '_MOST_SEEN', 10)
    assert 'more than 10 files' in refused(train_cli, ['--text', str(tmp_path)], capsys)


def test_marks_and_encodings(tmp_path):
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
        (tmp_path/'a.txt').write_text('Gr\u00fc\u00dfe', encoding=encoding)
        (tmp_path/'b.jsonl').write_text('{"text": "Gr\u00fc\u00dfe"}\n', encoding=encoding)
        for streaming in (False, True): assert [row['text'] for row in load_text(tmp_path, streaming=streaming)] == ['Gr\u00fc\u00dfe']*2


def test_a_prompt_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\xff\xfe\xff'), encoding='utf-8'))
    assert 'utf-8' in refused(generate_cli, ['--prompt', '-'], capsys)


@pytest.mark.parametrize('more', ['', '--params .8 --lora 4'])
def test_interrupted_and_resumed(more, tmp_path, monkeypatch, capsys):
    "Ctrl-C in the middle of a run leaves checkpoints; the run that goes on from the last one ends as the run that wasn't interrupted."
    argv = [*more.split(), '--max_steps', '6', '--save_strategy', 'steps', '--save_steps', '2', '--eval_strategy', 'no', '--block_size', '32',
            '--max_tokens', '2000', '--held', '2', '--disable_tqdm', '--logging_steps', '1']
    assert train_cli([*argv, '--output_dir', str(tmp_path/'whole')]) == 0
    seen = []

    def stop(self, args, state, control, **kw):
        seen.append(state.global_step)
        if state.global_step == 5: raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(transformers.TrainerCallback, 'on_log', stop)
        assert train_cli([*argv, '--output_dir', str(tmp_path/'run')]) == 130
    assert 'interrupted' in capsys.readouterr().err
    assert train_cli([*argv, '--output_dir', str(tmp_path/'run'), '--resume_from_checkpoint', str(tmp_path/'run')]) == 0
    a, b = (load_file(tmp_path/name/'model'/'model.safetensors') for name in ('whole', 'run'))
    assert a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())
    reports = [(tmp_path/name/'report.md').read_text().split('Training took')[0] for name in ('whole', 'run')]
    assert reports[0] == reports[1]


def test_quiet_when_nobody_reads(monkeypatch):
    @command.interruptible
    def main(argv=None): raise KeyboardInterrupt
    assert main([]) == 130


def test_weights_that_are_no_numbers(tmp_path, capsys):
    "Nothing is written, drawn or trained from them, and a look at the model says so."
    model, tok = command.load('tiny-llama')
    with torch.no_grad(): model.model.layers[1].mlp.down_proj.weight[0, 0] = float('nan')
    folder = str(tmp_path/'model')
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    for more in ([], ['--do_sample']):
        assert 'nothing to choose by' in refused(generate_cli, ['A class', '--model', folder, '--tokens', '3', *more], capsys)
    for more in ([], ['--params', '.8']):
        said = refused(train_cli, ['--model', folder, '--output_dir', str(tmp_path/'run'), '--max_steps', '2', '--block_size', '32', '--max_tokens', '999',
                                   '--held', '2', '--disable_tqdm', *more], capsys)
        assert 'batch 0' in said if '--params' in more else 'validation blocks is nan' in said
        assert not (tmp_path/'run').exists()
    assert inspect_cli([folder]) == 0
    assert 'NaN or infinity in model.layers.1.mlp.down_proj' in capsys.readouterr().out
    assert compat_cli([folder]) == 1
