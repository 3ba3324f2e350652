"""lm_eval's Hugging Face model, faster where requests share their beginnings; `--model hub_moe` in lm_eval.

Shape letters: S scored rows of a step, V vocabulary.
"""

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import EvaluationError, MissingExtraError
from ..modeling import HubMoeConfig  # noqa: F401  (lm_eval loads HubMoe checkpoints once it is registered)
from .prefix_cache import REHEARSAL_COST, StemCache, find_obstacle, measure_difference, run_step
from .prefix_reuse import Budget, Plan, Scored, Step, plan_requests

try:
    from lm_eval.api.registry import model_registry, register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtraError("Evaluating needs lm_eval: pip install 'hub_moe[eval]'.") from error

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context tokens, continuation tokens
Answer = tuple[float, bool]  # log-likelihood, whether greedy decoding would say the same

# tokens of one packed forward where the user's batch is smaller, or not a number
_LEAST_TOKENS = 1024
_MOST_TOKENS = {"cpu": 2048, "cuda": 16384}
_LEAST_CELLS = 2**22
# largest difference that the rehearsal may show: sums in another order, and in half precision a token routed elsewhere
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.2


class HubMoeLM(HFLM):
    """`HFLM` with the same scores: what requests have in common at their beginning runs once, not once per request.

    Only log-likelihoods of choices change their course, and only where that costs less: see `prefix_reuse`. Requests
    that share too little, rolling log-likelihoods and generation run as in `HFLM`, and so does every request of a
    model whose cache cannot be shared; `reuse_reason` says why. Answers reach `cache_hook` forward by forward. On the
    plain path a model with experts is told what is padding, so that hooks on its router count tokens only; expert
    load of a whole suite is measured with `reuse_prefix=False`, where each request's tokens count.

    Attributes:
        reuse_reason: Why every request runs on the plain path, in words; None where sharing works.
        num_prompt_tokens: Tokens of all requests, context and continuation, each counted by itself.
        num_computed_tokens: Positions that the model ran, padding included.
        num_generated_tokens: Tokens that were generated, up to the end of each text.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        reuse_prefix: bool = True,
        say: Callable[[str], None] | None = None,
        **arguments: Any,
    ):
        """As `HFLM`, by keyword; `say` is told once, in a sentence, if sharing is not possible."""
        super().__init__(pretrained=pretrained, **arguments)
        self._say = say or (lambda _: None)
        self.reuse_reason = self._find_obstacle() if reuse_prefix else "reuse_prefix is off"
        if reuse_prefix and self.reuse_reason:
            self._say_plain()
        self.num_prompt_tokens = self.num_computed_tokens = self.num_generated_tokens = 0
        self._is_rehearsed = False
        self._row_lengths: list[int] | None = None  # of the batch that the plain path is about to run
        modules = dict(self.model.named_modules()) if isinstance(self.model, torch.nn.Module) else {}
        has_experts = any(name.rpartition(".")[2] == "experts" for name in modules)
        self._masks_padding = has_experts and "attention_mask" in inspect.signature(self.model.forward).parameters

    def _find_obstacle(self) -> str | None:
        if self.backend != "causal":
            return "an encoder-decoder reads the whole context at once"
        if not self.logits_cache:
            return "logits_cache is off"
        if self.world_size > 1:
            return "several processes may have to run the same number of forwards"
        return find_obstacle(self.model)

    def _say_plain(self) -> None:
        self._say(f"Shared prefixes are not reused: {self.reuse_reason}. Every request runs by itself.")

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        self._check_lengths(requests)
        self.num_prompt_tokens += sum(len(context) + len(continuation) for _, context, continuation in requests)
        plan = self._plan(requests) if override_bs is None else Plan((), tuple(range(len(requests))))
        answers: dict[int, Answer] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for index, answer in self._run_all(requests, plan, override_bs):
                answers[index] = answer
                bar.update()
        return [answers[index] for index in range(len(requests))]

    def _check_lengths(self, requests: list[Request]) -> None:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise EvaluationError(
                f"An answer to score has {longest} tokens, and the model takes {self.max_length} at most; give a "
                "larger max_length if the model allows one, or leave the task out."
            )

    def _run_all(self, requests: list[Request], plan: Plan, override_bs: int | None) -> Iterator[tuple[int, Answer]]:
        for index, answer in self._run_steps(requests, plan.steps):
            texts = requests[index][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            yield index, answer
        yield from self._run_plain(requests, plan.plain, override_bs)

    def _plan(self, requests: list[Request]) -> Plan:
        """What shares and what runs plain. Before sharing for the first time the model is put to a small test."""
        everything_plain = Plan((), tuple(range(len(requests))))
        if self.reuse_reason is not None or not requests or not all(map(self._is_runnable, requests)):
            return everything_plain
        inputs = [
            Scored(tuple((context + continuation)[-(self.max_length + 1) : -1]), len(continuation))
            for _, context, continuation in requests
        ]
        longest = max((scored.tokens for scored in inputs), key=len)
        plan = plan_requests(
            inputs,
            budget=self._budget(len(longest)),
            batch_size=self._plain_batch_size or self.max_batch_size,
            hidden_size=self.config.get_text_config(decoder=True).hidden_size,
            cost_before=0 if self._is_rehearsed else REHEARSAL_COST,
        )
        if plan.steps and not self._is_rehearsed:
            self._rehearse(longest)
        return everything_plain if self.reuse_reason else plan

    def _is_runnable(self, request: Request) -> bool:
        """Whether HFLM would run it; otherwise it is left to HFLM to refuse it."""
        _, context, continuation = request
        return len(context) > 0 and 0 < len(continuation) <= self.max_length

    @property
    def _plain_batch_size(self) -> int | None:
        return None if self.batch_size == "auto" else int(self.batch_size)

    def _budget(self, longest: int) -> Budget:
        """No more than a plain batch holds, where that is not little."""
        most = _MOST_TOKENS.get(self.device.type, _MOST_TOKENS["cpu"])
        batch_size = self._plain_batch_size or self.max_batch_size
        return Budget(
            tokens=min(max(batch_size * longest, _LEAST_TOKENS), most),
            cells=max(batch_size * longest**2, _LEAST_CELLS),
        )

    def _rehearse(self, tokens: Sequence[int]) -> None:
        self._is_rehearsed = True
        with self._inference():
            difference = measure_difference(self.model, tokens)
        tolerance = _TOLERANCES.get(self.mixed_precision_dtype or self.model.dtype, _HALF_TOLERANCE)
        if not difference <= tolerance:  # NaN is no agreement
            self.reuse_reason = f"in a test its logits changed by {difference:.1e} of their size"
            self._say_plain()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def _run_steps(self, requests: list[Request], steps: Sequence[Step]) -> Iterator[tuple[int, Answer]]:
        """Each answer as soon as its last token is predicted."""
        cache = StemCache()
        unfinished: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        for step in steps:
            self.num_computed_tokens += len(step.tokens)
            with self._inference():
                places, logits_SV = run_step(self.model, cache, step)
            targets = [requests[score.request][2][score.place] for score in step.scores]
            predictions = self._read_off(logits_SV, places, targets)
            for score, prediction in zip(step.scores, predictions, strict=True):
                unfinished[score.request].append(prediction)
                if len(unfinished[score.request]) == len(requests[score.request][2]):
                    yield score.request, self._sum_up(unfinished.pop(score.request), logits_SV.dtype)

    def _read_off(self, logits_SV: Tensor, rows: list[int], targets: list[int]) -> Iterator[tuple[float, bool]]:
        """Log-probability of each target in its row, and whether it is the likeliest token."""
        scores_SV = torch.log_softmax(logits_SV, dim=-1, dtype=self.softmax_dtype)
        row = torch.tensor(rows, device=logits_SV.device, dtype=torch.int64)
        target = torch.tensor(targets, device=logits_SV.device, dtype=torch.int64)
        is_greedy = scores_SV.argmax(dim=-1)[row] == target
        return zip(scores_SV[row, target].tolist(), is_greedy.tolist(), strict=True)

    def _sum_up(self, predictions: list[tuple[float, bool]], dtype: torch.dtype) -> Answer:
        """HFLM adds in the dtype of the scores, so half precision rounds the sum."""
        total = torch.tensor([value for value, _ in predictions], dtype=self.softmax_dtype or dtype).sum()
        return float(total), all(is_greedy for _, is_greedy in predictions)

    def _run_plain(
        self, requests: list[Request], chosen: Sequence[int], override_bs: int | None
    ) -> Iterator[tuple[int, Answer]]:
        """HFLM's own batches, one call each: it runs a batch per call and then knows the lengths of its rows."""
        batch_size = self._plain_batch_size or override_bs
        groups = self._group_as_hflm(requests, chosen)
        if batch_size is None:  # found by trying, inside HFLM
            batch_size = max(len(groups), 1)
        for start in range(0, len(groups), batch_size):
            batch = groups[start : start + batch_size]
            indices = [index for group in batch for index in group]
            if self._plain_batch_size or override_bs:
                self._row_lengths = [self._count_inputs(requests[group[0]]) for group in batch]
            answers: list[Answer] = super()._loglikelihood_tokens(
                [requests[index] for index in indices], disable_tqdm=True, override_bs=override_bs
            )
            self._row_lengths = None
            yield from zip(indices, answers, strict=True)

    def _count_inputs(self, request: Request) -> int:
        _, context, continuation = request
        return int(min(len(context) + len(continuation) - 1, self.max_length))

    def _group_as_hflm(self, requests: list[Request], chosen: Sequence[int]) -> list[list[int]]:
        """Requests that HFLM answers from one row, in the order in which it runs the rows."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index in chosen:
            _, context, continuation = requests[index]
            is_grouped = self.backend == "causal" and self.logits_cache
            groups[tuple(context + continuation[:-1]) if is_grouped else index].append(index)

        def place(group: list[int]) -> tuple[int, list[int]]:
            _, context, continuation = max((requests[index] for index in group), key=lambda request: len(request[2]))
            return -len(context) - len(continuation), context + continuation

        return sorted(groups.values(), key=place)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.num_computed_tokens += inps.numel()
        lengths = self._row_lengths
        if attn_mask is not None or not self._masks_padding or not lengths or min(lengths) == inps.shape[1]:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        length_B = torch.tensor(lengths, device=inps.device)
        mask_BL = torch.arange(inps.shape[1], device=inps.device)[None, :] < length_B[:, None]
        with self._inference():
            logits = self.model(inps, attention_mask=mask_BL.long()).logits
        return logits

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """As HFLM; trying out batch sizes is no part of the evaluation, and its tokens are not counted."""
        computed = self.num_computed_tokens
        batch_size = int(super()._detect_batch_size(requests, pos))
        self.num_computed_tokens = computed
        return batch_size

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        texts: Tensor = super()._model_generate(context, max_length, stop, **settings)
        mask = settings.get("attention_mask")
        self.num_prompt_tokens += context.numel() if mask is None else int(mask.sum())
        new = texts[:, context.shape[1] :]
        # every row runs as long as the longest; the last token of all is not fed back
        self.num_computed_tokens += context.numel() + new.shape[0] * max(new.shape[1] - 1, 0)
        is_end = (new == self.eot_token_id) | (new == self.tokenizer.pad_token_id)
        is_after_end = is_end.cumsum(dim=1) - is_end.long() > 0
        self.num_generated_tokens += int((~is_after_end).sum())
        return texts


if "hub_moe" not in model_registry:  # a later lm_eval finds it by its entry point
    register_model("hub_moe")(HubMoeLM)


def run_lm_eval(argv: Sequence[str]) -> int:
    """lm_eval's own command line with `argv`, after hub_moe's models are registered; returns its exit code.

    `--model hf` then loads HubMoe checkpoints, and `--model hub_moe` is this module's class.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *argv]
    try:
        cli_evaluate()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = before
    return 0
