"""The oracle of pruning inside the language model: whole-length passes with dropped tokens hidden from deeper layers.

It runs the decoder layers one after another on all columns, under eager attention, with masks of its own: a token that
was dropped after layer l can be looked at in layers 0 .. l and not behind. What it drops it finds from the attention
maps that the layers return.
"""

from __future__ import annotations

import copy
import functools

import torch
from tiny_common import ready
from tiny_models import IMAGE, SPECIAL, VIDEO, prompts, qwen_inputs, tiny

from tokenpruning.adaptinfer import Schedule
from vlmeff.vlm.inner_request import prepare

LAYERS = 5
RATIOS = Schedule(layers=(1, 2), ratios=(0.5, 0.4))
TABLE = Schedule(layers=(1, 3), keep=(7, 2))
NOTHING_LEFT = Schedule(layers=(1, 2), keep=(5, 0))
EVERYTHING = Schedule(layers=(1, 2), ratios=(1.0, 1.0))
# Both sides compute the same sums in float32, over key sets of different length and so in a different order.
# Logits go up to 20.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@functools.cache
def deeper(name):
    model = tiny(name)
    model.config.text_config.num_hidden_layers = LAYERS
    model.config.text_config.layer_types = ["full_attention"] * LAYERS
    return type(model), model.config


def deep(name, attention="sdpa"):
    """The tiny model with more language layers."""
    cls, config = deeper(name)
    torch.manual_seed(0)
    return ready(cls(copy.deepcopy(config)), torch.float32, attention)


def text_model(model):
    base = model.model
    return base.language_model if hasattr(base, "language_model") else base.text_model


def batch(model, rows=1, *, padded=True):
    """``rows`` prompts with one picture each, of one size, the first shortest; Qwen's differ in layout too."""
    qwen = "qwen" in model.config.model_type
    inputs = qwen_inputs(model, [[(8, 12)]] * rows) if qwen else prompts(model, [1] * rows)
    if not padded:
        del inputs["attention_mask"]
    return inputs


def placeholders(inputs):
    return torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))


def generate(model, inputs, schedule, **options):
    """The pruned call and its record."""
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, **options}
    kwargs = {**inputs, **options}
    run = prepare(model, text_model(model), schedule, kwargs, visual=placeholders(inputs), generating=True)
    with run:
        return model.generate(**kwargs), run.record


class Oracle:
    """Full-length passes; ``hidden_from[b]``: {column: the last layer that sees it}; ``kept``: per pruning layer.

    ``retained``: per layer [B, L] bool, what the queries behind the prompt still see of it; None: everything.
    """

    def __init__(self, name, inputs, schedule):
        self.model = model = deep(name, "eager")
        self.schedule, self.ids = schedule, inputs["input_ids"]
        self.rows, self.width = self.ids.shape
        self.valid = inputs.get("attention_mask", torch.ones_like(self.ids)).bool()
        self.visual = placeholders(inputs)
        taken = {}
        handle = text_model(model).register_forward_pre_hook(lambda _, args, kw: taken.update(kw), with_kwargs=True)
        model(**inputs)
        handle.remove()
        self.embeds, self.positions = taken["inputs_embeds"], taken.get("position_ids")
        self.deepstack = taken.get("deepstack_visual_embeds") or []
        if self.positions is None:
            self.positions = (self.valid.long().cumsum(1) - 1).clamp(min=0)
        self.positions = self.positions[-3:] if self.positions.ndim == 3 else self.positions
        self.hidden_from = None
        self.retained = None

    def run(self):
        """Logits [B, n, V] of all columns."""
        language = text_model(self.model)
        hidden, total = self.embeds, self.embeds.shape[1]
        rotary = language.rotary_emb(hidden, self.positions)
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        first = self.hidden_from is None
        if first:
            self.hidden_from = [{} for _ in range(self.rows)]
            self.kept = []
        left = [self.visual[b].nonzero()[:, 0].tolist() for b in range(self.rows)]
        for number, layer in enumerate(language.layers):
            seen = torch.cat([self.valid, torch.ones(self.rows, total - self.valid.shape[1], dtype=torch.bool)], 1)
            for b in range(self.rows):
                for column, last in self.hidden_from[b].items():
                    if number > last:
                        seen[b, column] = False
            allowed = causal & seen[:, None]
            if self.retained is not None:
                allowed[:, self.width :, : self.width] &= self.retained[number][:, None]
            mask = torch.zeros(self.rows, 1, total, total).masked_fill(~allowed[:, None], torch.finfo(torch.float).min)
            arguments = {"attention_mask": mask, "position_embeddings": rotary}
            if first and number in self.schedule.layers:
                _, maps = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)
                k = self.schedule.counts(int(self.visual[0].sum()))[self.schedule.layers.index(number)]
                left = [self.best(maps[b].double(), b, left[b], k) for b in range(self.rows)]
                self.kept.append(left)
                for b in range(self.rows):
                    for column in self.visual[b].nonzero()[:, 0].tolist():
                        if column not in left[b]:
                            self.hidden_from[b].setdefault(column, number)
            hidden = layer(hidden, **arguments)
            if number < len(self.deepstack):
                visual = torch.zeros(self.rows, total, dtype=torch.bool)
                visual[:, : self.width] = self.visual
                hidden = language._deepstack_process(hidden, visual, self.deepstack[number])
        return self.model.lm_head(language.norm(hidden))

    def best(self, a, b, candidates, k):
        """The paper's score, from attention maps [heads, n, n] of row b."""
        last = int(self.visual[b].nonzero()[-1])
        text = [c for c in range(last + 1, self.width) if self.valid[b, c]]
        t2t = a[:, text][:, :, text]
        weight = t2t.sum(2) + t2t.sum(1) - t2t.diagonal(dim1=1, dim2=2)
        score = (weight[:, :, None] * a[:, text][:, :, candidates]).sum(1).sum(0).tolist()
        order = sorted(range(len(candidates)), key=lambda i: (-score[i], i))
        return sorted(candidates[i] for i in order[:k])

    def append(self, tokens):
        """Put [B, n] tokens behind the sequence."""
        for token in tokens.split(1, 1):
            self.embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(token)], 1)
            highest = self.positions.amax(-1, keepdim=True)
            if self.positions.ndim == 3:
                highest = highest.amax(0, keepdim=True).expand(3, -1, -1)
            self.positions = torch.cat([self.positions, highest + 1], -1)

    def greedy(self, steps):
        """Tokens [B, steps] and the logits [B, V] behind each."""
        tokens, logits = [], []
        for _ in range(steps):
            logits.append(self.run()[:, -1])
            allowed = logits[-1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
            tokens.append(allowed.argmax(1, keepdim=True))
            self.append(tokens[-1])
        return torch.cat(tokens, 1), logits


def assert_equal_to_oracle(name, inputs, schedule, out, record, steps=5):
    oracle = Oracle(name, inputs, schedule)
    tokens, logits = oracle.greedy(steps)
    assert [kept.tolist() for kept in record.kept] == oracle.kept
    for a, b in zip(out.logits, logits, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    return oracle
