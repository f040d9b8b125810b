__version__ = "0.2.0.dev0"

from .testing import random_model
from .heads import AttnSite, HeadMap, UnsupportedArchitecture, head_map, register_arch
from .channels import ChannelMap, MlpSite, channel_map, register_mlp
from .experts import ExpertSite
from .gates import AdaptiveMixin, GateConfig, adapt, gate_values, is_adaptive, is_merged, set_gates, unadapt
from .budget import closed_share, gate_penalty, harden_gates
from .merge import merge_gates, unmerge_gates
from .measure import HeadStats, measure, score
from .surgery import HeadPlan, compact, expand
from .pruning import close_heads, prune, undo_repair, unprune
from .stream import compensate
from .undo import unpruned
from .elastic import elastic
from .federated import Client, Clients
from .sizes import resize
from .draft import draft_of
from .unet import add_skips, remove_skips, set_skip_gates, skip_gates
from .memory import HeadMemory, UnitMemory
from .regrow import Regrowth, observe, regrow
from .growth import grow, init_small, ungrow
from .agency import Agency, ConsentError, HeadState
from .protected import protect_text
from .controller import ANNController, ElasticBudget, ReinforceController, ThresholdController
from .saving import SentinelConfig, SentinelForCausalLM, SentinelForImageTextToText
from .clients import SentinelModel
from .export import export_gguf, export_hf
from .vllm import export_vllm, vllm_problems
from .loaders import EMBEDDED, load_adaptive_model, load_baseline_model, load_tokenizer

_LATER = dict(train=('AdaptiveCallback', 'AdaptiveTrainer', 'GateCallback', 'GateRun', 'HeadLR', 'Plasticity', 'adaptive_trainer', 'train_gates'),
              recovery=('RecoveryTrainer', 'recover', 'recovery_args'), teacher=('teacher_bytes', 'teacher_of'),
              checkpoint=('latest_checkpoint', 'load_checkpoint', 'restore', 'save_checkpoint'))


def __getattr__(name):
    "What needs transformers' Trainer is imported when it is asked for."
    import importlib
    for module, names in _LATER.items():
        if name in names: return getattr(importlib.import_module(f'.{module}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
