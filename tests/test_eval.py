"""`sentinel-eval`: items are read or refused with their line; lm-eval, where it is installed, gives the scores that ten lines by hand give."""
import importlib.util
import json

import pytest
import torch
from sentinel_ai import compact, load_adaptive_model, load_tokenizer, set_gates
from sentinel_ai.cli import eval_cli
from sentinel_ai.cli_eval import Items, evaluate, find_items, read_items, score_table, scores, task_config, write_tasks

torch.set_num_threads(1)
PAIR, CHOICE = dict(good='a b', bad='b a', uid='x'), dict(question='q', choices=['a', 'b', 'c'], answer=2, id=7)
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec('lm_eval') is None, reason='lm_eval is not installed')


def write(path, rows):
    path.write_text('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows) + '\n')
    return path


BAD = ['{"good": "a"', '3', '[]', 'null', dict(good='a'), dict(good='a', bad=3), dict(good='', bad='b'), CHOICE | dict(answer=3), CHOICE | dict(answer=-1),
       CHOICE | dict(answer='2'), CHOICE | dict(answer=True), CHOICE | dict(choices=['a']), CHOICE | dict(choices='abc'), CHOICE | dict(question=None)]


@pytest.mark.parametrize('row', BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_line_is_named(row, tmp_path):
    with pytest.raises(ValueError, match=r'x\.jsonl, line 3: allowed is an item'): read_items(write(tmp_path/'x.jsonl', [PAIR, '', row]))


def test_items(tmp_path):
    write(tmp_path/'p.jsonl', [PAIR]*5)
    write(tmp_path/'c.jsonl', [CHOICE, CHOICE | dict(choices=['a', 'b'], answer=0)])
    c, p = find_items(tmp_path)
    assert (c.task, c.kind, c.chance) == ('c', 'choices', (1/3 + 1/2)/2) and (p.kind, p.chance, len(p.rows)) == ('pairs', .5, 5)
    assert [len(items.rows) for items in find_items(tmp_path, ['p'], limit=2)] == [2] and find_items(tmp_path/'p.jsonl')[0].task == 'p'
    write(tmp_path/'both.jsonl', [PAIR, CHOICE])
    with pytest.raises(ValueError, match='one kind of item'): find_items(tmp_path)
    (tmp_path/'both.jsonl').write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match='not UTF-8'): read_items(tmp_path/'both.jsonl')
    (tmp_path/'both.jsonl').write_bytes(b'')
    with pytest.raises(ValueError, match='holds nothing'): read_items(tmp_path/'both.jsonl')


def test_tasks_on_the_disk(tmp_path):
    found = [Items('c', 'choices', [CHOICE], ''), Items('p', 'pairs', [PAIR], '')]
    write_tasks(found, tmp_path/'t')
    assert [items.rows for items in find_items(tmp_path/'t')] == [[{k: CHOICE[k] for k in ('question', 'choices', 'answer')}],
                                                                 [dict(good='a b', bad='b a')]]
    for items in found:
        said = json.loads((tmp_path/'t'/f'{items.task}.yaml').read_text())
        assert said == task_config(items, tmp_path/'t'/f'{items.task}.jsonl', tmp_path/'t'/'cache')


def test_changes_are_paired():
    items = Items('p', 'pairs', [PAIR]*4, '')
    s, = scores([items], dict(p=dict(acc=[1., 0., 1., 0.])), dict(p=dict(acc=[1., 1., 1., 0.])))
    assert (s.score, s.beside, s.change, s.change_error) == (.5, .75, -.25, .25)
    assert 'change' in score_table([s], ('a', 'b')) and '-25.0' in score_table([s], ('a', 'b'))


def test_without_lm_eval(tmp_path, monkeypatch, capsys):
    write(tmp_path/'p.jsonl', [PAIR])
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit) as e: eval_cli(['tiny-llama', '--items', str(tmp_path)])
    assert e.value.code == 2 and "pip install 'sentinel-ai[eval]'" in capsys.readouterr().err


def by_hand(m, tok, items):
    "Is the right choice the one with the largest sum of its tokens' log-probabilities?"
    res = []
    for row in items.rows:
        pair = items.kind == 'pairs'
        context, choices = ('', [row['good'], row['bad']]) if pair else (f"Question: {row['question']}\nAnswer:", row['choices'])
        begin = [tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id]
        start, sums = tok.encode(context, add_special_tokens=False) or begin, []
        for c in choices:
            ids = torch.tensor([(begin if pair else []) + tok.encode(f'{context} {c}', add_special_tokens=False)])
            with torch.no_grad(): logs = m(ids).logits[0].log_softmax(-1)[len(start)-1:-1]
            sums.append(logs.gather(1, ids[0, len(start):, None]).sum().item())
        res.append(float(sums.index(max(sums)) == (0 if pair else row['answer'])))
    return res


@needs_lm_eval
@pytest.mark.parametrize('kind', ['plain', 'masked', 'compact'])
def test_scores_are_those_by_hand(kind):
    m, tok = load_adaptive_model('tiny-llama'), load_tokenizer('tiny-llama')
    if kind != 'plain': set_gates(m, {(1, h): 0. for h in range(6)} | {(2, 0): 0.})
    if kind == 'compact': compact(m)
    rng = torch.Generator().manual_seed(1)
    def text(n): return tok.decode(torch.randint(300, 900, (n,), generator=rng))
    found = [Items('c', 'choices', [dict(question=text(8), choices=[text(3), text(4), text(3)], answer=i % 3) for i in range(20)], ''),
             Items('p', 'pairs', [dict(good=text(6), bad=text(6)) for _ in range(20)], '')]
    got = evaluate(m, tok, found)
    assert {items.task: got[items.task]['acc'] for items in found} == {items.task: by_hand(m, tok, items) for items in found}
