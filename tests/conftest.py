"""Tiny random models built from configs, one per family, a tokenizer built in code, and a random artifact for each.

Everything is offline. Shape letters as in the package: H = 32, F = 96; blocks of 8, a dense head of 8, 16 tokens at least.
"""

import importlib.util
import os
import random
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Triton becomes what it is when it is imported, and transformers' caches import it: without a GPU, its interpreter.
if importlib.util.find_spec("triton") and not importlib.util.find_spec("vllm") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

try:
    import fastfill  # noqa: F401
except ImportError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import transformers
from hypothesis import settings

from fastfill import artifact as artifacts
from fastfill import attention, choice, families, kernels, partner
from fastfill.config import PrefillConfig
from fastfill.errors import UserError

FAMILIES = tuple(name for name, family in families.FAMILIES.items() if families.runs(family))  # of this transformers
ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("torch", pytest.param("native", marks=pytest.mark.skipif(not kernels.cpu.usable(), reason=kernels.cpu.status())))
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, BLOCK = 128, 32, 96, 3, 8
# What is special about a family, far enough from what changes nothing to be missed by a test.
_GEMMA = {"query_pre_attn_scalar": 2, "final_logit_softcapping": 1.0}
SPECIAL = {
    # Not SDPA, which some versions of transformers take, without the cap. No short window: eager gives padding NaN in fp64.
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 8.0, "attn_implementation": "eager"},
    "gemma3_text": {**_GEMMA, "sliding_window": 24, "sliding_window_pattern": 2},  # layer 1 sees all
    "olmo3": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},  # ones are layers with positions
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
        "mlp_bias": True,
    },
}
PREFILL = PrefillConfig(sparsity=0.5, block_size=BLOCK, dense_head=BLOCK, min_tokens=2 * BLOCK, dense_tail=0)

# fp64 logits of order ten through 3 layers: 1e-10 is 5e4 eps of them, and 1e-9 of what a wrong selection would change.
EXACT = {"rtol": 0, "atol": 1e-10}
SINGLE = {"rtol": 0, "atol": 4e-5}  # fp32, of logits up to 4
RECURRENT = ("qwen3_5_text",)  # some layers keep a state, in fp32 whatever the model's type

settings.register_profile("fastfill", deadline=None, derandomize=True)  # no timing assertions, the same cases every time
settings.load_profile("fastfill")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()  # stderr belongs to what is tested


def tiny_config(family="llama", **changes):
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": HIDDEN**-0.5,  # every linear layer keeps the scale, so that no part is negligible
        **changes,
    }
    return transformers.AutoConfig.for_model(family, **{**SPECIAL.get(family, {}), **values})


def tiny_model(family="llama", seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    for name, bias in model.named_parameters():
        if ".mlp." in name and name.endswith("bias"):  # they come as zeros
            bias.data.normal_(std=0.3)
    if model.config.tie_word_embeddings:  # at full size it would say the word it has just read, whatever the FFNs do
        model.get_input_embeddings().weight.data *= 0.3
    model.generation_config.eos_token_id = None  # generate as many tokens as asked, whatever they are
    model.config.eos_token_id = None
    return model.to(dtype).eval()


def tiny_artifact(model, seed=0, prefill=PREFILL, ranks=(8, 4, 4), name="tiny"):
    """Random weights of order one, fp32, and layers of unequal importance, so that every layer keeps another count."""
    anatomy = families.dissect(model)
    base = artifacts.describe_model(anatomy, name)
    ranks = dict(zip(("predictor", "linear", "silu"), ranks, strict=True))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in artifacts.shapes(base, ranks).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            values /= max(shape[1], 1) ** 0.5
        if "w_out" in key and "predictor" in key:
            values *= 4  # scores well apart
        if "stats" in key:
            values = values.abs() + 0.1
        tensors[key] = values
    importance = [1.0 + 0.25 * layer for layer in range(base["layers"])]
    return artifacts.Artifact(base, prefill, ranks, importance, tensors, samples=partner.samples(anatomy))


def token_ids(*shape, seed=0):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def tiny_text(words, seed=0):
    """A walk over the vocabulary with few successors per word: text in which there is something to learn."""
    rng, word, out = random.Random(seed), 3, []
    for _ in range(words):
        word = 4 + (word * 7 + rng.choice((1, 2, 5))) % (VOCABULARY - 4)
        out.append(f"w{word}")
    return " ".join(out)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}w7"
    return tokenizer


@pytest.fixture(autouse=True)
def gains(monkeypatch):
    """Sparse is faster from the artifact's `min_tokens` on, whatever a tiny model on a busy machine would tell."""
    monkeypatch.setattr(choice, "choose", lambda ffns, config: choice.Choice(ffns[0].kernel, config.min_tokens))
    monkeypatch.setattr(attention, "_gain", lambda config, dtype: 1.0)  # and attention by chunks is not


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def exact_model():
    """fp64: numerically different ways to the same result cannot flip a selection."""
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The tiny LLaMA and its tokenizer as a folder that `fastfill ... MODEL` loads."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def artifact_folder(model, tmp_path):
    folder = tmp_path / "artifact"
    artifacts.save(tiny_artifact(model), folder, readme="tiny\n")
    return folder


def script(name):
    """A file of benchmarks/ as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def snapshot(folder):
    """Every file below a folder with its bytes, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@contextmanager
def user_error(match):
    """Expects a UserError with these words, in one sentence."""
    with pytest.raises(UserError, match=match) as error:
        yield
    one_sentence(error)


def one_sentence(error):
    """The message of a UserError, checked to be one line that ends like a sentence."""
    text = str(error.value if hasattr(error, "value") else error)
    assert text.strip() == text and "\n" not in text and "Traceback" not in text
    assert len(text) > 15
    return text
