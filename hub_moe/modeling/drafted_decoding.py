"""Greedy decoding with drafts, for batches: every row takes as many of its drafts as are right, and no other tokens.

One forward pass verifies the drafts of all rows. A row that took fewer than its neighbour stays behind in the columns
of the batch: its next tokens overwrite what it did not take, in the token ids and in the caches alike, so that column
c of the cache is always column c of the sequence. No token is computed twice because of another row: had all rows taken
the smallest number that was right in any, 4 and 8 rows would have needed 19 and 24 % more passes where 0.6 were right.

Shape letters: B batch, L new columns, P prompt, S all columns of the token ids, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from ..errors import GenerationError
from .latent_cache import Places, place_rows
from .mtp import MtpAcceptance, MtpDrafter, Prompt, spread_columns

_NOT_FOR_FORWARD = ("logits_processor", "stopping_criteria", "streamer", "synced_gpus", "assistant_model", "tokenizer",
                    "assistant_tokenizer")  # fmt: skip
_IMPLEMENTATIONS = ("sdpa", "eager")  # that take a mask for each row


def must_leave_it(model: Any, generation_config: Any, given: dict[str, Any], *, batch: int) -> bool:
    """Whether transformers' own assisted generation has to do it, which knows more settings but one row only.

    Raises:
        GenerationError: If there are several rows.
    """
    cache: Any = given.get("past_key_values")
    implementation = model.config._attn_implementation
    reasons = {
        "greedy decoding (do_sample=False)": generation_config.do_sample,
        "output_attentions=False": generation_config.output_attentions,
        "output_hidden_states=False": generation_config.output_hidden_states,
        "no assistant_ensemble_weight": generation_config.assistant_ensemble_weight is not None,
        "no synced_gpus": given.get("synced_gpus"),
        "no streamer": batch > 1 and given.get("streamer") is not None,
        "use_cache=True": not given.get("use_cache"),
        "a plain DynamicCache": type(cache) is not DynamicCache or cache.offloading,
        f"attention by {' or '.join(_IMPLEMENTATIONS)}, not {implementation}": implementation not in _IMPLEMENTATIONS,
    }
    missing = [need for need, lacks in reasons.items() if lacks]
    if missing and batch > 1:
        raise GenerationError(f"use_mtp=True with {batch} rows needs {', '.join(missing)}; pass one row at a time.")
    return bool(missing)


class Rows:
    """The tokens of a batch, and which rows go on.

    A row takes exactly the tokens that plain decoding gives it: processors and stopping criteria see, for each length
    that some row passes, the whole batch up to that length, and are heeded in the rows that passed it. (Criteria that
    judge one row by another's tokens have no meaning here.)

    Attributes:
        ids_BS: Token ids; behind a row's known ones lie drafts, or what is left of them.
        known: How many tokens each row has.
    """

    def __init__(self, prompt_BP: Tensor, generation_config: Any, *, processors: Any, criteria: Any, room: int) -> None:
        batch, self._prompt_columns = prompt_BP.shape
        self._most: int = generation_config.max_length
        self._processors, self._criteria = processors, criteria
        self._config = generation_config
        padding = generation_config._pad_token_tensor
        self._padding = 0 if padding is None else int(padding)
        self._ends_rows = any(hasattr(each, "eos_token_id") for each in criteria)
        # drafting looks up to `room` columns behind, once for the drafts themselves and once for the depth
        self.ids_BS = prompt_BP.new_full((batch, self._most + 2 * room), self._padding)
        self.ids_BS[:, : self._prompt_columns] = prompt_BP
        self.known = [self._prompt_columns] * batch
        self._ends: list[int | None] = [None] * batch
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def active(self) -> list[int]:
        """Rows that want more tokens. Without an end-of-sequence token plain decoding goes on in all until the last
        one is to stop."""
        open_rows = [row for row, end in enumerate(self._ends) if end is None]
        if self._ends_rows:
            return open_rows
        length = self._most if open_rows else self.length
        return [row for row, known in enumerate(self.known) if known < length]

    @property
    def length(self) -> int:
        """Columns of the output, once no row is active."""
        return max(end or 0 for end in self._ends)

    @property
    def room(self) -> int:
        """The most tokens that any active row still wants."""
        return max(self._most - self.known[row] for row in self.active)

    def take(self, logits_BLV: Tensor) -> dict[int, int]:
        """Let each active row take the drafts that are right and the model's own token behind them.

        Args:
            logits_BLV: For column `known` of each row, and the L - 1 columns of its drafts behind it.

        Returns:
            How many tokens each active row took.
        """
        active, count = self.active, logits_BLV.shape[1]
        scores_BLV = self._process(logits_BLV, active)
        picked_BL = scores_BLV.argmax(dim=-1)
        columns_BL = spread_columns(self.known, count, device=self.ids_BS.device)
        is_right = self.ids_BS.gather(1, columns_BL)[:, :-1] == picked_BL[:, :-1]
        right = is_right.long().cumprod(dim=1).sum(dim=1).tolist()
        rows = torch.tensor(active, device=self.ids_BS.device)
        self.ids_BS[rows[:, None], columns_BL[rows]] = picked_BL[rows]
        self._keep(self.scores, scores_BLV, active, wanted=self._config.output_scores)
        self._keep(self.logits, logits_BLV, active, wanted=self._config.output_logits)
        taken = {row: min(right[row] + 1, self._most - self.known[row]) for row in active}
        self._find_ends(taken)
        for row in active:
            end = self._ends[row]
            if self._ends_rows and end is not None:
                taken[row] = end - self.known[row]
            self.known[row] += taken[row]
        return taken

    def output(self, cache: DynamicCache) -> Tensor | GenerateDecoderOnlyOutput:
        """As `generate` returns it; scores and logits are 0 behind a row's end."""
        sequences, count = self.ids_BS[:, : self.length].clone(), self.length - self._prompt_columns
        for row, end in enumerate(self._ends if self._ends_rows else ()):
            sequences[row, end:] = self._padding
            for each in (self.scores, self.logits):
                for scores_BV in each[(end or 0) - self._prompt_columns :]:
                    scores_BV[row] = 0
        if not self._config.return_dict_in_generate:
            return sequences
        kept = [tuple(each[:count]) if each else None for each in (self.scores, self.logits)]
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=kept[0], logits=kept[1], past_key_values=cache)

    def _lengths(self, counts: dict[int, int], *, first: int) -> list[int]:
        """Every length that some row reaches with `first` or more of its new tokens, `counts` at most."""
        reached = (range(self.known[row] + first, self.known[row] + count + 1) for row, count in counts.items())
        return sorted({length for lengths in reached for length in lengths})

    def _process(self, logits_BLV: Tensor, active: Sequence[int]) -> Tensor:
        """What the logits processors make of the logits, each seeing the tokens before it, drafts included."""
        if not self._processors:
            return logits_BLV
        last = logits_BLV.shape[1] - 1
        scores_BLV = logits_BLV.clone()
        for length in self._lengths(dict.fromkeys(active, last), first=0):
            place = [min(max(length - known, 0), last) for known in self.known]
            rows = torch.arange(len(place), device=logits_BLV.device)
            given_BV = logits_BLV[rows, torch.tensor(place, device=rows.device)]
            processed_BV = self._processors(self.ids_BS[:, :length], given_BV)
            for row in active:
                if place[row] == length - self.known[row]:
                    scores_BLV[row, place[row]] = processed_BV[row]
        return scores_BLV

    def _find_ends(self, taken: dict[int, int]) -> None:
        """Ask the stopping criteria about every token that was taken."""
        lengths = self._lengths(taken, first=1)
        scores = tuple(self.scores) if self.scores else None
        new = [None if scores is None else scores[: length - self._prompt_columns] for length in lengths]
        stops = [self._criteria(self.ids_BS[:, :length], each) for length, each in zip(lengths, new, strict=True)]
        for length, stop in zip(lengths, torch.stack(stops).tolist(), strict=True):
            for row, count in taken.items():
                passes = self.known[row] < length <= self.known[row] + count
                if passes and stop[row] and self._ends[row] is None:
                    self._ends[row] = length

    def _keep(self, kept: list[Tensor], new_BLV: Tensor, active: Sequence[int], *, wanted: bool | None) -> None:
        """File the new scores under the token they are of."""
        if not (wanted and self._config.return_dict_in_generate):
            return
        for row in active:
            start = self.known[row] - self._prompt_columns
            for place in range(min(new_BLV.shape[1], self._most - self.known[row])):
                while len(kept) <= start + place:
                    kept.append(torch.zeros_like(new_BLV[:, 0]))
                kept[start + place][row] = new_BLV[row, place]


def decode_with_drafts(
    model: Any, prompt_BP: Tensor, generation_config: Any, given: dict[str, Any], acceptance: MtpAcceptance
) -> Tensor | GenerateDecoderOnlyOutput:
    """The tokens of plain greedy decoding for every row, in fewer steps.

    Equal up to rounding: verifying several tokens at once adds in another order than one at a time, which shows where
    the two best logits are as good as equal.

    Args:
        model: A HubMoeForCausalLM.
        prompt_BP: Token ids of the prompts, padded on the left.
        generation_config: As prepared by `generate`.
        given: What else `generate` hands to a decoding method.
        acceptance: Counted up.
    """
    processors, criteria = given["logits_processor"], given["stopping_criteria"]
    depth, streamer = model.config.num_mtp_layers, given.get("streamer")
    rows = Rows(prompt_BP, generation_config, processors=processors, criteria=criteria, room=depth)
    kwargs = {name: value for name, value in given.items() if name not in _NOT_FOR_FORWARD}
    kwargs["output_hidden_states"] = -1
    outputs = model._prefill(prompt_BP, generation_config, dict(kwargs))
    cache, hidden = outputs.past_key_values, outputs.hidden_states[-1]
    prompt = _describe_prompt(kwargs, cache.get_seq_length(), device=model.device)
    in_cache = cache.get_seq_length() - prompt_BP.shape[1]  # columns of the cache before the first of the ids
    unseen = prompt_BP.shape[1] - hidden.shape[1]  # columns of the ids without a hidden state, cached before
    drafter = MtpDrafter(model, Prompt(prompt.mask_BP[:, -hidden.shape[1] :], prompt.last_position_B1))
    first, taken = [0] * len(prompt_BP), rows.take(_logits(outputs.logits[:, -1:], prompt_BP))
    try:
        with model._optimize_model_for_decode():
            while True:
                if streamer is not None:
                    streamer.put(rows.ids_BS[:, rows.known[0] - taken[0] : rows.known[0]].cpu())
                if not rows.active:
                    break
                count = min(depth, rows.room - 1)
                if count:
                    known = [each - unseen for each in rows.known]
                    drafter.draft(rows.ids_BS[:, unseen:], hidden, known=known, first=first, count=count)
                first = [each - 1 - unseen for each in rows.known]
                outputs = _verify(model, rows, prompt, kwargs, count=count, in_cache=in_cache)
                taken = rows.take(_logits(outputs.logits, prompt_BP))
                hidden = outputs.hidden_states[-1][:, : max(taken.values())]
                for tokens in taken.values():
                    acceptance.add(count, tokens - 1)
    finally:
        place_rows(cache, None)
    cache.crop(min(0, rows.length - 1 + in_cache - cache.get_seq_length()))
    if streamer is not None:
        streamer.end()
    return rows.output(cache)


def _describe_prompt(kwargs: dict[str, Any], columns: int, *, device: torch.device) -> Prompt:
    """The prompt as the cache holds it, `columns` wide."""
    position_ids, mask = kwargs["position_ids"].to(device), kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(1, columns, device=device).expand(len(position_ids), -1)
    return Prompt(mask.to(device).bool(), position_ids[:, -1:])


def _logits(logits_BLV: Tensor, like: Tensor) -> Tensor:
    """As plain decoding picks from them."""
    return logits_BLV.to(dtype=torch.float32, device=like.device, copy=True)


def _verify(model: Any, rows: Rows, prompt: Prompt, kwargs: dict[str, Any], *, count: int, in_cache: int) -> Any:
    """The model's outputs for each row's last token and the `count` drafts behind it."""
    first = [known - 1 for known in rows.known]
    columns_BL = spread_columns(first, count + 1, device=rows.ids_BS.device)
    places_BL = columns_BL.to(model.device) + in_cache
    end = max(first) + count + 1 + in_cache
    place_rows(kwargs["past_key_values"], Places(places_BL, end))
    mask = prompt.mask(places_BL, end, config=model.config, dtype=model.dtype)
    given = {"attention_mask": mask, "position_ids": prompt.positions(places_BL), "logits_to_keep": 0}
    inputs = model.prepare_inputs_for_generation(rows.ids_BS.gather(1, columns_BL), **{**kwargs, **given})
    return model(**inputs, return_dict=True)
