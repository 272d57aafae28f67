"""A model of ours for EleutherAI's lm-evaluation-harness: `import armillary.serve.lm_eval`, then `model="armillary"`.

    lm_eval.simple_evaluate(model="armillary", model_args="model=smollm2", tasks=["hellaswag"])

`model_args` are the model's name or path and any option of `EngineConfig`. Scores come from the engine's own prompt log-probabilities, so what is
evaluated is what is served: kernels, weight format and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from armillary.core.errors import InputError, MissingDependencyError
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingDependencyError("lm_eval is not installed", "pip install 'armillary[eval]'") from error

GENERATED = 256  # tokens at most where a task does not say: as lm_eval's own models


@register_model("armillary")
class ArmillaryLM(TemplateLM):  # type: ignore[misc]
    """`lm_eval`'s interface over `LLM`. Options: those of `LLM`."""

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        super().__init__()
        # The harness gives a batch size and a device, which an engine that batches by itself on this machine has no use for.
        for name in ("batch_size", "max_batch_size", "device"):
            options.pop(name, None)
        self.llm = LLM(model, **options)

    @property
    def eot_token_id(self) -> int:
        tokenizer = self.llm.loaded.tokenizer
        token = tokenizer.eos if tokenizer.eos is not None else min(tokenizer.stop_ids, default=None)
        if token is None:
            raise InputError(f"{self.llm.loaded.name} has no token that ends a text", "its tokenizer needs an eos")
        return token

    @property
    def prefix_token_id(self) -> int:
        bos = self.llm.loaded.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        context = self.llm.engine.config.context
        assert context is not None  # `build_engine` has settled it
        return context

    @property
    def tokenizer_name(self) -> str:
        return self.llm.loaded.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.llm.loaded.tokenizer.encode(string, special=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        template = self.llm.loaded.chat_template
        if template is None:
            raise InputError(f"{self.llm.loaded.name} has no chat template", "evaluate without apply_chat_template")
        if not add_generation_prompt:
            raise InputError("a prompt without the assistant's turn cannot be made here", "leave fewshot_as_multiturn's prefill out")
        return template.render(chat_history)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether each token is the likeliest) of every continuation."""
        for _pair, context, continuation in requests:
            if len(context) + len(continuation) > self.max_length:
                raise InputError(
                    f"a context of {len(context):,} and a continuation of {len(continuation):,} tokens exceed {self.max_length:,}",
                    "evaluate with a larger context=, or a task with shorter texts: nothing is cut here",
                )
        prompts = [tuple(context + continuation) for _pair, context, continuation in requests]
        answers = self.llm.generate(prompts, SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1)) if prompts else []
        scored = []
        for answer, (pair, context, _continuation) in zip(answers, requests, strict=True):
            tail = [entry for entry in answer.request.prompt_logprobs[len(context) :] if entry is not None]
            total = sum(entry.logprob or 0.0 for entry in tail)
            greedy = all(entry.top[0][0] == entry.token for entry in tail)
            scored.append((total, greedy))
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, scored[-1])
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context that overlap by one token."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the strings that end them. Contexts that leave no room are an error: nothing is cut."""
        prompts, sampling = [], []
        for request in requests:
            context, told = request.args
            told = dict(told)
            until = told.pop("until", [])
            temperature = float(told.pop("temperature", 0.0)) if told.pop("do_sample", False) else 0.0
            told.pop("temperature", None)
            most = int(told.pop("max_gen_toks", GENERATED))
            if told:
                raise InputError(f"generation option {min(told)!r} is not supported", "known: until, max_gen_toks, do_sample, temperature")
            stop = (until,) if isinstance(until, str) else tuple(until)
            prompts.append(tuple(self.tok_encode(context)))
            sampling.append(SamplingParams(max_tokens=most, temperature=temperature, stop=stop))
        answers = self.llm.generate(prompts, sampling) if prompts else []
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return [answer.text for answer in answers]
