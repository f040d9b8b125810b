"""What nearly every notebook imports, for the server that forks a process for each (conftest.py).

A first `from_pretrained` looks through the configs and tokenizers of all architectures, two seconds of imports:
here they are made once.
"""
import importlib
import pkgutil

from transformers import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

import sentinel_ai

list(AutoModelForCausalLM._model_mapping.keys())
list(TOKENIZER_MAPPING.keys())
for module in pkgutil.iter_modules(sentinel_ai.__path__):
    if not module.name.startswith('__'): importlib.import_module(f'sentinel_ai.{module.name}')
for name in 'gpt2 opt bloom gpt_neox llama mistral'.split():
    importlib.import_module(f'transformers.models.{name}.modeling_{name}')
