"""Train the small Llama checkpoint in fixtures/tinylm/ on the text that Python itself carries.

    python scripts/train_fixture.py --device cuda --steps 6000 --seed 1 --out fixtures
    python scripts/train_fixture.py --check --out fixtures

The first command needs torch and tokenizers (`pip install .[train]`). It reads the language reference in
`pydoc_data.topics` and the sources of the standard library, with their docstrings and comments, from the running
interpreter, keeps some documents apart, trains a byte-level BPE vocabulary and the model on the rest, and writes a
checkpoint in the Hugging Face layout with the held-out and the calibration text. The second measures the held-out
perplexity of a checkpoint that is there, with its weights as they are and rounded to Q8_0 and Q4_0 by gguf-py.

The corpus, its split and the initial weights depend on the seed and the interpreter alone. Sums on a GPU do not come in
a fixed order, so two runs give models of the same quality, not the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F

log = logging.getLogger("train_fixture")

BOS, EOS = "<|begin_of_text|>", "<|endoftext|>"
# The split that Llama 3 documents for its vocabulary.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SHARD_BYTES = 2_500_000
TEST_BYTES, CALIB_BYTES, VALID_BYTES = 100_000, 100_000, 40_000


@dataclass(frozen=True)
class Shape:
    """The sizes of the model. Every row length is a multiple of 256, the block length of the K formats."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    feed_forward: int = 768
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


# --- The text ---------------------------------------------------------------------------------------------------------


def read_documents() -> dict[str, str]:
    """Every document of the corpus by its name, in the order of a hash of the names, so that any cut is a sample."""
    documents = {f"topic {name}": text.replace("\r\n", "\n").strip() for name, text in topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # Left out: other people's packages, tests (many installations lack them), tables, and traces of the machine.
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"} & {
            *relative.parts
        } or relative.parts[0].startswith(("_sysconfigdata", "config-", "sitecustomize")):
            continue
        try:
            documents[".".join(relative.with_suffix("").parts)] = path.read_text("utf-8").strip()
        except UnicodeDecodeError:
            continue  # a source kept in another encoding
    return dict(sorted(documents.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def may_ship(text: str) -> bool:
    """Whether a document may be part of a fixture: of a fair length and under Python's own licence alone."""
    return 3000 <= len(text) <= 20000 and "copyright" not in text.lower() and "licen" not in text.lower()


def without(text: str, seen: set[str]) -> str:
    """The text less the paragraphs in `seen`: topics and modules repeat one another. Adds what is left to `seen`."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) >= 40:
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and to measure with; no paragraph of 40 characters or more is in two of the three."""

    train: list[str]
    valid: list[str]
    test: list[str]


def split_corpus(documents: dict[str, str]) -> Corpus:
    """Put documents aside, two bytes of sources for one of topics, and drop from the rest what it shares with them."""
    parts: dict[str, list[str]] = {"test": [], "valid": [], "train": []}
    budget = {
        (part, is_topic): size // 3 if is_topic else size * 2 // 3
        for part, size in (("test", TEST_BYTES), ("valid", VALID_BYTES))
        for is_topic in (True, False)
    }
    seen: set[str] = set()
    rest = []
    for name, text in documents.items():
        is_topic = name.startswith("topic ")
        part = next((part for part in ("test", "valid") if budget[part, is_topic] > 0), None)
        if part and may_ship(text):
            parts[part].append(without(text, seen))
            budget[part, is_topic] -= len(parts[part][-1])
            log.info("%s: %s", part, name)
        else:
            rest.append(text)
    parts["train"] = [text for text in (without(text, seen) for text in rest) if len(text) >= 300]
    return Corpus(**parts)


# --- The vocabulary ---------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE vocabulary of `size` tokens, the last two of them BOS and EOS, that puts BOS before a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    if tokenizer.get_vocab_size() != size:
        raise SystemExit(f"the vocabulary has {tokenizer.get_vocab_size()} tokens, not {size}: too little text")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


# --- The model --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention with grouped keys and values and rotary positions in the half-split layout."""

    def __init__(self, shape: Shape) -> None:
        """Four projections without bias."""
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) to the same; cos and sin are (tokens, head)."""
        batch, length, _ = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, length, -1, self.shape.head).transpose(1, 2)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(y.dtype)

        groups = self.shape.heads // self.shape.kv_heads
        q, k, v = rotate(split(self.q_proj(x))), rotate(split(self.k_proj(x))), split(self.v_proj(x))
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        """Three projections without bias."""
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down_proj = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One block with the norms before its two halves."""

    def __init__(self, shape: Shape) -> None:
        """The names are those of the checkpoint."""
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dropout: float) -> torch.Tensor:
        """(batch, tokens, hidden) to the same."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), dropout, self.training)


class Llama(nn.Module):
    """LlamaForCausalLM with untied embeddings. Its state dict has the names and the layout of the checkpoint."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        """Weights from a normal distribution of deviation 0.02, narrower where a residual is added to."""
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.model.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.model.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if narrow else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, tokens) to logits (batch, tokens, vocab)."""
        half = torch.arange(0, self.shape.head, 2, device=tokens.device) / self.shape.head
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), self.shape.rope_theta**-half)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = F.dropout(self.model.embed_tokens(tokens), self.dropout, self.training)
        for layer in self.model.layers:
            x = layer(x, cos, sin, self.dropout)
        return self.lm_head(self.model.norm(x))


@torch.no_grad()
def perplexity(model: Llama, tokenizer: Tokenizer, text: str, n_ctx: int = 512) -> float:
    """The perplexity that llama-perplexity defines: chunks of n_ctx tokens behind a BOS, the second half scored."""
    model.eval()
    device = model.lm_head.weight.device
    tokens = torch.tensor(tokenizer.encode(text).ids, device=device)
    chunks = tokens[: len(tokens) // n_ctx * n_ctx].view(-1, n_ctx).clone()
    chunks[:, 0] = tokenizer.token_to_id(BOS)
    losses = []
    for part in chunks.split(8):
        logits = model(part)[:, n_ctx // 2 : -1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, n_ctx // 2 + 1 :].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean().item())


def train(
    corpus: Corpus,
    tokenizer: Tokenizer,
    shape: Shape,
    *,
    device: str,
    steps: int,
    seed: int,
    batch: int,
    window: int,
    rate: float,
    dropout: float,
    decay: float,
) -> Llama:
    """Train on random windows of `window` tokens, each behind a BOS, with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    end = tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch(corpus.train, add_special_tokens=False)
    stream = torch.tensor(np.concatenate([[*encoding.ids, end] for encoding in encodings]), device=device)
    valid = "\n\n".join(corpus.valid)
    log.info("%d training documents, %d tokens", len(encodings), len(stream))

    model = Llama(shape, dropout).to(device)
    log.info("%d parameters", sum(weight.numel() for weight in model.parameters()))
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.01 + 0.99 * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2),
    )
    offsets = torch.arange(window, device=device)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        model.train()
        at = torch.randint(len(stream) - window, (batch, 1), device=device) + offsets
        targets = stream[at]
        inputs = targets.roll(1, dims=1)
        inputs[:, 0] = tokenizer.token_to_id(BOS)
        # Few processors multiply bfloat16 fast; there float32 is the quicker one.
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=device != "cpu"):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            log.info(
                "step %d: training loss %.3f, validation perplexity %.3f, %.0f s",
                step,
                loss.item(),
                perplexity(model, tokenizer, valid),
                time.perf_counter() - started,
            )
    return model


# --- The checkpoint ---------------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    """JSON as the Hugging Face tools indent it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(model: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model in BF16 shards with their index, its configuration and its vocabulary to the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    shape = model.shape
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    write_json(
        out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "dtype": "bfloat16",
            "eos_token_id": eos,
            "head_dim": shape.head,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": shape.feed_forward,
            "max_position_embeddings": shape.context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": shape.norm_eps,
            # Both spellings: transformers before 5 reads the second one only.
            "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": shape.vocab,
        },
    )
    write_json(out / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False})
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in (BOS, EOS)
            },
            "bos_token": BOS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": shape.context,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tokenizer.save(str(out / "tokenizer.json"))

    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, weight in model.state_dict().items():
        tensor = weight.to(torch.bfloat16).contiguous().cpu()
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    where = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
    write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )


def read_checkpoint(directory: Path) -> tuple[Llama, Tokenizer]:
    """The model of a checkpoint that this script wrote, in float32, and its vocabulary."""
    index = json.loads((directory / "model.safetensors.index.json").read_text("utf-8"))
    state: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        state.update(load_file(directory / file))
    model = Llama(Shape())
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model, Tokenizer.from_file(str(directory / "tokenizer.json"))


def check(out: Path) -> None:
    """Log the held-out perplexity as stored and with every matrix, the embeddings too, rounded to Q8_0 and Q4_0."""
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize, quantize

    text = (out / "tinylm-test.txt").read_text("utf-8")

    def rounding(kind: Type) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind).reshape(weight.shape))

    base = 0.0
    for name, function in (("BF16", None), ("Q8_0", rounding(Type.Q8_0)), ("Q4_0", rounding(Type.Q4_0))):
        model, tokenizer = read_checkpoint(out / "tinylm")
        if function:
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.data = function(weight.data)
        value = perplexity(model, tokenizer, text)
        base = base or value
        log.info("%s: held-out perplexity %.4f, %+.3f%%", name, value, 100 * (value / base - 1))


def main() -> None:
    """Read the options, then train or check."""
    parser = argparse.ArgumentParser(description="Train the checkpoint in fixtures/tinylm.")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps (default: 6000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, windows and dropout (default: 1)")
    parser.add_argument("--batch", type=int, default=32, help="windows in a step (default: 32)")
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window (default: 1024)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (default: 0.003)")
    parser.add_argument("--dropout", type=float, default=0.1, help="(default: 0.1)")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices (default: 0.1)")
    parser.add_argument("--out", type=Path, default=Path("fixtures"), help="directory to write to (default: fixtures)")
    parser.add_argument("--check", action="store_true", help="measure the checkpoint in --out instead of training one")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.check:
        check(options.out)
        return

    documents = read_documents()
    digest = hashlib.sha256("\0".join(documents.values()).encode()).hexdigest()
    log.info("Python %s, %d documents, sha256 %s", platform.python_version(), len(documents), digest)
    corpus = split_corpus(documents)
    log.info("train/valid/test %s characters", [sum(map(len, x)) for x in (corpus.train, corpus.valid, corpus.test)])
    options.out.mkdir(parents=True, exist_ok=True)
    test = "\n\n".join(corpus.test) + "\n"
    (options.out / "tinylm-test.txt").write_text(test, encoding="utf-8")
    calibration, size = [], 0
    for text in corpus.train:
        if size < CALIB_BYTES and may_ship(text):
            calibration.append(text)
            size += len(text)
    (options.out / "tinylm-calib.txt").write_text("\n\n".join(calibration) + "\n", encoding="utf-8")

    shape = Shape()
    tokenizer = train_tokenizer(corpus.train, shape.vocab)
    model = train(
        corpus,
        tokenizer,
        shape,
        device=options.device,
        steps=options.steps,
        seed=options.seed,
        batch=options.batch,
        window=options.window,
        rate=options.rate,
        dropout=options.dropout,
        decay=options.decay,
    )
    write_checkpoint(model, tokenizer, options.out / "tinylm")
    stored, tokenizer = read_checkpoint(options.out / "tinylm")
    log.info(
        "held-out perplexity of the stored weights: %.4f over %d tokens",
        perplexity(stored.to(options.device), tokenizer, test),
        len(tokenizer.encode(test).ids),
    )


if __name__ == "__main__":
    main()
