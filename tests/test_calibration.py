"""Text in many forms and of many kinds: read as the model sees it, weighed by tokens, drawn the same way everywhere."""
import copy
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from sentinel_ai import measure, prune, random_model
from sentinel_ai.batches import token_batches
from sentinel_ai.calibration import calibration
from sentinel_ai.loaders import load_tokenizer

NAMES = ['gpt2', 'llama', 'qwen2', 'gemma3_text', 'phi3', 'gpt_neox', 'olmo2']
IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
LENGTHS = [7, 9, 8]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)


@pytest.mark.parametrize('name', NAMES)
def test_packed_rows_are_read_as_the_model_sees_them(name):
    "A model that obeys positions gives the logits of the documents that are read."
    m = random_model(name)
    with torch.no_grad():
        whole = m(IDS, position_ids=POSITIONS, use_cache=False).logits
        docs = [part for row in whole for part in row.split(LENGTHS)]
        for ids, mask, _ in token_batches(dict(input_ids=IDS, position_ids=POSITIONS), 4, 'cpu'):
            apart = m(ids, attention_mask=mask, use_cache=False).logits
            for r, keep in enumerate(torch.ones_like(ids).bool() if mask is None else mask):
                torch.testing.assert_close(apart[r][keep], docs.pop(0), rtol=1e-4, atol=1e-4)
    assert not docs


def packings():
    numbers = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(LENGTHS)).expand(2, -1)
    yield dict(input_ids=IDS, position_ids=POSITIONS)
    yield dict(input_ids=IDS, attention_mask=numbers)
    yield dict(input_ids=IDS, seq_idx=numbers - 1)
    yield dict(input_ids=IDS.view(1, -1), cu_seq_lens_q=torch.tensor([0, *LENGTHS*2]).cumsum(0), max_length_q=9)
    yield [part.tolist() for row in IDS for part in row.split(LENGTHS)]
    yield Dataset.from_dict(dict(input_ids=IDS.tolist(), position_ids=POSITIONS.tolist()))


def test_documents_are_told_apart_in_any_form():
    want = None
    for data in packings():
        stats = measure(random_model('llama'), data, ('entropy', 'gradient', 'use'), batch_size=8, progress=False)
        got = {k: stats[k] for k in ('entropy', 'fisher', 'use')}
        want = want or got
        for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-4, atol=1e-9, msg=lambda s: f'{k}: {s}')
        assert stats.info['tokens'] == IDS.numel()


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_tokens_weigh_the_same_in_rows_of_any_length(name):
    "The gradient of the gates is that of the mean loss over tokens, whatever the rows and their order."
    m, rows = random_model(name), [IDS[0].tolist(), IDS[1, :5].tolist()]
    tables = [measure(m, data, 'gradient', progress=False) for data in (rows, rows[::-1], [rows[:1], rows[1:]], [rows[1:], rows[:1]])]
    for t in tables[1:]:
        for k in ('grad', 'fisher', 'taylor'): torch.testing.assert_close(t[k], tables[0][k], rtol=1e-3, atol=1e-9)
    alone = [measure(m, [row], 'gradient', progress=False) for row in rows]
    n = [len(row) - 1 for row in rows]
    torch.testing.assert_close(tables[0]['grad'], sum(k*t['grad'] for k, t in zip(n, alone))/sum(n), rtol=1e-3, atol=1e-9)
    loss = sum(k*t.info['loss'] for k, t in zip(n, alone))/sum(n)
    assert abs(tables[0].info['loss'] - loss) < 1e-5


def test_another_process_draws_the_same():
    "Neither the hash seed of Python nor an earlier draw changes the text."
    code = ("from sentinel_ai.calibration import calibration; from sentinel_ai.loaders import load_tokenizer\n"
            "text = calibration('mix', load_tokenizer('tiny-llama'), 64, n=4)\n"
            "print(sum(int((b['input_ids']*(i + 1)).sum()) for i, b in enumerate(text)))")
    told = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    text = calibration('mix', load_tokenizer('tiny-llama'), 64, n=4)
    assert int(told) == sum(int((b['input_ids']*(i + 1)).sum()) for i, b in enumerate(text))


@pytest.mark.parametrize('batches, says', [(None, r"calibration\('mix', tokenizer\)"), ('mix', r'calibration\(texts, tokenizer\)'),
                                           ([dict(role='user', content='Hi')], 'apply_chat_template'),
                                           (dict(input_ids=IDS, mine=IDS), 'mine, which would be left out')])
def test_what_is_no_tokens_is_refused_by_name(batches, says):
    m = random_model('llama')
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=says): prune(m, .25, batches, progress=False)
    assert m.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_every_row_begins_as_a_text_begins():
    "With the token that the tokenizer puts before every text, short ones too; and the note says what was drawn."
    tok = copy.deepcopy(load_tokenizer('tiny-llama'))
    tok.add_special_tokens(dict(bos_token='<s>'))
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', tok.bos_token_id)])
    text = calibration({'python_docs': 3, 'python_code': 1}, tok, 64, n=8)
    lengths = sorted(n for b in text for n in b['attention_mask'].sum(1).tolist())
    assert lengths[0] == 8 and lengths[-1] == 64 and lengths.count(64) == 6
    assert all((b['input_ids'][:, 0] == tok.bos_token_id).all() and (b['input_ids'] == tok.bos_token_id).sum() == len(b['input_ids']) for b in text)
    kinds = text.kinds
    assert 2 < kinds['python_docs']/kinds['python_code'] < 4
    assert prune(random_model('llama', vocab_size=len(tok)), .25, text, rounds=1, progress=False).info['text'] == kinds
