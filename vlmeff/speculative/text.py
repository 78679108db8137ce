"""Speculative decoding of a language model's text: draft a few tokens, verify them in one pass, keep what is right.

``TextDecoding`` is one decoding loop for ``generate(custom_generate=...)``. Greedy output is that of plain decoding
token for token (in half precision a pass of another width can flip exact near-ties); sampling has the law of plain
decoding, and with drafts that are chosen, not drawn, also its random numbers. Positions and masks are those that
``generate`` counts, so it works on prompts whose pictures were reduced and on caches that keep a part of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from vlmeff.errors import ConfigError
from vlmeff.speculative import caches
from vlmeff.speculative.drafting import Drafter, Request, Session, forbidden_ids
from vlmeff.speculative.lookup import Lookup
from vlmeff.speculative.pace import Pace
from vlmeff.speculative.recycle import Recycle
from vlmeff.speculative.text_report import TextStatistics
from vlmeff.speculative.tree import Draft, tree_mask
from vlmeff.speculative.verify import walk


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSpeculation:
    """How to speculate.

    Args:
        drafter: ``Lookup``, ``Recycle``, ``Assistant`` or one's own (``vlmeff.speculative.drafting.Drafter``).
        adaptive: shorten drafts while they are wrong, lengthen them while they are right.
        warmup: tokens to emit before anything is drafted, as short answers gain nothing; only lookup drafts earlier,
            where at least three tokens match.
        fallback: decode calls that speculation cannot serve (several rows, beams, a static cache) plainly and say so in
            the report; False: they raise.
    Raises:
        ConfigError: naming the argument.
    """

    drafter: Drafter = field(default_factory=Lookup)
    adaptive: bool = True
    warmup: int = 4
    fallback: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.drafter, str):  # as in wrap(text_speculation="lookup")
            object.__setattr__(self, "drafter", named_drafter(self.drafter))
        if isinstance(self.drafter, type) or not isinstance(self.drafter, Drafter):
            raise ConfigError(
                f"TextSpeculation: drafter={self.drafter!r} must be 'lookup', 'recycle', Lookup(...), Recycle(...) or "
                "Assistant(model)."
            )
        if type(self.warmup) is not int or self.warmup < 0:
            raise ConfigError(f"TextSpeculation: warmup={self.warmup!r} must be an int >= 0.")


def named_drafter(name: str) -> Drafter:
    """Raises ``ConfigError`` for an unknown name, and for an assistant, which a name cannot give."""
    made: dict[str, Any] = {"lookup": Lookup, "recycle": Recycle}
    if name == "assistant":
        raise ConfigError("text_speculation='assistant': pass the smaller model itself, or vlmeff.Assistant(model).")
    if name not in made:
        raise ConfigError(f"text_speculation={name!r} must be 'lookup', 'recycle', a model or a TextSpeculation.")
    drafter: Drafter = made[name]()
    return drafter


@dataclass(eq=False)
class TextDecoding:
    """``model.generate(**inputs, custom_generate=TextDecoding(settings, inputs=inputs))``, for one call.

    ``streamer`` has to be given here too: ``generate`` does not hand it to a ``custom_generate``. ``statistics`` says
    afterwards what was done.
    """

    settings: TextSpeculation
    inputs: Mapping[str, Any]
    assistant_inputs: Mapping[str, Any] | None = None
    streamer: Any = None
    statistics: TextStatistics = field(init=False)

    def __post_init__(self) -> None:
        self.statistics = TextStatistics(self.settings.drafter.name)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        reason = _obstacle(input_ids, generation_config, model_kwargs)
        if reason is None:
            run = _Run(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            return run.decode()
        if not self.settings.fallback:
            raise ConfigError(
                f"text_speculation: {reason}; or use TextSpeculation(fallback=True) to decode such calls plainly."
            )
        self.statistics.fallback = reason
        mode = GENERATION_MODES_MAPPING[generation_config.get_generation_mode(None)]
        method = getattr(model, mode, None)
        if method is None or mode == "_assisted_decoding":
            raise ConfigError(f"text_speculation: {reason}. This call needs another decoding loop: unwrap the model.")
        plain: Any = method(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=self.streamer,
            **model_kwargs,
        )
        return plain


def _obstacle(input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> str | None:
    """Why a call cannot be speculated on, and what to change; None: it can."""
    mode = GENERATION_MODES_MAPPING[config.get_generation_mode(None)]
    if mode == "_assisted_decoding":
        return "prompt_lookup_num_tokens and the like are transformers' own speculation: leave them out"
    if mode != "_sample":
        return f"num_beams={config.num_beams} and other searches keep several texts at once: leave it out"
    if len(input_ids) != 1:
        return f"{len(input_ids)} rows (or returned sequences) would advance at different paces: generate one a call"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "output_attentions and output_hidden_states come in steps of one token: leave them out"
    return caches.obstacle(model_kwargs.get("past_key_values"))


class _Run:
    """One call. ``ids`` the text so far as a list, ``input_ids`` [1, L] the same for processors and criteria."""

    def __init__(
        self,
        decoding: TextDecoding,
        model: Any,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.decoding, self.statistics, self.settings = decoding, decoding.statistics, decoding.settings
        self.model, self.input_ids, self.processors, self.criteria = model, input_ids, processors, criteria
        self.config, self.model_kwargs = config, model_kwargs
        self.ids: list[int] = input_ids[0].tolist()
        self.width = len(self.ids)
        self.done = False
        keep = config.return_dict_in_generate
        self.scores: list[Tensor] | None = [] if keep and config.output_scores else None
        self.logits: list[Tensor] | None = [] if keep and config.output_logits else None
        self.pace = Pace(self.settings)
        self.session: Session
        self.request: Request

    def decode(self) -> Any:
        begun = time.perf_counter()
        learns = bool(getattr(self.settings.drafter, "learn_prompt", False))
        if learns and "logits_to_keep" in self.model_kwargs:
            self.model_kwargs["logits_to_keep"] = 0  # all of them
        outputs = self.model._prefill(self.input_ids, self.config, self.model_kwargs, is_first_iteration=True)
        if learns and "logits_to_keep" in self.model_kwargs:
            self.model_kwargs["logits_to_keep"] = 1
        logits = outputs.logits[0]
        cache = outputs.past_key_values
        reason = caches.obstacle(cache)
        if reason is not None:
            raise ConfigError(f"text_speculation: {reason}.")
        self._start(cache, vocabulary=logits.shape[-1])
        if learns:
            self._observe(self.ids[-len(logits) :], logits)
        caches.begin(cache)
        try:
            self._emit(Draft(), outputs, logits[-1:])
            del outputs, logits
            with self.model._optimize_model_for_decode():
                while not self.done:
                    self._round(cache)
        finally:
            caches.end(cache)
        if self.decoding.streamer is not None:
            self.decoding.streamer.end()
        self.statistics.wall_s = time.perf_counter() - begun
        if not self.config.return_dict_in_generate:
            return self.input_ids
        made: dict[str, Any] = {
            "sequences": self.input_ids,
            "scores": None if self.scores is None else tuple(self.scores),
            "logits": None if self.logits is None else tuple(self.logits),
            "past_key_values": cache,
        }
        return GenerateDecoderOnlyOutput(**made)

    def _start(self, cache: Any, *, vocabulary: int) -> None:
        eos, pad = self.config._eos_token_tensor, self.config._pad_token_tensor
        last = frozenset() if eos is None else frozenset(eos.reshape(-1).tolist())
        attention = getattr(self.model.config.get_text_config(), "_attn_implementation", None)
        self.request = Request(
            model=self.model,
            prompt=list(self.ids),
            inputs=self.decoding.inputs,
            assistant_inputs=self.decoding.assistant_inputs,
            processors=self.processors,
            do_sample=bool(self.config.do_sample),
            vocabulary=vocabulary,
            takes_trees=caches.takes_trees(cache, attention),
            forbidden=forbidden_ids(self.model, None if pad is None else int(pad), last),
            last=last,
        )
        begun = time.perf_counter()
        self.session = self.settings.drafter.start(self.request)
        self.statistics.draft_time_s += time.perf_counter() - begun

    def _round(self, cache: Any) -> None:
        """Draft, verify, emit, and take back what was wrong."""
        draft = self._draft(cache)
        columns = 1 + len(draft)
        outputs = self._pass(draft, cache)
        logits = outputs.logits[0, -columns:]
        self.root, self.path = len(self.ids) - 1, [0]
        try:
            path = self._emit(draft, outputs, logits)
            self._observe([self.ids[self.root], *draft.tokens], logits)
        finally:  # also where a streamer, a criterion or a drafter raises: every emitted token but the last stays
            caches.keep_path(cache, self.path[: len(self.ids) - 1 - self.root], columns)
        if len(draft):
            self.pace.note(draft.depth, len(path) - 1, emitted=len(self.ids) - self.width)

    def _draft(self, cache: Any) -> Draft:
        emitted = len(self.ids) - self.width
        depth = min(self.pace.depth(emitted), self.config.max_length - len(self.ids) - 1)
        room = caches.room(cache)
        depth = depth if room is None else min(depth, room - 1)
        if depth < 1:
            return Draft()
        begun = time.perf_counter()
        proposed = self.session.propose(self.ids, depth, early=emitted < self.settings.warmup)
        draft = proposed.pruned(depth=depth, legal=self.request.legal, last=self.request.last)
        self.statistics.draft_time_s += time.perf_counter() - begun
        if not draft.is_chain and not self.request.takes_trees:
            raise ConfigError(
                f"text_speculation: the drafter {self.settings.drafter.name!r} proposed a tree, which this attention "
                "or cache cannot verify: heed Request.takes_trees."
            )
        return draft

    def _pass(self, draft: Draft, cache: Any) -> Any:
        """The model on the last emitted token and the draft behind it."""
        kwargs, n = self.model_kwargs, len(draft)
        input_ids = self.input_ids
        if n:
            behind = torch.tensor([draft.tokens], dtype=input_ids.dtype, device=input_ids.device)
            input_ids = torch.cat([input_ids, behind], 1)
            kwargs = self.model._update_model_kwargs_for_generation({}, dict(kwargs), num_new_tokens=n)
        if n and not draft.is_chain:
            kwargs = {**kwargs, **self._tree_arguments(draft, cache)}
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1 + n, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 1 + n
        self.statistics.rounds += n > 0
        self.statistics.drafted += n
        if n:
            tree = self.statistics.shape == "tree" or not draft.is_chain
            self.statistics.shape = "tree" if tree else "chain"
        return self.model(**inputs, return_dict=True)

    def _tree_arguments(self, draft: Draft, cache: Any) -> dict[str, Any]:
        """Positions by depth (the same in every row of M-RoPE), and the mask of paths."""
        text = self.model.config.get_text_config()
        dtype = self.model.dtype if text._attn_implementation == "eager" else None
        mask = tree_mask(
            draft.parents,
            past=int(cache.get_seq_length()),
            padding=self.model_kwargs.get("attention_mask"),
            device=self.model.device,
            dtype=dtype,
        )
        out: dict[str, Any] = {"attention_mask": mask}
        positions = self.model_kwargs.get("position_ids")
        if positions is not None:
            depths = torch.tensor(draft.depths, dtype=positions.dtype, device=positions.device)
            out["position_ids"] = torch.cat([positions, positions[..., -1:] + depths], -1)
        return out

    def _emit(self, draft: Draft, outputs: Any, logits: Tensor) -> list[int]:
        """Hand out the model's tokens; returns the columns of the pass that stay: the root's and those accepted."""
        self.root = len(self.ids) - 1
        self.path = path = [0]
        for token, row, own, scores in walk(draft, logits, self._process, do_sample=self.request.do_sample):
            self._hand_out(token, own, scores)
            if row and not self.done:
                path.append(row)
            if self.done:
                break
        new = len(self.ids) - 1 - self.root
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.model_kwargs, num_new_tokens=new
        )
        self.statistics.target_passes += 1
        self.statistics.accepted += len(path) - 1
        self.statistics.tokens += new
        return path

    def _process(self, logits: Tensor) -> Tensor:
        scores: Tensor = self.processors(self.input_ids, logits.to(self.input_ids.device))
        return scores

    def _hand_out(self, token: int, logits: Tensor, scores: Tensor) -> None:
        new = torch.tensor([token], dtype=self.input_ids.dtype, device=self.input_ids.device)
        self.input_ids = torch.cat([self.input_ids, new[None]], 1)
        self.ids.append(token)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        given = None if self.scores is None else tuple(self.scores)
        self.done = bool(self.criteria(self.input_ids, given).all())
        if self.decoding.streamer is not None:
            self.decoding.streamer.put(new.cpu())

    def _observe(self, tokens: list[int], logits: Tensor) -> None:
        begun = time.perf_counter()
        self.session.observe(tokens, logits)
        self.statistics.draft_time_s += time.perf_counter() - begun
